"""One job's mishap is that job's alone; what was promised in time happens in time; no job of ours strays."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tasks
from helpers import script, until
from slurm_cluster import SlurmCluster
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
from aiohypertunity._executors.slurm import canceller, report, submitter
from aiohypertunity._executors.slurm.looker import Looker
from aiohypertunity._transports.local import LocalShell
from aiohypertunity._transports.protocol import LinkLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from slurm_kit import Wrapper

pytestmark = needs_slurm

HELD = {"options": {"hold": True}}


def in_slurm(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%i %T").split("\n")[:-1]


async def test_an_output_that_cant_be_read(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """A directory in a result's place is that script's trouble, and no other's."""
    odd = script(tmp_path / "odd.sh", 'mkdir "$AIOHYPERTUNITY_OUTPUT_FILE"')
    slow = script(tmp_path / "slow.sh", "sleep 3")
    bad, good, called = await results_of(
        slurm(), SlurmJob(str(odd)), SlurmJob(str(slow)), SlurmJob(tasks.double, (4,))
    )
    assert isinstance(bad.error, ht.ResultLost)
    assert "irectory" in str(bad.error)
    assert good.ok
    assert called.data == 8


async def test_text_that_is_no_unicode(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """An argument may be any bytes, as a file's name may."""
    shown = script(tmp_path / "show.sh", 'printf %s "$1" | od -An -tx1')
    odd, other = await results_of(
        slurm(),
        SlurmJob(str(shown), ("a\udcff",), meta={"output": "env"}),
        SlurmJob(tasks.double, (1,)),
    )
    assert odd.stdout.split() == ["61", "ff"]
    assert other.data == 2


async def test_the_directory_of_the_dispatch(
    slurm: Callable[..., ht.Slurm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job runs where it was dispatched, whatever becomes of that directory for us."""
    then, gone = tmp_path / "then", tmp_path / "gone"
    then.mkdir(), gone.mkdir()
    monkeypatch.chdir(then)
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [here] = scheduler.dispatch(SlurmJob(os.getcwd))
        os.chdir(gone)
        gone.rmdir()
        [named] = scheduler.dispatch(SlurmJob(os.getcwd, cwd="/"))
        os.chdir(tmp_path)
        assert (await here).data == str(then)
        assert (await named).data == "/"


async def test_script_of_an_array_comes_from_a_file(
    slurm: Callable[..., ht.Slurm], wrapped: Wrapper
) -> None:
    """Whatever happens to us meanwhile, sbatch gets all of it."""
    calls = wrapped("sbatch", 'readlink /proc/$$/fd/0 >>"$0.calls"; exec "$REAL" "$@"')
    assert (await result_of(slurm(), SlurmJob(tasks.double, (2,)))).data == 4
    assert calls()[1].endswith("/script")


async def test_a_link_that_stumbles(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock that stood still goes on as soon as anything gets through."""
    real, n_lost = LocalShell.get, 0

    async def get(self: LocalShell, files: Any, **options: Any) -> Any:
        nonlocal n_lost
        n_lost += 1
        if n_lost == 1:
            raise LinkLost("not now")
        return await real(self, files, **options)

    monkeypatch.setattr(LocalShell, "get", get)
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [held] = scheduler.dispatch(SlurmJob(tasks.double, (1,), meta=HELD))
        [quick] = scheduler.dispatch(SlurmJob(tasks.double, (2,)))
        assert (await quick).data == 4
        cluster.run("scancel", str(held.slurm_id))
        assert isinstance((await asyncio.wait_for(held, 30)).error, ht.JobCancelled)


async def test_a_turn_that_nobody_can_give(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster
) -> None:
    """`queue_timeout` holds while slurmctld is away; and the job doesn't run later."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [held] = scheduler.dispatch(SlurmJob(tasks.double, (1,), meta=HELD))
        await until(lambda: held.slurm_id, 30)
        await asyncio.to_thread(cluster.save_state, str(held.slurm_id))
        cluster.kill_controller()
        try:
            job = SlurmJob(tasks.double, (1,), queue_timeout=4)
            began = time.monotonic()
            [handle] = scheduler.dispatch(job)
            await until(lambda: handle.pending_reason, 30)
            result = await asyncio.wait_for(handle, 30)
            assert time.monotonic() - began < 20
        finally:
            await asyncio.to_thread(cluster.start_controller)
        assert result.status is Status.TIMED_OUT
        assert "queue_timeout" in str(result.error)
        assert (await scheduler.dispatch(SlurmJob(tasks.double, (3,)))[0]).data == 6
    await until(lambda: not in_slurm(cluster), 30)


async def test_what_was_let_go_doesnt_stray(
    slurm: Callable[..., ht.Slurm],
    cluster: SlurmCluster,
    wrapped: Wrapper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An sbatch that takes too long for who cancels is cancelled as soon as it has said an id."""
    monkeypatch.setattr(canceller, "_GONE_WITHIN", -3.0)
    wrapped("sbatch", 'sleep 6; exec "$REAL" "$@"')
    cancelled = wrapped("scancel", 'exec "$REAL" "$@"')
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever))
        await asyncio.sleep(1)
        handle.cancel()
        assert (await handle).status is Status.CANCELLED
        await until(cancelled, 30)
    await until(lambda: not in_slurm(cluster), 30)


async def test_leaving_has_a_bound(
    slurm: Callable[..., ht.Slurm],
    cluster: SlurmCluster,
    wrapped: Wrapper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits for ever for an scancel that does nothing."""
    monkeypatch.setattr(canceller, "_GONE_WITHIN", 2.0)
    wrapped("scancel", "exit 0")
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever))
        await handle.wait_started()
        began = time.monotonic()
    assert handle.status is Status.CANCELLED
    assert time.monotonic() - began < 25
    monkeypatch.undo()
    cluster.run("scancel", str(handle.slurm_id))
    cluster.wait_idle(30)


POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)"
)


async def test_a_job_that_no_limit_will_let_in(
    slurm: Callable[..., ht.Slurm], wrapped: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Slurm says of too many jobs, it also says of one too large: it's refused in the end."""
    monkeypatch.setattr(submitter, "_TRIES", 3)
    wrapped(
        "sbatch", f'case "$*" in *--nice=7*) echo "{POLICY}" >&2; exit 1;; esac\nexec "$REAL" "$@"'
    )
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [large] = scheduler.dispatch(SlurmJob(tasks.double, (1,), meta={"options": {"nice": 7}}))
        await asyncio.sleep(0.5)
        [small] = scheduler.dispatch(SlurmJob(tasks.double, (2,)))
        # The first doesn't stand in the way of the second.
        assert (await small).data == 4
        assert not large.done()
        result = await asyncio.wait_for(large, 60)
    assert isinstance(result.error, ht.SubmitError)
    assert "QOS" in str(result.error)


async def test_a_limit_that_goes_up_again(
    slurm: Callable[..., ht.Slurm],
    wrapped: Wrapper,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """How many jobs Slurm takes is found out anew after a while."""
    monkeypatch.setattr(submitter, "_LIMITED_FOR", 1.0)
    full = tmp_path / "full"
    full.touch()
    calls = wrapped(
        "sbatch",
        f'case "$*" in *--array=0-*) [ -e {full} ] && {{ echo "{POLICY}" >&2; exit 1; }};; esac\nexec "$REAL" "$@"',
    )
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        first = scheduler.dispatch([SlurmJob(tasks.double, (i,)) for i in range(4)])
        await until(lambda: len(calls()) > 1, 30)
        full.unlink()
        assert [(await handle).data for handle in first] == [0, 2, 4, 6]
        await asyncio.sleep(1.2)
        n_calls = len(calls())
        again = scheduler.dispatch([SlurmJob(tasks.double, (i,)) for i in range(20)])
        assert sum([(await handle).data for handle in again]) == 380
        assert len(calls()) == n_calls + 1


async def test_a_limit_that_goes_up_while_nothing_ends(
    slurm: Callable[..., ht.Slurm],
    wrapped: Wrapper,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Who waits for a place is tried again also while those who have one go on."""
    monkeypatch.setattr(submitter, "_LIMITED_FOR", 2.0)
    full, gate = tmp_path / "full", tmp_path / "gate"
    calls = wrapped(
        "sbatch", f'if [ -e {full} ]; then echo "{POLICY}" >&2; exit 1; fi\nexec "$REAL" "$@"'
    )
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [first] = scheduler.dispatch(SlurmJob(tasks.gate, (str(gate), 1)))
        await first.wait_started()
        full.touch()
        [second] = scheduler.dispatch(SlurmJob(tasks.double, (2,)))
        await until(lambda: len(calls()) == 2, 30)
        full.unlink()
        assert (await asyncio.wait_for(second, 60)).data == 4
        assert not first.done()
        gate.touch()
        assert (await first).data == 1


async def test_a_fault_of_ours(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the executor's own at one job fails that job, with its traceback, and no other."""
    real = report.report

    def faulty(job: Any, *args: Any) -> Any:
        return real(job, *args) if job.id != "odd" else 1 / 0

    monkeypatch.setattr(report, "report", faulty)
    jobs = [SlurmJob(tasks.end_as, ("os._exit",), id=name) for name in ("odd", "even")]
    odd, even, *good = await results_of(
        slurm(), *jobs, *(SlurmJob(tasks.double, (i,)) for i in range(5))
    )
    assert isinstance(odd.error, ht.TransportError)
    assert "ZeroDivisionError" in str(odd.error)
    assert "in faulty" in str(odd.error.__cause__)
    assert isinstance(even.error, ht.JobCrashed)
    assert [result.data for result in good] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("n_faults", [1, 2])
async def test_a_fault_at_no_job(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch, n_faults: int
) -> None:
    """A fault of the executor's own that concerns no job is survived once; a second one fails all."""
    n_raised = 0

    async def faulty(self: Looker) -> None:
        nonlocal n_raised
        n_raised += 1
        if n_raised <= n_faults:
            raise ZeroDivisionError

    monkeypatch.setattr(Looker, "_ask_accounts", faulty)
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch([SlurmJob(time.sleep, (6,)) for _ in range(3)])
        errors = [(await handle).error for handle in batch]
    assert n_raised > 1
    if n_faults == 1:
        assert errors == [None] * 3
    else:
        assert all(error and "in faulty" in str(error.__cause__) for error in errors)


async def test_many_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where arrays are short, a hundred submissions delay no word of what is cancelled."""
    with SlurmCluster(tmp_path / "slurm", nodes=1, settings={"MaxArraySize": "6"}) as short:
        monkeypatch.setenv("SLURM_CONF", str(short.conf))
        async with ht.Scheduler(slurm=ht.Slurm(workdir=tmp_path / "work")) as scheduler:
            batch = scheduler.dispatch(
                [SlurmJob(tasks.double, (i,), meta=HELD) for i in range(500)]
            )
            await until(lambda: all(handle.slurm_id for handle in batch))
            short.reset_rpcs()
            for handle in batch[::2]:
                handle.cancel()
            async with asyncio.timeout(20):
                assert all([(await handle).status is Status.CANCELLED for handle in batch[::2]])
            assert short.rpcs() < 150
            assert not any(handle.done() for handle in batch[1::2])
