# ruff: noqa: F811 - fixtures are imported by their names
"""Jobs on a cluster that this machine isn't part of."""

from __future__ import annotations

import importlib
import os
import pickle
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle
import pytest
from helpers import script
from slurm_kit import result_of, results_of
from ssh_kit import cluster, needs_login_node, node, python_for_all, slurm_at  # noqa: F401

import aiohypertunity as ht
from aiohypertunity import sync
from aiohypertunity._cli.doctor import examine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from login_node import LoginNode
    from slurm_cluster import SlurmCluster

pytestmark = needs_login_node


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """What is defined here isn't installed on the cluster."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def whoami(number: int) -> tuple[int, str, str]:
    import getpass

    print("spoken on the node")
    return number, getpass.getuser(), os.getcwd()


def big(n_bytes: int) -> bytes:
    return bytes(range(256)) * (n_bytes // 256)


class Apart:
    """Something that keeps its content out of its pickle."""

    def __init__(self, content: bytes) -> None:
        self.content = bytes(content)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return Apart, (pickle.PickleBuffer(self.content),)


def big_apart(n_bytes: int) -> Apart:
    return Apart(big(n_bytes))


async def test_callable(node: LoginNode, cluster: SlurmCluster) -> None:
    """A callable runs there as the user who logged in, at home, and leaves nothing behind."""
    result = await result_of(slurm_at(node, cluster), ht.SlurmJob(whoami, (7,)))
    assert result.data == (7, node.user, str(node.home))
    assert result.stdout == "spoken on the node\n"
    assert result.host in cluster.nodes
    assert node.run("ls -A .aiohypertunity") == ""


async def test_directory(node: LoginNode, cluster: SlurmCluster) -> None:
    """A job runs in a directory of the cluster, and says so if there's none of that name."""
    node.run("mkdir -p 'it''s here'")
    there = ht.SlurmJob(os.getcwd, cwd=f"{node.home}/its here")
    nowhere = ht.SlurmJob(os.getcwd, cwd=f"{node.home}/nowhere")
    found, lost = await results_of(slurm_at(node, cluster), there, nowhere)
    assert found.data == f"{node.home}/its here"
    assert f"no directory {node.home}/nowhere" in str(lost.error)


