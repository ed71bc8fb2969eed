"""Jobs on a real Slurm come out of the same `collect`, whatever becomes of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import tasks
from helpers import script, until
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
    from collections.abc import Callable
    from pathlib import Path

    from slurm_cluster import SlurmCluster
    from slurm_kit import Wrapper

pytestmark = needs_slurm


# --- what must work ------------------------------------------------------------------------------


async def test_a_callable(slurm: Callable[..., ht.Slurm]) -> None:
    """A callable's result has its value, and where, when and as what it ran."""
    result = await result_of(slurm(), SlurmJob(tasks.add, (1, 2)))
    assert (result.data, result.status, result.attempts) == (3, Status.SUCCEEDED, 1)
    assert result.exit_code == 0
    assert result.slurm_id is not None
    assert result.slurm_id.endswith("_0")
    assert result.host is not None
    assert result.max_rss is not None
    assert result.queued_at <= result.started_at <= result.finished_at  # type: ignore[operator]


async def test_a_lambda_with_a_large_array(slurm: Callable[..., ht.Slurm]) -> None:
    """A closure travels by value, and large arrays beside the pickle, there and back."""
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1_000_000)
    result = await result_of(slurm(), SlurmJob(lambda x: x + array, (array,)))
    assert (result.data == 2 * array).all()
    result.data[0] = 5  # it's one's own


