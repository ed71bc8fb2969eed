# ruff: noqa: F811 - fixtures are imported by their names
"""Other users of a cluster can't make this one run what they wrote."""

from __future__ import annotations

import asyncio
import pickle
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from login_node import LoginNode
from ssh_kit import cluster, connect, needs_login_node, node, slurm_at  # noqa: F401

import aiohypertunity as ht
from aiohypertunity._executors.slurm import shell, trust
from aiohypertunity._transports.local import LocalShell
from aiohypertunity._transports.protocol import Transport, Wanted
from aiohypertunity._transports.ssh import SSH
from aiohypertunity._wire import spool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from slurm_cluster import SlurmCluster

pytestmark = needs_login_node


@pytest.fixture
def place(cluster: SlurmCluster) -> Iterator[Path]:
    """A directory that every user can enter."""
    place = cluster.public / "place"
    place.mkdir(mode=0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture(params=["local", "ssh"])
def slurm(
    request: pytest.FixtureRequest,
    place: Path,
    node: LoginNode,
    cluster: SlurmCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Path], ht.Slurm]:
    """Makes a `Slurm` with a work directory, which belongs to whoever submits."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)

    def make(workdir: Path) -> ht.Slurm:
        workdir.mkdir(mode=0o755, exist_ok=True)
        if request.param == "local":
            return ht.Slurm(workdir=workdir)
        shutil.chown(workdir, node.user)
        return slurm_at(node, cluster, workdir=workdir)

    return make


def as_nobody(*argv: object) -> None:
    subprocess.run([*map(str, argv)], user="nobody", group="nogroup", cwd="/", check=True)


# --- Where others can write ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o775])
async def test_open_work_directory(
    slurm: Callable[[Path], ht.Slurm], place: Path, mode: int
) -> None:
    """A work directory in which others can write is refused, until the command that is named has run."""
    work = place / "it's work"
    configuration = slurm(work)
    work.chmod(mode)
    async with ht.Scheduler(1, slurm=configuration) as scheduler:
        [handle] = scheduler.dispatch(ht.SlurmJob(abs, (-1,)))
        error = (await handle).error
        assert type(error) is ht.TransportError
        assert list(work.iterdir()) == []
        subprocess.run(str(error).split("`")[1], shell=True, check=True)
        [handle] = scheduler.dispatch(ht.SlurmJob(abs, (-2,)))
        assert (await handle).data == 2


@pytest.mark.parametrize("shell_name", ["sh", "bash"])
def test_who_could_replace_it(place: Path, shell_name: str) -> None:
    """Every directory on the way counts, with its owner; the sticky bit is enough, and links are followed."""

    def found(path: Path) -> str:
        command = f"cd {shlex.quote(str(path))} && {trust.DIRECTORIES_COMMAND}"
        done = subprocess.run([shell_name, "-c", command], capture_output=True, text=True)
        return trust.unsafe(done.stdout) or ""

    inner = place / "a b" / "inner"
    inner.mkdir(parents=True, mode=0o700)
    assert found(inner) == ""
    inner.parent.chmod(0o1777)
    assert found(inner) == ""
    inner.parent.chmod(0o775)
    assert f"chmod g-w,o-w '{inner.parent}'" in found(inner)
    (place / "link").symlink_to(inner)
    assert f"others can write in {inner.parent} " in found(place / "link")
    inner.parent.chmod(0o755)
    assert found(place / "link") == ""
    place.chmod(0o777)
    assert f"others can write in {place} " in found(place / "link")
    place.chmod(0o755)
    shutil.chown(inner.parent, "nobody")
    assert f"{inner.parent} belongs to another user" in found(inner)


@pytest.mark.parametrize("listing", ["", "ls: cannot access '/'\n", "drwxr-xr-x 2 0 0\n"])
def test_unseen_directories_are_not_trusted(listing: str) -> None:
    """A listing that is missing or can't be understood is no proof."""
    assert trust.unsafe("") is not None
    mark = trust._MARK
    assert trust.unsafe(f"{mark} 0\n{listing}{mark} end\n") is not None


