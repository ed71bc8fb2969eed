"""Whatever breaks: no job is lost, none runs twice but by a requeue, and none that succeeded fails."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tasks
from helpers import is_alive, number_in, script, until
from slurm_cluster import SlurmCluster, wait_until
from slurm_kit import (  # noqa: F401 - fixtures are found by their names
    cluster_fixture,
    needs_slurm,
    result_of,
    results_of,
    slurm_fixture,
    wrapped_fixture,
)

import aiohypertunity as ht
from aiohypertunity import SlurmJob, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slurm_kit import Wrapper

pytestmark = needs_slurm


def note(directory: str, number: int, seconds: float = 0.0) -> int:
    """Notes that it ran; works for a while."""
    with open(f"{directory}/{number}", "a") as file:
        file.write("x")
    time.sleep(seconds)
    return number


def check_ran_once(directory: Path, n_jobs: int) -> None:
    runs = Counter(path.read_text() for path in directory.iterdir())
    assert runs == {"x": n_jobs}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def shell_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- Slurm's daemons -----------------------------------------------------------------------------


@pytest.mark.timeout(300)
async def test_slurmctld_is_killed(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, notes: Path
) -> None:
    """slurmctld is away for 20 s in the middle of 200 jobs: each runs once and comes back."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch([SlurmJob(note, (str(notes), i, 0.1)) for i in range(200)])
        await until(lambda: sum(handle.status is Status.SUCCEEDED for handle in batch) > 20)
        await asyncio.to_thread(cluster.save_state, str(batch[-1].slurm_id))
        cluster.kill_controller()
        await asyncio.sleep(20)
        await asyncio.to_thread(cluster.start_controller)
        # What it had started and not yet noted, it may requeue, and hold for two minutes.
        data = [result.data async for result in scheduler.collect(timeout=150)]
    for node in cluster.nodes:  # and drain, for ids that it has given twice
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    assert sorted(data) == list(range(200))
    check_ran_once(notes, 200)


async def test_a_node_fails(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A job whose node is lost is NodeFailed, and says so when Slurm does."""
    node = cluster.nodes[0]
    options = {"nodelist": node, "requeue": False, "no-requeue": True}
    async with ht.Scheduler(slurm=slurm(options=options)) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.announce, (str(tmp_path / "pid"),)))
        await handle.wait_started()
        cluster.kill_slurmd(node)
        try:
            result = await asyncio.wait_for(handle, 60)
        finally:
            await asyncio.to_thread(cluster.start_slurmd, node)
    assert isinstance(result.error, ht.NodeFailed)
    assert result.host == node


def beat(directory: str) -> None:
    """Says ten times a second that it's alive."""
    path = Path(directory) / os.environ["SLURM_JOB_ID"]
    while True:
        with path.open("a") as file:
            file.write(f"{time.time()}\n")
        time.sleep(0.1)


async def test_no_retry_beside_a_lost_attempt(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, notes: Path
) -> None:
    """A node that Slurm has lost may run on: the attempt there is ended before the next one begins."""
    options = {"no-requeue": True, "exclude": ",".join(cluster.nodes[2:])}
    async with ht.Scheduler(slurm=slurm(options=options)) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(beat, (str(notes),), retries=1))
        await handle.wait_started()
        node = handle.node
        assert node is not None
        cluster.kill_slurmd(node)
        try:
            await until(lambda: len(list(notes.iterdir())) == 2, 120)
            handle.cancel()
            await asyncio.wait_for(handle, 30)
        finally:
            await asyncio.to_thread(cluster.start_slurmd, node)
    first, second = sorted(
        [float(line) for line in path.read_text().split()] for path in notes.iterdir()
    )
    assert first[-1] < second[0]
    await asyncio.to_thread(cluster.wait_idle, 30)