async def test_a_function_in_a_script(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A function in a script finds its siblings."""
    (tmp_path / "sibling_of_train.py").write_text("SCALE = 10\n")
    path = script(
        tmp_path / "train.py",
        "import sibling_of_train\ndef train(lr): return lr * sibling_of_train.SCALE\n",
    )
    result = await result_of(slurm(), SlurmJob(f"{path}:train", {"lr": 3}))
    assert result.data == 30


async def test_scripts(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A script gets its arguments and the path for its result, and needs no Python."""
    path = script(
        tmp_path / "job.sh",
        'echo "said $1"\necho noise >&2\nprintf \'["%s", "%s"]\' "$1" "$2" > "$AIOHYPERTUNITY_OUTPUT_FILE"\n',
    )
    there = tmp_path / "there.json"
    there.write_text("old")
    first, second = await results_of(
        slurm(),
        SlurmJob(str(path), ("a b",)),
        SlurmJob(str(path), {"x": "it's"}, output_file=there),
    )
    assert first.data[0] == "a b"
    assert first.stdout == "said a b\nnoise\n"
    assert second.data == ["--x", "it's"]
    assert there.exists()


async def test_surroundings(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """Environment and directory of each job are its own, also within one array."""
    jobs = [
        SlurmJob(lambda: (os.environ["COLOUR"], os.getcwd()), env={"COLOUR": f"it's {i}"}, cwd=d)
        for i, d in enumerate((tmp_path, "/"))
    ]
    results = await results_of(slurm(setup=["export COLOUR=none; source /dev/null"]), *jobs)
    assert [r.data for r in results] == [("it's 0", str(tmp_path)), ("it's 1", "/")]
    assert len({str(r.slurm_id).partition("_")[0] for r in results}) == 1


async def test_options_and_resources(slurm: Callable[..., ht.Slurm]) -> None:
    """Resources and options reach Slurm; a job's own win."""
    names = ("SLURM_CPUS_PER_TASK", "SLURM_JOB_PARTITION", "SLURM_MEM_PER_NODE")
    job = SlurmJob(
        lambda: [os.environ.get(name) for name in names],
        meta={
            "resources": {"cpu": 2, "memory": "300M", "time": "5"},
            "options": {"partition": "low"},
        },
    )
    result = await result_of(slurm(options={"partition": "main"}), job)
    assert result.data == ["2", "low", "300"]


async def test_status_follows(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A handle says why its job waits, and then since when and where it runs."""
    held = {"options": {"hold": True}}
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.gate, (str(tmp_path / "gate"), 5), meta=held))
        await until(lambda: handle.pending_reason == "JobHeldUser")
        assert handle.status is Status.PENDING
        await asyncio.to_thread(cluster.run, "scontrol", "release", str(handle.slurm_id))
        await handle.wait_started()
        assert handle.status is Status.RUNNING
        assert handle.node in cluster.nodes
        assert abs(time.time() - (handle.started_at or 0)) < 30
        (tmp_path / "gate").touch()
        assert (await handle).data == 5


async def test_many_in_one_array(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, wrapped: Wrapper
) -> None:
    """Jobs dispatched one by one are one call of sbatch."""
    calls = wrapped("sbatch", 'exec "$REAL" "$@"')
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        for i in range(40):
            scheduler.dispatch(SlurmJob(tasks.double, (i,)))
        data = [result.data async for result in scheduler.collect(timeout=60)]
    assert sorted(data) == [2 * i for i in range(40)]
    assert len(calls()) == 1


async def test_max_in_flight(slurm: Callable[..., ht.Slurm], cluster: SlurmCluster) -> None:
    """No more jobs are with Slurm than there may be."""
    counts = []
    async with ht.Scheduler(slurm=slurm(max_in_flight=4)) as scheduler:
        batch = scheduler.dispatch([SlurmJob(time.sleep, (0.2,)) for _ in range(12)])
        while not all(handle.status.is_final for handle in batch):
            queue = await asyncio.to_thread(cluster.run, "squeue", "-hr", "-tPD,R", "-o%i")
            counts.append(len(queue.split()))
            await asyncio.sleep(0.1)
    assert 1 <= max(counts) <= 4


async def test_a_mixed_batch(slurm: Callable[..., ht.Slurm]) -> None:
    """Local and Slurm jobs come out of one collect."""
    results = await results_of(slurm(), ht.Job(tasks.add, (1, 1)), SlurmJob(tasks.add, (2, 2)))  # type: ignore[arg-type]
    assert [r.data for r in results] == [2, 4]


# --- failures ------------------------------------------------------------------------------------


async def test_an_exception(slurm: Callable[..., ht.Slurm]) -> None:
    """What a callable raised is the cause, with the node's traceback as its own cause."""
    result = await result_of(slurm(), SlurmJob(tasks.fail, ("bad luck",)))
    assert isinstance(result.error, ht.JobFailed)
    assert isinstance(result.error.__cause__, ValueError)
    assert "in fail" in str(result.error.__cause__.__cause__)
    assert result.exit_code == 1
    with pytest.raises(ht.JobFailed):
        result.data  # noqa: B018


async def test_a_script_that_fails(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """An exit code other than 0 is a failure that shows the last lines."""
    result = await result_of(
        slurm(), SlurmJob(str(script(tmp_path / "x.sh", "echo oh no\nexit 3\n")))
    )
    assert isinstance(result.error, ht.JobFailed)
    assert result.error.exit_code == 3
    assert "oh no" in str(result.error)


async def test_crashes(slurm: Callable[..., ht.Slurm]) -> None:
    """A process that is killed or leaves in the middle is a crash, seen within 3 s."""
    killed, left = await results_of(
        slurm(), *(SlurmJob(tasks.end_as, (how,)) for how in ("SIGKILL", "os._exit"))
    )
    assert isinstance(killed.error, ht.JobCrashed)
    assert killed.error.signal == 9
    assert killed.finished_at - killed.started_at < 3  # type: ignore[operator]
    assert isinstance(left.error, ht.JobCrashed)
    assert left.error.exit_code == 7


async def test_a_result_that_cannot_be_pickled(slurm: Callable[..., ht.Slurm]) -> None:
    """A value that can't travel is a PayloadError that names it."""
    result = await result_of(slurm(), SlurmJob(lambda: (i for i in ())))
    assert isinstance(result.error, ht.PayloadError)
    assert "return value" in str(result.error)


def fork_and_return() -> str:
    """Forks a child that returns as well, before its parent does."""
    if (child := os.fork()) == 0:
        return "child"
    os.waitpid(child, 0)
    time.sleep(2)
    return "parent"


async def test_a_child_that_returns(slurm: Callable[..., ht.Slurm]) -> None:
    """What a child returns that a callable forked is not the job's result."""
    assert (await result_of(slurm(), SlurmJob(fork_and_return))).data == "parent"


async def test_timeout(slurm: Callable[..., ht.Slurm]) -> None:
    """Timeouts differ freely within an array, and are kept to the second."""
    quick, slow = await results_of(
        slurm(), SlurmJob(tasks.forever, timeout=0.5), SlurmJob(tasks.double, (1,), timeout=60)
    )
    assert quick.status is Status.TIMED_OUT
    assert isinstance(quick.error, ht.JobTimeout)
    assert quick.finished_at - quick.started_at < 4  # type: ignore[operator]
    assert slow.data == 2


async def test_retries(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A job that crashed runs again if it may."""
    result = await result_of(
        slurm(), SlurmJob(tasks.count_then, (str(tmp_path / "n"), "SIGKILL"), retries=1)
    )
    assert (result.data, result.attempts) == (2, 2)


async def test_queue_timeout(slurm: Callable[..., ht.Slurm]) -> None:
    """A job whose turn doesn't come is taken out of the queue, and the error says that it never ran."""
    job = SlurmJob(tasks.double, (1,), queue_timeout=1, meta={"options": {"hold": True}})
    result = await result_of(slurm(), job)
    assert result.status is Status.TIMED_OUT
    assert "never started" in str(result.error)
    assert result.attempts == 0


async def test_refused(slurm: Callable[..., ht.Slurm]) -> None:
    """What sbatch refuses is a SubmitError with its words, at once."""
    result = await result_of(
        slurm(), SlurmJob(tasks.double, (1,), meta={"options": {"partition": "nowhere"}})
    )
    assert isinstance(result.error, ht.SubmitError)
    assert "partition" in str(result.error)


async def test_never_can_run(slurm: Callable[..., ht.Slurm]) -> None:
    """A job that asks for more than any node has says why it waits."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(
            SlurmJob(tasks.double, (1,), meta={"resources": {"cpu": 500}})
        )
        await until(lambda: handle.pending_reason == "PartitionConfig")


async def test_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there's no sbatch the job fails at once and says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("sh", "mkdir", "rm"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    result = await result_of(ht.Slurm(workdir=tmp_path / "work"), SlurmJob(tasks.double, (1,)))
    assert isinstance(result.error, ht.SubmitError)
    assert "sbatch" in str(result.error)


async def test_python_is_missing(slurm: Callable[..., ht.Slurm]) -> None:
    """A Python that isn't on the node is a crash that shows the shell's words."""
    result = await result_of(slurm(python="/nowhere/python"), SlurmJob(tasks.double, (1,)))
    assert isinstance(result.error, ht.JobCrashed)
    assert result.error.exit_code == 127
    assert "/nowhere/python" in str(result.error)


async def test_cloudpickle_is_missing(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python without cloudpickle is named, with what to do."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "packages" not in path])
    result = await result_of(slurm(python=[sys.executable, "-I", "-S"]), SlurmJob(lambda: 1))
    assert isinstance(result.error, ht.PayloadError)
    assert "no module 'cloudpickle': install it there" in str(result.error)


# --- cancel --------------------------------------------------------------------------------------


async def test_cancel_running(slurm: Callable[..., ht.Slurm], cluster: SlurmCluster) -> None:
    """A running job that is cancelled is gone when its handle is done."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever))
        await handle.wait_started()
        handle.cancel()
        result = await handle
    assert isinstance(result.error, ht.JobCancelled)
    cluster.wait_idle(10)


async def test_cancel_pending(slurm: Callable[..., ht.Slurm]) -> None:
    """One element that waits is cancelled by itself; its siblings stay."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        held = scheduler.dispatch(
            [SlurmJob(tasks.double, (i,), meta={"options": {"hold": True}}) for i in range(3)]
        )
        await until(lambda: held[1].slurm_id)
        held[1].cancel()
        result = await held[1]
        assert isinstance(result.error, ht.JobCancelled)
        assert "before it ran" in str(result.error)
        assert held[0].status is Status.PENDING


async def test_cancel_before_submission(slurm: Callable[..., ht.Slurm]) -> None:
    """A job that is cancelled before sbatch ran never gets there, or is cancelled once it's there."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch([SlurmJob(tasks.forever) for _ in range(3)])
        batch[0].cancel()
        await asyncio.sleep(0.05)
        batch[1].cancel()
        assert (await batch[0]).status is (await batch[1]).status is Status.CANCELLED


async def test_leaving(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, wrapped: Wrapper
) -> None:
    """Leaving cancels all that is left by one scancel, waits until it's gone, and cancels by name."""
    calls = wrapped("scancel", 'exec "$REAL" "$@"')
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch([SlurmJob(tasks.forever) for _ in range(50)])
        await batch[0].wait_started()
    assert {handle.status for handle in batch} == {Status.CANCELLED}
    assert len(calls()) == 2
    assert calls()[1].startswith("--name=")
    cluster.wait_idle(15)


async def test_ignores_term(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A job that ignores TERM is killed by Slurm, and then it's gone."""
    deaf = script(tmp_path / "deaf.sh", "trap '' TERM\nwhile :; do sleep 0.2; done\n")
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(str(deaf)))
        await handle.wait_started()
        await asyncio.sleep(0.5)
        handle.cancel()
        assert (await asyncio.wait_for(handle, 60)).status is Status.CANCELLED


async def test_keep_failed(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """What a failed job left is kept if asked, and nothing else."""
    kept = tmp_path / "kept"
    good, bad = await results_of(
        slurm(workdir=kept, keep="failed"),
        SlurmJob(tasks.double, (1,)),
        SlurmJob(tasks.fail, ("why",)),
    )
    assert good.log_path is None
    assert "why" not in str(good.error)
    assert bad.log_path is not None
    assert bad.log_path.exists()
    assert not list(kept.glob("*/*/log.0"))


# --- the doctor ----------------------------------------------------------------------------------


def doctor(cluster: SlurmCluster, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiohypertunity", "doctor", *argv]
    env = os.environ | cluster.env
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)


def test_doctor(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The doctor says that all is well, what it looked at, and where its job ran."""
    done = doctor(cluster, "--workdir", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert "cloudpickle" in done.stdout
    assert any(node in done.stdout for node in cluster.nodes)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workdir", "/proc/nowhere"], "can't be written"),
        (["--workdir", "{tmp}", "--option", "partition=nowhere"], "partition"),
        (["--workdir", "{tmp}", "--python", "/nowhere/python"], "/nowhere/python"),
    ],
)
def test_doctor_finds_fault(
    cluster: SlurmCluster, tmp_path: Path, argv: list[str], words: str
) -> None:
    """The doctor exits 1 and says what is wrong."""
    done = doctor(cluster, *(word.format(tmp=tmp_path) for word in argv))
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert words in done.stdout