# --- A run's directory that was replaced ---------------------------------------------------------


class Plant:
    """A value whose loading leaves a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._path, "w")


def plant(run: Path, array: str, trace: Path) -> None:
    """As another user, put a directory in place of a run's that has a result for its first job."""
    facts = {"host": "n", "pid": 1, "started": 1.0, "finished": 2.0, "max_rss": 1, "python": "3"}
    reply = spool.Reply(b"value", pickle.dumps(Plant(trace)), (), facts)
    planted = run.parent / "planted"
    (planted / "s1").mkdir(parents=True)
    (planted / "s1" / "0.0.result").write_bytes(b"".join(spool.format_result(reply)))
    (planted / "s1" / f"0.0.on.{array}.n").touch()
    subprocess.run(["chown", "-R", "nobody", planted], check=True)
    as_nobody("mv", run, run.parent / "gone")
    as_nobody("mv", planted, run)


async def test_planted_result(
    slurm: Callable[[Path], ht.Slurm], place: Path, cluster: SlurmCluster
) -> None:
    """A result that another user planted, once the work directory was opened, is never unpickled."""
    work = place / "work"
    async with ht.Scheduler(1, slurm=slurm(work)) as scheduler:
        [handle] = scheduler.dispatch(ht.SlurmJob(time.sleep, (300,)))
        await handle.wait_started()
        work.chmod(0o777)
        [run] = work.iterdir()
        assert handle.slurm_id is not None
        await asyncio.to_thread(plant, run, handle.slurm_id.split("_")[0], place / "trace")
        result = await asyncio.wait_for(handle, 60)
        assert not (place / "trace").exists()
        assert type(result.error) is ht.ResultLost
        assert f"{run} is not a directory of this user's alone any more" in str(result.error)
    cluster.run("scancel", str(handle.slurm_id))
    subprocess.run(["rm", "-rf", work], check=True)
    await asyncio.to_thread(cluster.wait_idle, 30)


@pytest.fixture(params=["local", "ssh"])
async def transport(request: pytest.FixtureRequest, node: LoginNode) -> AsyncIterator[Transport]:
    """This machine, or the login node with a user of its own."""
    one: Transport = LocalShell()
    if request.param == "ssh":
        one = SSH(f"{node.user}@{node.host}:{node.port}", connect(node), lambda event: None)
    yield one
    await one.aclose()


async def test_guarded_reading(transport: Transport, place: Path) -> None:
    """Files are read only below a directory of one's own that is no link, and that others can't write in."""
    place.chmod(0o1777)
    guard = f"{place}/it's mine"
    await transport.run(
        f"mkdir -m 755 {shlex.quote(guard)}; echo hello >{shlex.quote(guard)}/x", timeout=10
    )

    async def read() -> list[object]:
        return list(await transport.get([Wanted(f"{guard}/x"), Wanted("/nowhere")], guard=guard))

    assert await read() == [b"hello\n", None]
    for mode in (0o775, 0o757):
        Path(guard).chmod(mode)
        with pytest.raises(ht.TransportError, match="this user's alone"):
            await read()
    Path(guard).chmod(0o755)
    Path(guard).rename(f"{place}/moved")
    assert await read() == [None, None]
    await transport.run(f"ln -s {place}/moved {shlex.quote(guard)}", timeout=10)
    with pytest.raises(ht.TransportError, match="this user's alone"):
        await read()


async def test_planted_name(place: Path) -> None:
    """A directory's name is nothing that the watcher of the spool would run."""
    (place / "s1;echo >trace").mkdir()
    (place / "s2").mkdir()
    (place / "s2" / "0.0.run").touch()
    async with LocalShell().watch(shell.watcher(str(place))) as lines:
        async for line in lines:
            assert line == "s2 0.0.run"
            break
        (place / "s2" / "1.0.run").touch()
        async for line in lines:
            assert line == "s2 0.0.run 1.0.run"
            break
    assert not (place / "trace").exists()
