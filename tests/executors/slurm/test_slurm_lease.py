"""Drivers that are killed: by SIGTERM they leave first; what SIGKILL leaves, the next start ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tasks
from helpers import PATIENCE, driver, until
from login_node import LoginNode
from slurm_kit import (  # noqa: F401 - fixtures are found by their names
    cluster_fixture,
    needs_slurm,
    result_of,
    slurm_fixture,
)
from ssh_kit import connect, environment, python_for_all

import aiohypertunity as ht
from aiohypertunity import SlurmJob
from aiohypertunity._executors.slurm import lease, sweeper
from aiohypertunity._executors.slurm.lease import Driver, Fate

if TYPE_CHECKING:
    from collections.abc import Callable

    from slurm_cluster import SlurmCluster

pytestmark = needs_slurm

ASYNC = """
    import asyncio, json, signal, sys, time
    import aiohypertunity as ht

    async def main(options):
        {before}
        async with ht.Scheduler(1, slurm=ht.Slurm(**options)) as scheduler:
            handles = scheduler.dispatch([ht.SlurmJob(time.sleep, (600,)) for _ in range(2)])
            for handle in handles:
                await handle.wait_started()
            print("running", flush=True)
            {after}
            async for result in scheduler.collect():
                print("collected", flush=True)
    asyncio.run(main(json.loads(sys.argv[1])))
"""
TWIN = """
    import json, signal, sys, time
    import aiohypertunity as ht

    {before}
    with ht.sync.Scheduler(1, slurm=ht.Slurm(**json.loads(sys.argv[1]))) as scheduler:
        handles = scheduler.dispatch([ht.SlurmJob(time.sleep, (600,)) for _ in range(2)])
        for handle in handles:
            handle.wait_started()
        print("running", flush=True)
        {after}
        for result in scheduler.stream():
            print("collected", flush=True)
"""


def running(text: str, options: dict[str, Any], before: str = "", after: str = "") -> Any:
    """A driver of two jobs that run."""
    made = text.format(before=before or "pass", after=after or "pass")
    return driver(made, json.dumps(options, default=str))


def wait_running(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n", process.communicate()


def jobs(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%j").split()


@pytest.fixture
def options(slurm: Callable[..., ht.Slurm]) -> dict[str, Any]:
    """Of a `Slurm` for the test cluster, with a work directory that is empty in the end."""
    return {"workdir": str(slurm().workdir)}


# --- SIGTERM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ASYNC, TWIN], ids=["async", "twin"])
def test_sigterm(cluster: SlurmCluster, options: dict[str, Any], text: str) -> None:
    """The driver's jobs end in Slurm and its files go; then it dies of SIGTERM, with no result of that shown."""
    with running(text, options) as process:
        wait_running(process)
        process.terminate()
        process.terminate()
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGTERM, stderr
    assert stdout == ""
    assert stderr == ""
    cluster.wait_idle(30)
    assert list(Path(options["workdir"]).iterdir()) == []


HANDLER = "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))"
LOOP_HANDLER = (
    "asyncio.get_running_loop().add_signal_handler("
    "signal.SIGTERM, lambda: print('mine', flush=True))"
)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    ("text", "handler"),
    [(ASYNC, HANDLER), (ASYNC, LOOP_HANDLER), (TWIN, HANDLER)],
    ids=["async", "loop", "twin"],
)
def test_own_handler(
    cluster: SlurmCluster, options: dict[str, Any], text: str, handler: str, where: str
) -> None:
    """A handler of the user's for SIGTERM has the last word, whenever it was set."""
    with running(text, options, **{where: handler}) as process:
        wait_running(process)
        process.terminate()
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    cluster.wait_idle(30)


