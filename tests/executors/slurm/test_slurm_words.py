"""What users, sites and other people say to Slurm about a job, and what its result then says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tasks
from helpers import is_alive, number_in, script, until
from slurm_cluster import SlurmCluster, wait_until
from slurm_kit import (  # noqa: F401 - fixtures are found by their names
    needs_slurm,
    result_of,
    results_of,
    slurm_fixture,
    wrapped_fixture,
)

import aiohypertunity as ht
from aiohypertunity import SlurmJob, Status
from aiohypertunity._executors.slurm import shell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slurm_kit import Wrapper

pytestmark = needs_slurm

LONGEST = 4


@pytest.fixture(name="cluster", scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster that takes but short arrays."""
    directory = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(directory, nodes=2, settings={"MaxArraySize": str(LONGEST)}) as cluster:
        yield cluster


# --- what the site says --------------------------------------------------------------------------


async def test_short_arrays(slurm: Callable[..., ht.Slurm], wrapped: Wrapper) -> None:
    """More jobs than an array may have are several arrays."""
    calls = wrapped("sbatch", 'exec "$REAL" "$@"')
    results = await results_of(slurm(), *(SlurmJob(tasks.double, (i,)) for i in range(10)))
    assert [result.data for result in results] == [2 * i for i in range(10)]
    assert len(calls()) == 3
    assert {str(result.slurm_id).partition("_")[2] for result in results} == set("0123")


async def test_no_arrays(slurm: Callable[..., ht.Slurm], wrapped: Wrapper) -> None:
    """Where arrays are turned off, a job fails at once and names the setting."""
    wrapped("scontrol", '"$REAL" "$@" | sed "s/^MaxArraySize .*/MaxArraySize            = 0/"')
    result = await result_of(slurm(), SlurmJob(tasks.double, (1,)))
    assert isinstance(result.error, ht.SubmitError)
    assert "MaxArraySize" in str(result.error)