async def test_a_requeued_twin(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """After a slurmd's death the first attempt runs to its end: its result wins, and its twin is cancelled."""
    node = cluster.nodes[1]
    gate = tmp_path / "gate"
    async with ht.Scheduler(slurm=slurm(options={"nodelist": node})) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.gate, (str(gate), 7)))
        await handle.wait_started()
        cluster.kill_slurmd(node)
        try:
            await until(lambda: handle.status is Status.PENDING, 60)
            gate.touch()
            result = await asyncio.wait_for(handle, 30)
        finally:
            await asyncio.to_thread(cluster.start_slurmd, node)
    assert (result.data, result.attempts) == (7, 1)
    await asyncio.to_thread(cluster.wait_idle, 30)


# --- what others do to a job ---------------------------------------------------------------------


async def test_cancelled_from_outside(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster
) -> None:
    """An scancel of somebody else's takes one element, running or waiting, and only that."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        running = scheduler.dispatch([SlurmJob(tasks.forever) for _ in range(2)])
        waiting = scheduler.dispatch(
            [SlurmJob(tasks.double, (1,), meta={"options": {"hold": True}}) for _ in range(2)]
        )
        await running[0].wait_started()
        await until(lambda: waiting[0].pending_reason)
        await asyncio.to_thread(
            cluster.run, "scancel", str(running[0].slurm_id), str(waiting[0].slurm_id)
        )
        for handle, when in ((running[0], "while it ran"), (waiting[0], "before it ran")):
            result = await asyncio.wait_for(handle, 30)
            assert isinstance(result.error, ht.JobCancelled)
            assert f"{when}, and not by this scheduler" in str(result.error)
        assert not running[1].status.is_final
        await asyncio.to_thread(cluster.run, "scontrol", "release", str(waiting[1].slurm_id))
        assert (await asyncio.wait_for(waiting[1], 30)).data == 2


async def test_requeued(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path, notes: Path
) -> None:
    """A requeue is no failure: the job runs again, and `attempts` says so."""
    gate = tmp_path / "gate"
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(note_and_wait, (str(notes), str(gate))))
        await until(lambda: (notes / "0").exists())
        await asyncio.to_thread(cluster.run, "scontrol", "requeue", str(handle.slurm_id))
        await until(lambda: handle.status is Status.PENDING)
        gate.touch()
        await asyncio.to_thread(release, cluster, str(handle.slurm_id))
        result = await asyncio.wait_for(handle, 60)
    assert (result.data, result.attempts) == ("done", 2)
    assert (notes / "0").read_text() == "xx"


def note_and_wait(directory: str, gate: str) -> str:
    note(directory, 0)
    tasks.gate(gate)
    return "done"


def release(cluster: SlurmCluster, job: str) -> None:
    """Slurm holds a requeued job back for two minutes: not now. But not before its first run is done with."""
    wait_until(
        lambda: cluster.run("squeue", "-hj", job, "-o%T %r") == "PENDING BeginTime",
        30,
        lambda: "not requeued",
    )
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


async def test_preempted(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path, notes: Path
) -> None:
    """A job that makes room for a higher partition is queued again and runs twice."""
    gate = tmp_path / "gate"
    whole = {"nodes": 4, "exclusive": True}
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [low] = scheduler.dispatch(
            SlurmJob(
                note_and_wait,
                (str(notes), str(gate)),
                meta={"options": {"partition": "low", **whole}},
            )
        )
        await until(lambda: (notes / "0").exists())
        [high] = scheduler.dispatch(SlurmJob(tasks.double, (1,), meta={"options": whole}))
        assert (await asyncio.wait_for(high, 60)).data == 2
        gate.touch()
        await until(lambda: low.status is Status.PENDING or low.status.is_final)
        await asyncio.to_thread(release, cluster, str(low.slurm_id))
        result = await asyncio.wait_for(low, 60)
    assert (result.data, result.attempts) == ("done", 2)


async def test_python_is_killed(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """kill -9 of a job's Python is a JobCrashed in less than 3 s."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.announce, (str(tmp_path / "pid"),)))
        pid = await asyncio.to_thread(number_in, tmp_path / "pid")
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        result = await asyncio.wait_for(handle, 30)
        assert time.monotonic() - killed < 3
    assert type(result.error) is ht.JobCrashed
    assert result.signal == signal.SIGKILL