async def test_sigterm_is_given_back(slurm: Callable[..., ht.Slurm]) -> None:
    """SIGTERM has its default action before there is a Slurm job, and after its scheduler is closed."""
    async with ht.Scheduler(1, slurm=slurm()) as scheduler:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        [handle] = scheduler.dispatch(SlurmJob(tasks.double, (1,)))
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert (await handle).data == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with ht.sync.Scheduler(1, slurm=slurm()) as twin:
        [sync_handle] = twin.dispatch(SlurmJob(tasks.double, (2,)))
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert sync_handle.result(PATIENCE).data == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_sigterm_of_a_forked_child(slurm: Callable[..., ht.Slurm]) -> None:
    """A child that the driver forked dies of SIGTERM at once, and takes nothing of the driver's with it."""
    async with ht.Scheduler(1, slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.double, (1,)))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"x")  # before this, Python itself drops signals for a new child
            time.sleep(60)
            os._exit(0)
        os.close(writer)
        await asyncio.to_thread(os.read, reader, 1)
        os.close(reader)
        os.kill(child, signal.SIGTERM)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert (await handle).data == 2


# --- SIGKILL -------------------------------------------------------------------------------------


async def test_next_start_sweeps(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, options: dict[str, Any]
) -> None:
    """What a driver that was killed left in Slurm and on the disk, the next start in its work directory ends."""
    with running(ASYNC, options) as process:
        await asyncio.to_thread(wait_running, process)
        process.kill()
    [run] = set(jobs(cluster))
    left = Path(options["workdir"], run)
    assert left.exists()
    async with ht.Scheduler(1, slurm=slurm()) as scheduler:
        scheduler.dispatch(SlurmJob(time.sleep, (600,)))
        await until(lambda: not left.exists())
        await until(lambda: run not in jobs(cluster))
    cluster.wait_idle(30)