async def test_no_configuration(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has the commands and no configuration says so in plain words."""
    made = slurm()
    monkeypatch.delenv("SLURM_CONF")
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine has a slurm.conf of its own")
    result = await result_of(made, SlurmJob(tasks.double, (1,)))
    assert isinstance(result.error, ht.SubmitError)
    assert "no slurm.conf: is it a login node?" in str(result.error)


async def test_a_setup_that_complains(slurm: Callable[..., ht.Slurm]) -> None:
    """What a setup writes about other things is none of ours."""
    setup = ["no-such-command-here; true", "ls /no/such/file; true", "echo 'MaxArraySize = 0'"]
    result = await result_of(slurm(setup=setup), SlurmJob(tasks.double, (1,)))
    assert result.data == 2


# --- what others say -----------------------------------------------------------------------------

GRACEFUL = "trap 'exit 0' TERM\necho $$ >{pid}\nwhile :; do sleep 0.2; done\n"


async def test_a_graceful_script_is_requeued(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A script that ends well when it's told to has not succeeded: requeued, it runs again."""
    pid, again = tmp_path / "pid", tmp_path / "again"
    path = script(tmp_path / "job.sh", f"[ -e {again} ] && exit 0\n" + GRACEFUL.format(pid=pid))
    job: SlurmJob[object] = SlurmJob(str(path))
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(job)
        await asyncio.to_thread(number_in, pid)
        await handle.wait_started()
        await asyncio.to_thread(cluster.run, "scontrol", "requeue", str(handle.slurm_id))
        await until(lambda: handle.status is Status.PENDING)
        again.touch()
        await asyncio.to_thread(start_now, cluster, str(handle.slurm_id))
        result = await asyncio.wait_for(handle, 60)
    assert (result.status, result.attempts) == (Status.SUCCEEDED, 2)


def start_now(cluster: SlurmCluster, job: str) -> None:
    """Slurm holds a requeued job back for two minutes: not now. But not before its first run is done with."""
    state = ("squeue", "-hj", job, "-o%T %r")
    wait_until(lambda: cluster.run(*state) == "PENDING BeginTime", 30, lambda: "not requeued")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


async def test_a_graceful_script_is_cancelled(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The same script, cancelled by somebody, was cancelled; sent a signal to end, it has ended."""
    pids = [tmp_path / "0", tmp_path / "1"]
    paths = [script(tmp_path / f"{pid.name}.sh", GRACEFUL.format(pid=pid)) for pid in pids]
    jobs: list[SlurmJob[object]] = [SlurmJob(str(path)) for path in paths]
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        first, second = scheduler.dispatch(jobs)
        for handle, pid in zip((first, second), pids, strict=True):
            await asyncio.to_thread(number_in, pid)
            await handle.wait_started()
        await asyncio.to_thread(cluster.run, "scancel", str(first.slurm_id))
        await asyncio.to_thread(cluster.run, "scancel", "-b", "-sTERM", str(second.slurm_id))
        cancelled, ended = [await asyncio.wait_for(h, 60) for h in (first, second)]
    assert isinstance(cancelled.error, ht.JobCancelled)
    assert "not by this scheduler" in str(cancelled.error)
    assert ended.status is Status.SUCCEEDED


async def test_held_while_it_ran(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A job that is requeued and held waits, says for what, and runs again when it's released."""
    gate, pid = tmp_path / "gate", tmp_path / "pid"
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(announce_and_wait, (str(pid), str(gate))))
        await asyncio.to_thread(number_in, pid)
        await handle.wait_started()
        await asyncio.to_thread(cluster.run, "scontrol", "requeuehold", str(handle.slurm_id))
        await until(lambda: handle.pending_reason and "held" in handle.pending_reason.lower())
        await asyncio.sleep(8)
        assert handle.status is Status.PENDING
        gate.touch()
        await asyncio.to_thread(cluster.run, "scontrol", "release", str(handle.slurm_id))
        await asyncio.to_thread(start_now, cluster, str(handle.slurm_id))
        result = await asyncio.wait_for(handle, 60)
    assert (result.data, result.attempts) == ("done", 2)


def announce_and_wait(pid: str, gate: str) -> str:
    tasks.write_number(pid, os.getpid())
    tasks.gate(gate)
    return "done"


async def test_a_signal_of_the_users(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A script that was sent USR2 and then fails has failed; one that has no trap was killed by it."""
    deaf = script(tmp_path / "deaf.sh", f"echo $$ >{tmp_path}/1\nsleep 60\n")
    trap = script(
        tmp_path / "trap.sh",
        f"trap 'echo saved; exit 5' USR2\necho $$ >{tmp_path}/0\nwhile :; do sleep 0.2; done\n",
    )
    jobs: list[SlurmJob[object]] = [SlurmJob(str(trap)), SlurmJob(str(deaf))]
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch(jobs)
        for index, handle in enumerate(batch):
            await asyncio.to_thread(number_in, tmp_path / str(index))
            await handle.wait_started()
            command = ("scancel", "-b", "-sUSR2", str(handle.slurm_id))
            await asyncio.to_thread(cluster.run, *command)
        failed, killed = [await asyncio.wait_for(handle, 60) for handle in batch]
    assert type(failed.error) is ht.JobFailed
    assert failed.exit_code == 5
    assert "saved" in str(failed.error)
    assert type(killed.error) is ht.JobCrashed
    assert "SIGUSR2" in str(killed.error)


async def test_an_unmet_dependency(slurm: Callable[..., ht.Slurm], cluster: SlurmCluster) -> None:
    """A job whose dependency fails is cancelled by Slurm, and the error says why."""
    wrap = ("--parsable", "--output=/dev/null", "--wrap=sleep 2; exit 1")
    first = await asyncio.to_thread(cluster.run, "sbatch", *wrap)
    job = SlurmJob(tasks.double, (1,), meta={"options": {"dependency": f"afterok:{first}"}})
    result = await result_of(slurm(), job)
    assert isinstance(result.error, ht.JobCancelled)
    assert f"its dependency (afterok:{first}) can never be met" in str(result.error)


# --- what we say ---------------------------------------------------------------------------------


async def test_a_slow_scancel(slurm: Callable[..., ht.Slurm], wrapped: Wrapper) -> None:
    """A job that we cancel was cancelled by us, also when Slurm has done it before scancel says so."""
    wrapped("scancel", '"$REAL" "$@"; R=$?; sleep 6; exit $R')
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever))
        await handle.wait_started()
        handle.cancel()
        result = await asyncio.wait_for(handle, 30)
    assert isinstance(result.error, ht.JobCancelled)
    assert "not by this scheduler" not in str(result.error)


async def test_stopped_by_name(slurm: Callable[..., ht.Slurm], tmp_path: Path) -> None:
    """An element that is stopped in the spool ends within seconds, without a word to Slurm."""
    path = script(tmp_path / "job.sh", f"echo $$ >{tmp_path}/0\nsleep 100\n")
    jobs = [SlurmJob(str(path)), SlurmJob(tasks.announce, (f"{tmp_path}/1",))]
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch(jobs)
        pids = [await asyncio.to_thread(number_in, tmp_path / name) for name in ("0", "1")]
        for directory in (tmp_path / "work").glob("*/s*"):
            command = shell.stop(str(directory), [0])
            await asyncio.to_thread(subprocess.run, ["sh", "-c", command], check=True)
        for handle in batch:
            result = await asyncio.wait_for(handle, 30)
            assert type(result.error) is ht.JobCrashed
        await until(lambda: not any(map(is_alive, pids)), 5)


@pytest.mark.parametrize("python", ["setsid", "srun -n1"])
async def test_python_behind_another_program(slurm: Callable[..., ht.Slurm], python: str) -> None:
    """What runs Python may make it the leader of a session."""
    result = await result_of(
        slurm(python=[*python.split(), sys.executable]), SlurmJob(tasks.double, (1,))
    )
    assert result.data == 2


async def test_any_names_in_the_environment(slurm: Callable[..., ht.Slurm]) -> None:
    """An environment that works locally works there too."""
    env = {"my.var": "it's", "ht_dir": "/nowhere"}
    job = SlurmJob(lambda: [os.environ[name] for name in env], env=env)
    assert (await result_of(slurm(), job)).data == ["it's", "/nowhere"]


async def test_no_requeue(slurm: Callable[..., ht.Slurm], cluster: SlurmCluster) -> None:
    """Jobs that aren't to be requeued are submitted as such, but for those that say otherwise."""
    jobs = [
        SlurmJob(tasks.double, (i,), meta={"options": {"hold": True, **own}})
        for i, own in enumerate(({}, {"requeue": True}))
    ]
    async with ht.Scheduler(slurm=slurm(options={"requeue": False})) as scheduler:
        for handle, wanted in zip(
            scheduler.dispatch(jobs), ("Requeue=0", "Requeue=1"), strict=True
        ):
            await until(lambda handle=handle: handle.slurm_id)  # type: ignore[misc]
            job = str(handle.slurm_id)
            assert wanted in await asyncio.to_thread(cluster.run, "scontrol", "show", "job", job)
