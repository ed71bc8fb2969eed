"""What the tests across SSH share: one cluster, and one login node with an ordinary user."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from login_node import LoginNode
from slurm_cluster import SlurmCluster, missing

import aiohypertunity as ht

if TYPE_CHECKING:
    from collections.abc import Iterator

WHAT_IS_MISSING = missing()
if WHAT_IS_MISSING and os.environ.get("CI") == "true":
    raise RuntimeError(WHAT_IS_MISSING)
needs_login_node = [
    pytest.mark.slurm,
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.skipif(WHAT_IS_MISSING is not None, reason=str(WHAT_IS_MISSING)),
]


def environment(cluster: SlurmCluster) -> dict[str, str]:
    """What sessions on a login node of the cluster find: Slurm, and cloudpickle."""
    site = cluster.public / "site"
    if not site.exists():
        source = Path(cloudpickle.__file__).parent
        shutil.copytree(source, site / "cloudpickle", ignore=shutil.ignore_patterns("__pycache__"))
    return {**cluster.env, "PYTHONPATH": str(site)}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def node(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoginNode]:
    with LoginNode(tmp_path_factory.mktemp("login"), env=environment(cluster)) as node:
        yield node


@functools.cache
def python_for_all(cluster: SlurmCluster, program: str = sys.executable) -> str:
    """A Python of a program's minor version that an ordinary user may run; a copy of it if need be."""
    facts = "import sys; print(*sys.version_info[:2], sep='.'); print(sys.base_prefix)"
    version, prefix = subprocess.check_output([program, "-c", facts], text=True).split()
    for candidate in (os.path.realpath(program), f"/usr/bin/python{version}"):
        with contextlib.suppress(OSError):
            done = subprocess.run([candidate, "-c", ""], user="nobody", cwd="/", check=False)
            if done.returncode == 0:
                return candidate
    copy = cluster.public / f"python{version}"
    ignored = shutil.ignore_patterns(
        "site-packages", "test", "tests", "*.a", "__pycache__", "idlelib"
    )
    for part in (f"lib/python{version}", "bin"):
        shutil.copytree(Path(prefix, part), copy / part, ignore=ignored, symlinks=True)
    for library in Path(prefix, "lib").glob("libpython*.so*"):
        shutil.copy(library, copy / "lib")
    return f"{copy}/bin/python{version}"


def connect(node: LoginNode) -> dict[str, Any]:
    """Options of a connection that knows nothing of this machine's own configuration."""
    files = {"client_keys": [str(node.client_key)], "known_hosts": str(node.known_hosts)}
    return {**files, "config": None, "agent_path": None}


def slurm_at(
    node: LoginNode, cluster: SlurmCluster, port: int | None = None, **options: Any
) -> ht.Slurm:
    """The cluster, as seen from outside."""
    options.setdefault("connect", connect(node))
    options.setdefault("python", python_for_all(cluster))
    return ht.Slurm(f"{node.user}@{node.host}:{port or node.port}", **options)


def use_alias(node: LoginNode, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `login.example.edu` a name of the login node, in the configuration of a user at home there."""
    settings = home / ".ssh" / "config"
    settings.parent.mkdir()
    settings.write_text(
        f"""
        Host login.example.edu
            HostName {node.host}
            Port {node.port}
            IdentityFile {node.client_key}
            UserKnownHostsFile {node.known_hosts}
        """
    )
    monkeypatch.setenv("HOME", str(home))