async def test_mixed(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """Local callables, local scripts, and all kinds of Slurm jobs come in one collect."""
    local = script(tmp_path / "say.sh", "echo here; exit 3")
    module = script(tmp_path / "work.py", "def double(x):\n    return 2 * x\n")
    jobs = [
        ht.Job(abs, (-1,)),
        ht.Job(local),
        ht.SlurmJob(local),
        ht.SlurmJob(abs, (-2,)),
        ht.SlurmJob(f"{module}:double", (21,)),
    ]
    results = await results_of(slurm_at(node, cluster), *jobs)
    assert [r.data for r in results if r.ok] == [1, 2, 42]
    assert [(r.exit_code, r.stdout) for r in results if not r.ok] == [(3, "here\n")] * 2


async def test_functions_fail_alike(node: LoginNode, cluster: SlurmCluster) -> None:
    """What a callable raises there is raised here, with its traceback."""
    result = await result_of(slurm_at(node, cluster), ht.SlurmJob(int, ("x",)))
    assert isinstance(result.error, ht.JobFailed)
    assert isinstance(result.error.__cause__, ValueError)


async def test_scripts_are_staged_once(
    node: LoginNode, cluster: SlurmCluster, tmp_path: Path
) -> None:
    """A script goes there once, with the files it needs; it writes its result and says its words."""
    path = script(
        tmp_path / "my script's.py",
        """
        import pickle, sys
        from pathlib import Path
        number, output = sys.argv[1:]
        print(Path(__file__).with_name("data.txt").read_text())
        pickle.dump((__file__, int(number)), open(output, "wb"))
        """,
    )
    (tmp_path / "data.txt").write_text("beside it")
    slurm = slurm_at(node, cluster, files=[tmp_path / "data.txt"])
    results = await results_of(slurm, *(ht.SlurmJob(path, (i,)) for i in range(5)))
    assert [r.data[1] for r in results] == [0, 1, 2, 3, 4]
    assert len({r.data[0] for r in results}) == 1
    assert {r.stdout for r in results} == {"beside it\n"}


async def test_helper_program(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """A program that a script needs beside it can be run there."""
    path = script(tmp_path / "job.sh", '#!/bin/sh\n"${0%/*}/bin/helper"\n', mode=0o755)
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "helper", "#!/bin/sh\necho helped\n", mode=0o755)
    slurm = slurm_at(node, cluster, files=[tmp_path / "bin"])
    assert (await result_of(slurm, ht.SlurmJob(path))).stdout == "helped\n"


async def test_edited_script(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """Each dispatch runs the script as it was then."""
    path = tmp_path / "job"
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
        handles = []
        for word in ("old", "new"):
            script(path, f"#!/bin/sh\necho {word}\n", mode=0o755)
            handles += scheduler.dispatch(ht.SlurmJob(path))
        path.unlink()
        assert [(await handle).stdout for handle in handles] == ["old\n", "new\n"]


async def test_remote_script(node: LoginNode, cluster: SlurmCluster) -> None:
    """A script that lies there is run where it lies."""
    path = f"{node.home}/it's here.sh"
    node.run('cat > "it\'s here.sh"; chmod +x *.sh', input='#!/bin/sh\necho "$0" "$1"; exit 4\n')
    job = ht.SlurmJob(f"remote:{path}", ("a $HOME 'b' \"c\" !d",), meta={"output": "env"})
    result = await result_of(slurm_at(node, cluster), job)
    assert (result.exit_code, result.stdout) == (4, f"{path} a $HOME 'b' \"c\" !d\n")


async def test_missing_module(node: LoginNode, cluster: SlurmCluster) -> None:
    """A module of the user's that isn't there is named, and how to send it."""
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    try:
        result = await result_of(slurm_at(node, cluster), ht.SlurmJob(whoami, (1,)))
    finally:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
    assert isinstance(result.error, ht.PayloadError)
    assert f"no module '{__name__}'" in str(result.error)
    assert "register_pickle_by_value" in str(result.error)


async def test_module_on_a_shared_disk(
    node: LoginNode, cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the user's that nodes can import isn't sent, and needs no word."""
    (tmp_path / "lent.py").write_text("def triple(x):\n    return 3 * x\n")
    node.run("mkdir modules && cat >modules/lent.py", input=(tmp_path / "lent.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    triple = importlib.import_module("lent").triple
    setup = ['export PYTHONPATH="$HOME/modules:$PYTHONPATH"']
    assert (
        await result_of(slurm_at(node, cluster, setup=setup), ht.SlurmJob(triple, (2,)))
    ).data == 6
    node.run("rm -rf modules")


async def test_another_python(node: LoginNode, cluster: SlurmCluster) -> None:
    """Under another minor version, what has a name works; what travels by value works, or says why not."""
    own = sys.version_info[1]
    names = [f"python3.{minor}" for minor in range(11, 16) if minor != own]
    other = next(filter(None, map(_found, names)), None)
    if other is None:
        pytest.skip("no other Python here")
    python = python_for_all(cluster, other)
    libraries = shlex.quote(str(Path(python).parents[1] / "lib"))
    named, by_value = await results_of(
        slurm_at(node, cluster, python=python, setup=[f"export LD_LIBRARY_PATH={libraries}"]),
        ht.SlurmJob(abs, (-1,)),
        ht.SlurmJob(whoami, (1,)),
    )
    assert named.data == 1
    if by_value.error is not None:
        assert isinstance(by_value.error, ht.PayloadError)
        assert f"3.{own}" in str(by_value.error)
        assert Path(other).name.removeprefix("python") in str(by_value.error)


def _found(name: str) -> str | None:
    """A Python, in whatever version pyenv would have it."""
    version = name.removeprefix("python")
    there = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [str(path) for path in there.glob(f"{version}.*/bin/{name}")]
    return found[0] if found else shutil.which(name)


async def test_large_result(node: LoginNode, cluster: SlurmCluster) -> None:
    """Large results come whole, inside their pickle or outside of it."""
    jobs = [ht.SlurmJob(big, (20_000_000,)), ht.SlurmJob(big_apart, (20_000_000,))]
    results = await results_of(slurm_at(node, cluster), *jobs)
    assert results[0].data == results[1].data.content == big(20_000_000)


async def test_cancel(node: LoginNode, cluster: SlurmCluster) -> None:
    """A job that runs there is cancelled, and gone from Slurm."""
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
        [handle] = scheduler.dispatch(ht.SlurmJob(time.sleep, (1000,)))
        await handle.wait_started()
        handle.cancel()
        assert (await handle).status is ht.Status.CANCELLED
    cluster.wait_idle(20)


def test_blocking_twin(node: LoginNode, cluster: SlurmCluster) -> None:
    """The blocking scheduler does the same."""
    with sync.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
        scheduler.dispatch([ht.SlurmJob(abs, (-3,)), ht.Job(abs, (-4,))])
        assert [r.data for r in scheduler.collect(n_results=2, timeout=60)] == [3, 4]


async def test_two_schedulers(node: LoginNode, cluster: SlurmCluster) -> None:
    """Two schedulers on one cluster don't take each other's results."""
    async with (
        ht.Scheduler(1, slurm=slurm_at(node, cluster)) as one,
        ht.Scheduler(1, slurm=slurm_at(node, cluster)) as other,
    ):
        for scheduler, sign in ((one, 1), (other, -1)):
            scheduler.dispatch([ht.SlurmJob(int, (sign * i,)) for i in range(10)])
        for scheduler, sign in ((one, 1), (other, -1)):
            data = [r.data async for r in scheduler.collect(timeout=60, ordered=True)]
            assert data == [sign * i for i in range(10)]


async def test_doctor(node: LoginNode, cluster: SlurmCluster) -> None:
    """The doctor examines a cluster across SSH, and says what is wrong with one that isn't there."""
    checks = {check.name: check for check in await examine(slurm_at(node, cluster))}
    assert [check for check in checks.values() if check.ok is False] == []
    assert str(node.home) in checks["work directory"].found
    assert "Python 3." in checks["a job"].found
    [*_, last] = await examine(
        slurm_at(node, cluster, connect={"config": None, "client_keys": None})
    )
    assert (last.name, last.ok) == ("connection", False)
    assert "known_hosts" in last.found
