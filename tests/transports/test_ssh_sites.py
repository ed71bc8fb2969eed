# ruff: noqa: F811 - fixtures are imported by their names
"""Login nodes are odd in many ways, and none of them matters; what would be unsafe is refused."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from helpers import script
from login_node import Link, LoginNode
from slurm_kit import result_of, results_of
from ssh_kit import cluster, connect, environment, needs_login_node, node, slurm_at  # noqa: F401

import aiohypertunity as ht

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slurm_cluster import SlurmCluster

pytestmark = needs_login_node


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """What is defined here isn't installed on the cluster."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def big(n_bytes: int) -> bytes:
    return bytes(n_bytes)


async def works(slurm: ht.Slurm, tmp_path: Path) -> None:
    """Callables, a script, and a result that is too large to travel with others."""
    path = script(tmp_path / "say.sh", "echo said")
    jobs = [*(ht.SlurmJob(abs, (-i,)) for i in range(5)), ht.SlurmJob(path)]
    *numbers, said, large = await results_of(slurm, *jobs, ht.SlurmJob(big, (9_000_000,)))
    assert [r.data for r in numbers] == list(range(5))
    assert said.stdout == "said\n"
    assert large.data == bytes(9_000_000)


def dropping(cluster: SlurmCluster) -> str:
    """A command to force on a user that drops every third channel."""
    path = cluster.public / "drop"
    text = """\
        #!/bin/sh
        echo >>~/channels
        [ $(($(wc -l <~/channels) % 3)) = 0 ] && kill -9 $$
        exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"
        """
    return str(script(path, text, mode=0o755))


@pytest.mark.parametrize("site", ["one channel", "two channels", "no SFTP", "drops channels"])
async def test_server(cluster: SlurmCluster, tmp_path: Path, site: str) -> None:
    """A server that takes few channels, drops some, or has no SFTP."""
    options: dict[str, str | None] = {
        "one channel": {"MaxSessions": "1"},
        "two channels": {"MaxSessions": "2"},
        "no SFTP": {"Subsystem": None},
        "drops channels": {"ForceCommand": dropping(cluster)},
    }[site]
    with LoginNode(tmp_path, env=environment(cluster), options=options) as odd:
        if site == "drops channels":
            odd.run(":")  # the first of three
        await works(slurm_at(odd, cluster), tmp_path)


@pytest.mark.parametrize("shell", ["bash", "tcsh", "fish"])
async def test_login_shell(cluster: SlurmCluster, tmp_path: Path, shell: str) -> None:
    """Another login shell, a banner, and rc files that print."""
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"no {shell} here")
    banner = tmp_path / "banner"
    banner.write_text("Welcome! All of this is yours.\nsbatch: not found on PATH\n")
    options = {"Banner": str(banner)}
    with LoginNode(tmp_path, env=environment(cluster), options=options, shell=path) as odd:
        noise = "echo s1 5.0.end.1.0; echo 12345; echo 'sbatch: invalid' >/dev/stderr\n"
        config = odd.home / ".config" / "fish"
        config.mkdir(parents=True)
        for rc in (odd.home / ".bashrc", odd.home / ".tcshrc", config / "config.fish"):
            rc.write_text(noise)
        assert "12345" in odd.run("echo ok")
        subprocess.run(["chown", "-R", odd.user, str(odd.home)], check=True)
        await works(slurm_at(odd, cluster), tmp_path)


async def test_sbatch_is_not_on_path(cluster: SlurmCluster, tmp_path: Path) -> None:
    """What makes Slurm available is said by `setup`; without it the error says what is missing."""
    bare = cluster.public / "bare"
    bare.mkdir()
    for name in ("sh", "bash", "tar", "find", "tail", "mkdir", "rm", "sleep", "cat", "chmod"):
        (bare / name).symlink_to(f"/bin/{name}")
    env = {**environment(cluster), "PATH": str(bare)}
    with LoginNode(tmp_path, env=env) as odd:
        job = ht.SlurmJob(abs, (-1,))
        result = await result_of(slurm_at(odd, cluster), job)
        assert type(result.error) is ht.SubmitError
        assert "no sbatch on PATH" in str(result.error)
        slurm = slurm_at(odd, cluster, setup=["PATH=/usr/bin:/bin", "echo noise"])
        assert (await result_of(slurm, job.replace())).data == 1


async def test_slow_link(node: LoginNode, cluster: SlurmCluster) -> None:
    """A link with a delay of a fifth of a second each way."""
    with Link(node.port) as link:
        link.delay = 0.2
        assert (
            await result_of(slurm_at(node, cluster, link.port), ht.SlurmJob(abs, (-1,)))
        ).data == 1


async def test_disk_is_full(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """A disk that is full is named by the error of the job that it was too small for."""
    small = cluster.public / "small"
    small.mkdir()
    mount = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size=2m,mode=700,uid={node.run('id -u')}",
        "tmpfs",
        str(small),
    ]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        slurm = slurm_at(node, cluster, workdir=small)
        async with ht.Scheduler(1, slurm=slurm) as scheduler:
            [handle] = scheduler.dispatch(ht.SlurmJob(len, (os.urandom(4_000_000),)))
            result = await handle
            assert type(result.error) is ht.TransportError
            assert "disk is full" in str(result.error)
            assert (await scheduler.dispatch(ht.SlurmJob(abs, (-1,)))[0]).data == 1
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