async def test_batch_shell_is_killed(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """kill -9 of a job's batch shell is a JobCrashed, and nothing of the job runs on."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.announce, (str(tmp_path / "pid"),)))
        pid = await asyncio.to_thread(number_in, tmp_path / "pid")
        os.kill(shell_of(pid), signal.SIGKILL)
        result = await asyncio.wait_for(handle, 30)
        assert type(result.error) is ht.JobCrashed
        await until(lambda: not is_alive(pid), 5)


async def test_out_of_memory(slurm: Callable[..., ht.Slurm], cluster: SlurmCluster) -> None:
    """A job over its memory is OutOfMemory, and the error says how to ask for more."""
    if not cluster.cgroups:
        pytest.skip("cgroups can't be written here")
    job = SlurmJob(lambda: len(bytearray(300_000_000)), meta={"resources": {"memory": "60M"}})
    result = await result_of(slurm(), job)
    assert isinstance(result.error, ht.OutOfMemory)
    assert "60M" in str(result.error)


async def test_time_limit(slurm: Callable[..., ht.Slurm], cluster: SlurmCluster) -> None:
    """A job over its time limit is a JobTimeout that names the limit."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever, meta={"resources": {"time": "1"}}))
        await handle.wait_started()
        # Slurm looks at limits every 30 s, and counts them in minutes: this one is over at once.
        end = time.strftime("EndTime=%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 1))
        await asyncio.to_thread(cluster.run, "scontrol", "update", f"JobId={handle.slurm_id}", end)
        result = await asyncio.wait_for(handle, 110)
    assert isinstance(result.error, ht.JobTimeout)
    assert result.status is Status.TIMED_OUT
    assert "time limit (1)" in str(result.error)


# --- the spool -----------------------------------------------------------------------------------


def leave_a_cut_result() -> int:
    """Makes the node's own code write half of the result."""
    from _aiohypertunity_node import spool  # type: ignore[import-not-found]

    whole = spool.format_result
    spool.format_result = lambda reply: [b"".join(whole(reply))[:-5]]
    return 5


async def test_a_cut_result(slurm: Callable[..., ht.Slurm]) -> None:
    """A result that was cut is lost, and never read."""
    result = await result_of(slurm(), SlurmJob(leave_a_cut_result))
    assert isinstance(result.error, ht.ResultLost)
    assert "bytes instead of" in str(result.error)


async def test_a_full_disk(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A spool that is full loses the large result, says so, and carries the small one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        jobs = [SlurmJob(tasks.double, (1,)), SlurmJob(lambda: os.urandom(5_000_000))]
        small, large = await results_of(slurm(workdir=disk), *jobs)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert small.data == 2
    assert isinstance(large.error, ht.ResultLost)


async def test_a_full_disk_is_named_by_all(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """Each result that is lost for lack of space says so, and where, though the logs are lost too."""
    numpy = pytest.importorskip("numpy")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        jobs = [SlurmJob(chatter, (2_000_000,)) for _ in range(16)]
        jobs += [SlurmJob(numpy.zeros, (300_000,)) for _ in range(4)]
        results = await results_of(slurm(workdir=disk), *jobs)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    for result in results:
        assert isinstance(result.error, ht.ResultLost)
        assert f"the disk of {disk}" in str(result.error)
        assert "is full: free some space" in str(result.error)


def chatter(n_bytes: int) -> bytes:
    """Fills the log, then returns more than there is room for."""
    os.write(1, (b"x" * 99 + b"\n") * 1000)
    return os.urandom(n_bytes)


async def test_a_disk_full_from_the_start(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """Calls that don't fit into the spool are a TransportError that names the file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk], check=False
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        result = await result_of(slurm(workdir=disk), SlurmJob(len, (os.urandom(1_000_000),)))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert isinstance(result.error, ht.TransportError)
    assert "No space left" in str(result.error)


# --- Slurm's commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('[ "$N" -gt 0 ] || exec sleep 1000; exec "$REAL" "$@"', id="hangs"),
        pytest.param(
            '[ "$N" -gt 0 ] || { echo oops >&2; exit 1; }; exec "$REAL" "$@"', id="fails-once"
        ),
        pytest.param(
            '"$REAL" "$@" >/dev/null; echo "sbatch: error: Socket timed out" >&2; exit 1', id="lies"
        ),
        pytest.param('"$REAL" "$@" >/dev/null; exec sleep 1000', id="queues-and-hangs"),
        pytest.param(
            'echo welcome; "$REAL" "$@"; echo "submitted by plugin 7"; echo nb >&2', id="chatters"
        ),
    ],
)
async def test_sbatch(
    body: str, slurm: Callable[..., ht.Slurm], wrapped: Wrapper, notes: Path
) -> None:
    """However sbatch fails, each job is submitted and runs once."""
    wrapped("sbatch", body)
    jobs = [SlurmJob(note, (str(notes), i)) for i in range(5)]
    results = await results_of(slurm(), *jobs)
    assert [result.data for result in results] == list(range(5))
    check_ran_once(notes, 5)


LIMITED = """
wanted=$(echo "$*" | sed 's/.*--array=0-\\([0-9]*\\).*/\\1/')
if [ $(($(squeue -hr -tPD,R,CG | wc -l) + wanted + 1)) -gt 10 ]; then
    echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
    exit 1
fi
exec "$REAL" "$@"
"""


async def test_submit_limit(slurm: Callable[..., ht.Slurm], wrapped: Wrapper, notes: Path) -> None:
    """Where Slurm takes few jobs of a user, the others wait for their turn."""
    calls = wrapped("sbatch", LIMITED)
    jobs = [SlurmJob(note, (str(notes), i)) for i in range(40)]
    results = await results_of(slurm(), *jobs)
    assert [result.data for result in results] == list(range(40))
    check_ran_once(notes, 40)
    assert len(calls()) < 40


async def test_squeue_fails(
    slurm: Callable[..., ht.Slurm], wrapped: Wrapper, tmp_path: Path
) -> None:
    """squeue that fails is no information: jobs go on, and the one that was killed is told apart later."""
    broken = tmp_path / "broken"
    broken.touch()
    wrapped(
        "squeue",
        f'[ ! -e {broken} ] || {{ echo "Unable to contact" >&2; exit 1; }}; exec "$REAL" "$@"',
    )
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch(
            [
                SlurmJob(tasks.double, (1,)),
                SlurmJob(time.sleep, (11,)),
                SlurmJob(tasks.announce, (str(tmp_path / "pid"),)),
            ]
        )
        assert (await batch[0]).data == 2
        os.kill(shell_of(await asyncio.to_thread(number_in, tmp_path / "pid")), signal.SIGKILL)
        await asyncio.sleep(10)
        assert not batch[1].status.is_final
        assert not batch[2].status.is_final
        broken.unlink()
        assert (await asyncio.wait_for(batch[1], 30)).ok
        assert isinstance(
            (await asyncio.wait_for(batch[2], 40)).error, ht.ResultLost | ht.JobCrashed
        )


async def test_the_driver_sleeps(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """Jobs that end and are purged while the driver's loop sleeps are all known when it wakes."""
    bad = script(tmp_path / "bad.sh", "exit 4\n")
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch(
            [SlurmJob(tasks.double, (i,)) for i in range(10)]
            + [SlurmJob(str(bad)), SlurmJob(tasks.end_as, ("SIGKILL",))]
        )
        await until(lambda: all(handle.slurm_id for handle in batch))
        time.sleep(10)
        results = [await handle for handle in batch]
    assert [result.data for result in results[:10]] == [2 * i for i in range(10)]
    assert isinstance(results[10].error, ht.JobFailed)
    assert isinstance(results[11].error, ht.JobCrashed)


async def test_the_watcher_is_killed(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A watcher that somebody kills is started again, and nothing is missed."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.gate, (str(tmp_path / "gate"), 1)))
        await handle.wait_started()
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "-f", str(tmp_path)], check=True)
        (tmp_path / "gate").touch()
        assert (await asyncio.wait_for(handle, 30)).data == 1


# --- accounting ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), accounting=True, nodes=1) as cluster:
        yield cluster


class Purge:
    """Makes squeue know of no job from a moment on, as if all had been purged while nobody looked."""

    def __init__(self, wrapped: Wrapper, flag: Path) -> None:
        wrapped("squeue", f'[ ! -e {flag} ] || exit 0; exec "$REAL" "$@"')
        self.now = flag.touch


async def test_accounting(
    accounted: SlurmCluster, tmp_path: Path, wrapped: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a job ended that squeue does not know any more comes from the accounting."""
    monkeypatch.setenv("SLURM_CONF", str(accounted.conf))
    purge = Purge(wrapped, tmp_path / "purged")
    calls = wrapped("sacct", 'exec "$REAL" "$@"')
    async with ht.Scheduler(slurm=ht.Slurm(workdir=tmp_path / "work")) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.announce, (str(tmp_path / "pid"),)))
        pid = await asyncio.to_thread(number_in, tmp_path / "pid")
        purge.now()
        os.kill(shell_of(pid), signal.SIGKILL)
        result = await asyncio.wait_for(handle, 60)
    assert type(result.error) is ht.JobCrashed
    assert "Slurm says FAILED" in str(result.error)
    assert calls()


async def test_accounting_has_nothing_to_add(
    accounted: SlurmCluster, tmp_path: Path, wrapped: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed job of which all is known already is no question, and harms no healthy job."""
    monkeypatch.setenv("SLURM_CONF", str(accounted.conf))
    purge = Purge(wrapped, tmp_path / "purged")
    gate = tmp_path / "gate"
    async with ht.Scheduler(slurm=ht.Slurm(workdir=tmp_path / "work")) as scheduler:
        batch = scheduler.dispatch(
            [SlurmJob(tasks.announce, (str(tmp_path / "pid"),)), SlurmJob(tasks.gate, (str(gate),))]
        )
        await batch[1].wait_started()
        pid = await asyncio.to_thread(number_in, tmp_path / "pid")
        purge.now()
        os.kill(shell_of(pid), signal.SIGKILL)
        assert type((await asyncio.wait_for(batch[0], 60)).error) is ht.JobCrashed
        gate.touch()
        assert (await asyncio.wait_for(batch[1], 60)).ok


def test_the_doctor_asks_what_the_engine_asks(
    accounted: SlurmCluster, tmp_path: Path, wrapped: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sacct that refuses any option of the engine's does not answer for the doctor either."""
    monkeypatch.setenv("SLURM_CONF", str(accounted.conf))
    doctor = [sys.executable, "-m", "aiohypertunity", "doctor", "--workdir", str(tmp_path / "w")]
    assert re.search(r"accounting +- +answers", subprocess.check_output(doctor, text=True))
    wrapped("sacct", 'case "$*" in *--parsable2*) echo "sacct: bad option" >&2; exit 1; esac')
    assert "doesn't answer (bad option)" in subprocess.check_output(doctor, text=True)


async def test_accounting_is_stopped(
    accounted: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accounting that is on but doesn't answer changes nothing but what is known."""
    monkeypatch.setenv("SLURM_CONF", str(accounted.conf))
    accounted.stop_accounting()
    try:
        jobs = [
            SlurmJob(tasks.double, (1,)),
            SlurmJob(tasks.fail, ("x",)),
            SlurmJob(tasks.end_as, ("SIGKILL",)),
        ]
        good, failed, killed = await results_of(ht.Slurm(workdir=tmp_path / "work"), *jobs)
    finally:
        await asyncio.to_thread(accounted.start_accounting)
    assert good.data == 2
    assert isinstance(failed.error, ht.JobFailed)
    assert isinstance(killed.error, ht.JobCrashed)
