# ruff: noqa: F811 - fixtures are imported by their names
"""The doctor's command line, for a cluster across SSH."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from helpers import script
from login_node import LoginNode
from ssh_kit import cluster, environment, needs_login_node, node, python_for_all  # noqa: F401

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = needs_login_node


def doctor(node: LoginNode, home: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """A command line for a node named `cluster`, and its environment."""
    (home / ".ssh").mkdir()
    text = f"""
        Host cluster
            HostName {node.host}
            Port {node.port}
            User {node.user}
            IdentityFile {node.client_key}
            UserKnownHostsFile {node.known_hosts}
        """
    script(home / ".ssh" / "config", text)
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env.pop("SSH_AUTH_SOCK", None)
    return [sys.executable, "-m", "aiohypertunity", "doctor", "--host", "cluster", *words], env


def test_doctor(node: LoginNode, cluster: SlurmCluster, tmp_path: Path) -> None:
    """It finds host and key by the configuration of OpenSSH, and `~` is the home there."""
    options = ["--workdir", "~/it's work", "--python", python_for_all(cluster)]
    command, env = doctor(node, tmp_path, *options)
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{node.home}/it's work can be written" in done.stdout
    assert "which sees the work directory" in done.stdout
    assert node.run("ls -A; rm -r it*").split("\n").count("~") == 0


async def test_doctor_asks(cluster: SlurmCluster, tmp_path: Path) -> None:
    """On a terminal it asks for a password; neither that nor its answer is shown."""
    options = {"PasswordAuthentication": "yes", "PubkeyAuthentication": "no"}
    (tmp_path / "home").mkdir()
    with LoginNode(tmp_path, env=environment(cluster), options=options) as odd:
        subprocess.run(["chpasswd"], input=f"{odd.user}:R1ght", text=True, check=True)
        command, env = doctor(odd, tmp_path / "home", "--python", python_for_all(cluster))
        on_a_terminal = f"import pty; raise SystemExit(pty.spawn({command!r}) >> 8)"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", on_a_terminal),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        while piece := await process.stdout.read(4096):
            said += piece
            if piece.rstrip().endswith(b"Password:"):
                process.stdin.write(b"R1ght\n")
        assert await process.wait() == 0, said.decode()
    assert b"a job" in said
    assert b"R1ght" not in said