async def test_alias_and_jump(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """An alias of OpenSSH's configuration gives host, port, user, key, known hosts and a jump host."""
    config = script(
        tmp_path / "config",
        f"""
        Host cluster gate
            HostName 127.0.0.1
            Port {node.port}
            User {node.user}
            IdentityFile {node.client_key}
            UserKnownHostsFile {node.known_hosts}
        Host cluster
            ProxyJump gate
        """,
    )
    options = {"config": str(config), "agent_path": None}
    slurm = ht.Slurm("cluster", connect=options, python=slurm_at(node, cluster).python)
    assert (await result_of(slurm, ht.SlurmJob(abs, (-1,)))).data == 1


async def test_unknown_host(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """An unknown host is refused with the line that would add it; with that line it's known."""
    known = tmp_path / "known_hosts"
    known.touch()
    slurm = slurm_at(node, cluster, connect={**connect(node), "known_hosts": str(known)})
    result = await result_of(slurm, ht.SlurmJob(abs, (-1,)))
    assert type(result.error) is ht.TransportError
    assert f"ssh-keyscan -p {node.port} 127.0.0.1" in str(result.error)
    known.write_text(str(result.error).splitlines()[-1] + "\n")
    assert (await result_of(slurm, ht.SlurmJob(abs, (-1,)))).data == 1


async def test_another_key(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """A host that shows another key than it did is refused."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True
    )
    known = tmp_path / "known_hosts"
    known.write_text(f"* {(tmp_path / 'key.pub').read_text()}")
    slurm = slurm_at(node, cluster, connect={**connect(node), "known_hosts": str(known)})
    result = await result_of(slurm, ht.SlurmJob(abs, (-1,)))
    assert type(result.error) is ht.TransportError
    assert "has CHANGED" in str(result.error)
    assert f"{known}, line 1" in str(result.error)
    assert "add this line" not in str(result.error)


def test_trusting_anybody_is_refused() -> None:
    """Nothing turns off the check of host keys."""
    with pytest.raises(ValueError, match="known_hosts"):
        ht.Slurm("somewhere", connect={"known_hosts": None})


async def test_no_such_host(cluster: SlurmCluster) -> None:
    """A host that doesn't exist fails its job at once."""
    slurm = ht.Slurm("nobody@no-such-host.invalid", connect={"config": None, "agent_path": None})
    result = await result_of(slurm, ht.SlurmJob(abs, (-1,)))
    assert type(result.error) is ht.TransportError
    assert "no-such-host.invalid" in str(result.error)


@pytest.mark.parametrize("method", ["PasswordAuthentication", "KbdInteractiveAuthentication"])
async def test_code(
    cluster: SlurmCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """A password or code is asked for once; a wrong one isn't tried again; none is ever told."""
    caplog.set_level(logging.DEBUG)
    options = {method: "yes", "PubkeyAuthentication": "no"}
    if method.startswith("Kbd"):
        options["UsePAM"] = "yes"
    asked = []
    words = ["Wr0ng-code", "R1ght-code"]

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return words[len(asked) - 1]

    with LoginNode(tmp_path, env=environment(cluster), options=options) as odd:
        subprocess.run(["chpasswd"], input=f"{odd.user}:{words[1]}", text=True, check=True)
        login = {"known_hosts": str(odd.known_hosts), "prompt": answer, "config": None}
        login |= {"client_keys": None, "agent_path": None}
        slurm = slurm_at(odd, cluster, connect=login)
        async with ht.Scheduler(1, slurm=slurm) as scheduler:
            stream = scheduler.events()
            first = await scheduler.dispatch(ht.SlurmJob(abs, (-1,)))[0]
            assert type(first.error) is ht.TransportError
            assert "doesn't let us in" in str(first.error)
            assert len(asked) == 1
            second = await scheduler.dispatch(ht.SlurmJob(abs, (-2,)))[0]
            assert second.data == 2
            assert len(asked) == 2
        told = (
            f"{slurm!r} {first!r} {first.error!r} {caplog.text} {[repr(e) async for e in stream]}"
        )
    assert not [word for word in words if word in told]


async def test_spool_is_private(node: LoginNode, cluster: SlurmCluster) -> None:
    """Nobody else can read what lies on the cluster."""
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
        [handle] = scheduler.dispatch(ht.SlurmJob(__import__("time").sleep, (2,)))
        await handle.wait_started()
        # Logs and markers have the job's own umask, in a directory that is private.
        markers = "! -name 'log.*' ! -name '*.on.*' ! -name 'claim.*'"
        found = node.run(f"find .aiohypertunity -perm /077 {markers}")
        modes = node.run("stat -c %a .aiohypertunity .aiohypertunity/*")
        handle.cancel()
    assert found == ""
    assert set(modes.split()) == {"700"}


def test_asyncssh_is_imported_late() -> None:
    """Who uses no SSH doesn't wait for asyncssh."""
    code = "import aiohypertunity, sys; aiohypertunity.Slurm('a'); print('asyncssh' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout == "False\n"


def test_secrets_are_not_in_a_repr() -> None:
    """What logs in isn't shown."""
    options: dict[str, Any] = {"password": "s3cret"}
    assert "s3cret" not in repr(ht.Slurm("somewhere", connect=options))