async def test_a_start_sweeps_once(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep ends, and is not begun again while jobs run."""
    sweeps = []
    run = sweeper.Sweeper.run

    async def counted(self: sweeper.Sweeper) -> None:
        sweeps.append(self)
        await run(self)

    monkeypatch.setattr(sweeper.Sweeper, "run", counted)
    async with ht.Scheduler(1, slurm=slurm()) as scheduler:
        await scheduler.dispatch(SlurmJob(time.sleep, (1,)))[0]
    assert len(sweeps) == 1


async def test_living_driver_is_left_alone(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, options: dict[str, Any]
) -> None:
    """Another driver in the same work directory that runs, or is stopped, loses nothing; nothing is said of it."""
    with running(ASYNC, options) as process:
        await asyncio.to_thread(wait_running, process)
        [run] = set(jobs(cluster))
        process.send_signal(signal.SIGSTOP)
        path = Path(options["workdir"], run, "lease")
        about = json.loads(path.read_text())
        path.write_text(json.dumps(about | {"heartbeat": 0}))
        assert (await result_of(slurm(), SlurmJob(time.sleep, (1,)))).ok
        assert jobs(cluster).count(run) == 2
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.communicate, timeout=PATIENCE)
    cluster.wait_idle(30)


def left_behind(workdir: Path, run: str, **other: object) -> Path:
    """The directory of a run whose driver is gone, but for what its lease says otherwise."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    about = json.loads(lease.format_lease(run, lease.this_driver(), keep=False))
    directory = workdir / run
    (directory / "s1").mkdir(parents=True, mode=0o700)
    (directory / "s1" / "log.0").touch()
    (directory / "s1" / "calls").touch()
    (directory / "lease").write_text(json.dumps(about | {"pid": gone.pid, "heartbeat": 0} | other))
    return directory


async def test_what_is_swept(slurm: Callable[..., ht.Slurm], caplog: Any) -> None:
    """Only what is proven: another machine's run is reported, and one of another kind left alone."""
    workdir = Path(str(slurm().workdir))
    names = [f"ht-{number:012x}" for number in range(7)]
    gone = left_behind(workdir, names[0])
    booted = left_behind(workdir, names[1], boot="another", pid=os.getpid())
    kept = left_behind(workdir, names[2], keep=True)
    elsewhere = left_behind(workdir, names[3], host="elsewhere")
    others = [
        left_behind(workdir, names[4], owner="run"),
        left_behind(workdir, names[5], version=2),
        left_behind(workdir, names[6], token=names[0]),
    ]
    with caplog.at_level(logging.WARNING, "aiohypertunity.slurm"):
        for _ in range(2):
            async with ht.Scheduler(1, slurm=slurm()) as scheduler:
                [handle] = scheduler.dispatch(SlurmJob(tasks.double, (1,)))
                await until(
                    lambda: not any(map(Path.exists, (gone, booted, kept / "s1" / "calls")))
                )
                assert (await handle).data == 2
                await asyncio.sleep(1)
    assert (kept / "s1" / "log.0").exists()
    assert not (kept / "lease").exists()
    assert all((path / "s1" / "calls").exists() for path in (elsewhere, *others))
    said = [record.message for record in caplog.records if "left behind" in record.message]
    assert len(said) == 1
    assert f"`scancel --name={names[3]}; rm -r {elsewhere}`" in said[0]
    subprocess.run(["rm", "-r", kept, elsewhere, *others], check=True)


@pytest.mark.parametrize(
    ("there", "start", "fate"),
    [
        ({}, "7", Fate.ALIVE),
        ({}, None, Fate.GONE),
        ({}, "8", Fate.GONE),
        ({}, "", Fate.UNKNOWN),
        ({"boot": "b2"}, "7", Fate.GONE),
        ({"boot": ""}, None, Fate.UNKNOWN),
        ({"machine": "m2"}, None, Fate.UNKNOWN),
        ({"machine": "m2", "boot": "b2"}, None, Fate.UNKNOWN),
        ({"machine": ""}, None, Fate.UNKNOWN),
        ({"host": "h2", "boot": "b2"}, None, Fate.UNKNOWN),
        ({"namespace": "n2"}, None, Fate.UNKNOWN),
        ({"start": ""}, None, Fate.UNKNOWN),
    ],
)
def test_proof(there: dict[str, str], start: str | None, fate: Fate) -> None:
    """A driver is gone if its machine was booted since, or has no such process; everything else is no proof."""
    here = Driver("h", "m", "b", "n", 1, "1")
    found = Driver("h", "m", "b", "n", 5, "7")._replace(**there)  # type: ignore[arg-type]
    assert lease.judge(found, here, lambda pid: start) is fate


def test_start_of_a_process() -> None:
    """A process has a start time as long as it runs, and another one than those before it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        own = lease.start_of(os.getpid())
        assert own
        assert int(own) <= int(lease.start_of(process.pid) or 0)
        process.kill()
    assert lease.start_of(process.pid) is None


async def test_lease_is_renewed(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While jobs run, the heartbeat in the lease goes on."""
    monkeypatch.setattr("aiohypertunity._executors.slurm.watcher._LEASE", 0.5)
    async with ht.Scheduler(1, slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(time.sleep, (600,)))
        await handle.wait_started()
        [path] = Path(str(slurm().workdir)).glob("*/lease")
        first = json.loads(path.read_text())
        assert first["pid"] == os.getpid()
        await until(lambda: json.loads(path.read_text())["heartbeat"] > first["heartbeat"])


async def test_sweeping_across_ssh(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The lease lies on the cluster and names the driver's machine, from which the next start sweeps."""
    with LoginNode(tmp_path, env=environment(cluster)) as node:
        options = {
            "host": f"{node.user}@{node.host}:{node.port}",
            "connect": connect(node),
            "python": python_for_all(cluster),
        }
        with running(ASYNC, options) as process:
            await asyncio.to_thread(wait_running, process)
            [run] = set(jobs(cluster))
            about = json.loads((node.home / ".aiohypertunity" / run / "lease").read_text())
            assert (about["host"], about["pid"]) == (os.uname().nodename, process.pid)
            process.kill()
        async with ht.Scheduler(1, slurm=ht.Slurm(**options)) as scheduler:  # type: ignore[arg-type]
            scheduler.dispatch(SlurmJob(time.sleep, (600,)))
            await until(lambda: run not in jobs(cluster))
            await until(lambda: not (node.home / ".aiohypertunity" / run).exists())
        await asyncio.to_thread(cluster.wait_idle, 30)
