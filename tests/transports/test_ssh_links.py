# ruff: noqa: F811 - fixtures are imported by their names
"""A link to a host as such: how it's made, what may be wrong with it, and what it does in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncssh
import pytest
from helpers import script, until
from login_node import Link, LoginNode
from slurm_kit import results_of
from ssh_kit import cluster, connect, environment, needs_login_node, node, slurm_at  # noqa: F401

import aiohypertunity as ht
from aiohypertunity._model.address import Address
from aiohypertunity._transports import ssh as _ssh
from aiohypertunity._transports.protocol import LinkLost, Wanted
from aiohypertunity._transports.ssh import SSH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = needs_login_node


@pytest.fixture
async def ssh(node: LoginNode) -> AsyncIterator[SSH]:
    """A link to the login node."""
    async with linked(f"{node.user}@{node.host}:{node.port}", connect(node)) as ssh:
        yield ssh


@contextlib.asynccontextmanager
async def linked(host: str, options: dict[str, Any]) -> AsyncIterator[SSH]:
    """A link, for as long as the `with` lasts."""
    ssh = SSH(host, options, lambda event: None)
    try:
        yield ssh
    finally:
        await ssh.aclose()


async def said(ssh: SSH, command: str) -> str:
    return (await ssh.run(command, timeout=10)).stdout


# Trouble with channels.


async def test_killed_in_the_middle(node: LoginNode, ssh: SSH) -> None:
    """A command whose channel dies isn't run again, since it may have done its work."""
    with pytest.raises(LinkLost) as lost:
        await ssh.run("echo once >>began; kill -9 0", timeout=10)
    assert type(lost.value) is LinkLost
    assert await said(ssh, "cat began; rm began") == "once\n"


@pytest.fixture
def moody(cluster: SlurmCluster, tmp_path: Path) -> Iterator[tuple[LoginNode, Path]]:
    """A login node, and a file that makes it drop all channels while it's there."""
    text = """\
        #!/bin/bash
        [ -e ~/drop ] && exit 1
        [ -e ~/full ] && ulimit -u 1
        exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"
        """
    forced = script(cluster.public / "drop all", text, mode=0o755)
    options = {"ForceCommand": f"'{forced}'"}
    with LoginNode(tmp_path, env=environment(cluster), options=options) as node:
        yield node, node.home / "drop"


async def test_drops_all_channels(moody: tuple[LoginNode, Path]) -> None:
    """Whoever has answered once is waited for, however many channels it drops."""
    node, drop = moody
    async with linked(f"{node.user}@{node.host}:{node.port}", connect(node)) as ssh:
        assert await said(ssh, "echo here") == "here\n"
        drop.touch()
        for _ in range(2 * _ssh.channels._MUTE):
            with pytest.raises(LinkLost):
                await said(ssh, "echo here")
        with pytest.raises(LinkLost):
            await ssh.get([Wanted("/etc/passwd")])
        drop.unlink()
        assert await said(ssh, "echo again") == "again\n"


async def test_full_process_table(moody: tuple[LoginNode, Path]) -> None:
    """A host on which nothing can be started at present is waited for; nothing is taken for absent."""
    node, drop = moody
    full = drop.with_name("full")
    async with linked(f"{node.user}@{node.host}:{node.port}", connect(node)) as ssh:
        assert await said(ssh, "echo here") == "here\n"
        full.touch()
        with pytest.raises(LinkLost):
            await said(ssh, "sleep 0; echo here")
        with pytest.raises(LinkLost):
            await ssh.get([Wanted("/etc/passwd"), Wanted("/nonexistent")])
        with pytest.raises(LinkLost):
            await ssh.fetch("/etc/passwd")
        full.unlink()
        assert await said(ssh, "echo again") == "again\n"
        assert len(await ssh.get([Wanted("/etc/passwd")])) == 1


async def test_runs_no_commands(moody: tuple[LoginNode, Path]) -> None:
    """A host that drops all channels from the beginning runs no commands."""
    node, drop = moody
    drop.touch()
    async with linked(f"{node.user}@{node.host}:{node.port}", connect(node)) as ssh:
        with pytest.raises(ht.TransportError, match="runs no commands"):
            await ssh.get([Wanted("/etc/passwd")])


async def test_jobs_outlive_dropped_channels(
    moody: tuple[LoginNode, Path], cluster: SlurmCluster
) -> None:
    """Jobs that end while their login node drops all channels are read later."""
    node, drop = moody
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
        handles = scheduler.dispatch([ht.SlurmJob(time.sleep, (1.0 + i,)) for i in range(3)])
        for handle in handles:
            await handle.wait_started()
        drop.touch()
        await asyncio.sleep(3)
        drop.unlink()
        assert [(await handle).error for handle in handles] == [None] * 3


async def test_cancelled_while_a_channel_opens(node: LoginNode) -> None:
    """Whoever is cancelled while a channel opens leaves none behind."""
    with Link(node.port) as link:
        async with linked(f"{node.user}@{node.host}:{link.port}", connect(node)) as ssh:
            await said(ssh, ":")
            link.delay = 0.05
            for _ in range(12):
                task = asyncio.create_task(said(ssh, "sleep 100"))
                await asyncio.sleep(0.03)
                task.cancel()
                await asyncio.wait([task])
            link.delay = 0.0
            async with asyncio.timeout(3):
                assert await said(ssh, "echo here") == "here\n"


async def test_channels_at_a_time(node: LoginNode, ssh: SSH) -> None:
    """Eight of them, however much there is to do, though the server would allow more."""
    command = "mkdir -p busy && : >busy/$$ && ls busy | wc -l; sleep 0.3; rm busy/$$"
    numbers = await asyncio.gather(*(said(ssh, command) for _ in range(30)))
    assert max(map(int, numbers)) == 8
    node.run("rmdir busy")


async def test_archives_are_bounded(ssh: SSH, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is asked for at once, it comes in pieces that don't fill the memory."""
    sizes = []
    sort_out = _ssh.transport.sort_out

    def noted(last: Any, came: Any, mark: str) -> Any:
        sizes.append(len(came.stdout))
        return sort_out(last, came, mark)

    monkeypatch.setattr(_ssh.transport, "sort_out", noted)
    home = (await said(ssh, "mkdir many; cd many; pwd")).strip()
    await said(ssh, "cd many; for n in $(seq 30); do head -c 1000000 /dev/zero >$n; done")
    contents = await ssh.get([Wanted(f"{home}/{n}") for n in range(1, 31)])
    await said(ssh, "rm -r many")
    assert contents == [bytes(1_000_000)] * 30
    assert max(sizes) < 1.1 * _ssh.wanted._LARGE


# A server that does what it's told.


@dataclass
class Server:
    """A server whose moods can be chosen.

    Attributes:
        password: What it asks for; nothing if it's None.
        slow: Seconds that a log-in takes.
        hangs_up: Whether it hangs up after each log-in.
        refuses: Whether it opens no channel.
        n_log_ins: How many there were.
    """

    password: str | None = None
    slow: float = 0.0
    hangs_up: bool = False
    refuses: bool = False
    n_log_ins: int = 0
    key: asyncssh.SSHKey = field(
        default_factory=lambda: asyncssh.generate_private_key("ssh-ed25519")
    )
    port: int = 0

    @property
    def line(self) -> str:
        """Of known_hosts."""
        return f"[127.0.0.1]:{self.port} {self.key.export_public_key().decode()}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        """It runs for as long as the `with` lasts."""
        acceptor = await asyncssh.create_server(
            lambda: _Door(self),
            "127.0.0.1",
            0,
            server_host_keys=[self.key],
        )
        self.port = acceptor.get_port()
        async with acceptor:
            yield self


class _Door(asyncssh.SSHServer):
    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, connection: asyncssh.SSHServerConnection) -> None:
        self._connection = connection

    async def begin_auth(self, username: str) -> bool:
        await asyncio.sleep(self._server.slow)
        return self._server.password is not None

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return password == self._server.password

    def auth_completed(self) -> None:
        self._server.n_log_ins += 1
        if self._server.hangs_up:
            self._connection.disconnect(11, "too many log-ins")

    def session_requested(self) -> Any:
        if self._server.refuses:
            return False
        channel = self._connection.create_server_channel(encoding=None)
        return channel, asyncssh.SSHServerProcess(_run, None, 3, False)

    def connection_requested(self, *where: object) -> bool:
        return True


async def _run(process: asyncssh.SSHServerProcess[bytes]) -> None:
    assert process.command is not None
    child = await asyncio.create_subprocess_shell(
        process.command, stdin=asyncio.subprocess.DEVNULL, stdout=-1, stderr=-1
    )
    out, err = await child.communicate()
    process.stdout.write(out)
    process.stderr.write(err)
    process.exit(child.returncode or 0)


def options_for(*servers: Server, **options: Any) -> dict[str, Any]:
    """Of a connection that knows nothing of this machine's own configuration."""
    known = asyncssh.import_known_hosts("".join(server.line for server in servers))
    own = {"config": None, "client_keys": None, "agent_path": None, "username": "me"}
    return {**own, "known_hosts": known, **options}


async def test_server_that_hangs_up_after_the_log_in() -> None:
    """It's tried again, not too often, and is well when it lets us stay."""
    async with (
        Server().running() as server,
        linked(f"127.0.0.1:{server.port}", options_for(server)) as ssh,
    ):
        assert await said(ssh, "echo here") == "here\n"
        server.hangs_up = True
        ssh._link.current.abort()  # type: ignore[union-attr]
        for _ in range(5):
            with pytest.raises(LinkLost):
                await said(ssh, "echo here")
        server.hangs_up = False
        assert await said(ssh, "echo again") == "again\n"
        assert server.n_log_ins <= 7


async def test_server_that_refuses_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has answered once is waited for, however many channels it refuses."""
    monkeypatch.setattr(_ssh.channels, "_REFUSALS", 2)
    async with (
        Server(refuses=True).running() as server,
        linked(f"127.0.0.1:{server.port}", options_for(server)) as ssh,
    ):
        with pytest.raises(ht.TransportError, match="opens no channel") as refused:
            await said(ssh, "echo here")
        assert type(refused.value) is ht.TransportError
        server.refuses = False
        assert await said(ssh, "echo here") == "here\n"
        server.refuses = True
        for _ in range(3):
            with pytest.raises(LinkLost):
                await said(ssh, "echo here")
        server.refuses = False
        assert await said(ssh, "echo again") == "again\n"


# Whom it trusts.


@pytest.mark.parametrize("word", ["none", "no such file"])
async def test_config_without_known_hosts(node: LoginNode, tmp_path: Path, word: str) -> None:
    """A configuration that knows no host trusts none."""
    text = f"""
        Host cluster
            HostName 127.0.0.1
            Port {node.port}
            User {node.user}
            IdentityFile {node.client_key}
            UserKnownHostsFile {"none" if word == "none" else tmp_path / "nothing"}
        """
    config = script(tmp_path / "config", text)
    async with linked("cluster", {"config": str(config), "agent_path": None}) as ssh:
        with pytest.raises(ht.TransportError, match="known_hosts") as refused:
            await said(ssh, ":")
    assert not isinstance(refused.value, LinkLost)


async def test_options_as_one_object(node: LoginNode) -> None:
    """An object of options, in which anything might be, is refused."""
    options = asyncssh.SSHClientConnectionOptions(known_hosts=None, config=None)
    async with linked(f"127.0.0.1:{node.port}", {"options": options}) as ssh:
        with pytest.raises(ht.TransportError, match="one by one"):
            await said(ssh, ":")


async def test_changed_key(tmp_path: Path) -> None:
    """Of a key that has changed it's said that it has, and where the old one stands; no line is to be added."""
    async with Server().running() as server, Server().running() as other:
        known = tmp_path / "known"
        old = f"[127.0.0.1]:{server.port} {other.key.export_public_key().decode()}"
        known.write_text(f"# mine\n{other.line}{old}")
        options = options_for(known_hosts=str(known))
        async with linked(f"127.0.0.1:{server.port}", options) as ssh:
            with pytest.raises(ht.TransportError, match="has CHANGED") as refused:
                await said(ssh, ":")
    assert f"{known}, line 3" in str(refused.value)
    assert "AAAA" not in str(refused.value)


# What can't work says so, and isn't tried for ever.


async def test_missing_key_file(node: LoginNode) -> None:
    """A key that isn't there is named at once."""
    options = {**connect(node), "client_keys": ["/nonexistent/id"]}
    async with linked(f"127.0.0.1:{node.port}", options) as ssh:
        with pytest.raises(ht.TransportError, match="/nonexistent/id") as refused:
            await said(ssh, ":")
    assert not isinstance(refused.value, LinkLost)


async def test_wrong_port(node: LoginNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that never answered is tried for some time; then its port is named."""
    monkeypatch.setattr(_ssh.link, "_FIRST", 1.0)
    with Link(node.port) as link:
        link.cut()
        async with linked(f"127.0.0.1:{link.port}", connect(node)) as ssh:
            n_lost = 0
            with pytest.raises(ht.TransportError, match=f"port {link.port}, in 1 s") as failed:
                while True:
                    try:
                        await said(ssh, ":")
                    except LinkLost:
                        n_lost += 1
    assert not isinstance(failed.value, LinkLost)
    assert n_lost > 2


async def test_nobody_listens_yet(node: LoginNode, cluster: SlurmCluster) -> None:
    """A host that comes up within that time is used."""
    with Link(node.port) as link:
        link.cut()
        slurm = slurm_at(node, cluster, link.port)
        running = asyncio.create_task(results_of(slurm, ht.SlurmJob(abs, (-1,))))
        await asyncio.sleep(1)
        link.restore()
        assert [result.data for result in await running] == [1]


# Hosts on the way.


def jump_config(path: Path, gate: Server, server: Server) -> dict[str, Any]:
    """Options by which the host `far` is reached through the host `gate`."""
    text = f"""
        Host gate
            HostName 127.0.0.1
            Port {gate.port}
        Host far
            HostName 127.0.0.1
            Port {server.port}
            ProxyJump gate
        """
    return options_for(gate, server, config=str(script(path, text)))


async def test_jump_host_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump host that takes its time and asks gets its answer, and not another host's password."""
    monkeypatch.setattr(_ssh.login, "_CONNECT", 0.5)
    asked = []

    def answer(words: str) -> str:
        asked.append(words)
        return "open"

    async with (
        Server(password="open", slow=1.0).running() as gate,
        Server().running() as server,
    ):
        options = jump_config(tmp_path / "config", gate, server)
        options |= {"prompt": answer, "password": "for the other"}
        async with linked("far", options) as ssh:
            assert await said(ssh, "echo through") == "through\n"
    assert asked == ["gate: Password:"]


async def test_unknown_jump_host(tmp_path: Path) -> None:
    """An unknown jump host is refused with the line that would add it."""
    async with Server().running() as gate, Server().running() as server:
        options = jump_config(tmp_path / "config", gate, server)
        options["known_hosts"] = asyncssh.import_known_hosts(server.line)
        async with linked("far", options) as ssh:
            with pytest.raises(ht.TransportError) as refused:
                await said(ssh, ":")
    assert str(refused.value).splitlines()[-1].split() == gate.line.split()


def test_configuration_comes_first(tmp_path: Path) -> None:
    """What the user's configuration says isn't overruled by our defaults."""
    text = "Host far\n  ServerAliveInterval 7\n  Ciphers aes256-ctr\n  ConnectTimeout 3\n"
    config = script(tmp_path / "config", text)
    address = Address("far")
    way = _ssh.login.resolve(address, {"config": str(config)}, False)
    assert not {"keepalive_interval", "encryption_algs"} & set(way.options)
    assert way.options["keepalive_count_max"] == _ssh.login._KEEPALIVES
    assert way.patience == 3
    assert _ssh.login.resolve(address, {"config": None}, False).patience == _ssh.login._CONNECT


# Who logs in, and how.


async def test_question_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that nobody answers in time is asked once, and its answer is good for the next log-in."""
    monkeypatch.setattr(_ssh.login, "_TYPING", 0.5)
    answered = threading.Event()
    asked = []

    def answer(words: str) -> str:
        asked.append(words)
        answered.wait(20)
        return "open"

    async with (
        Server(password="open").running() as server,
        linked(f"127.0.0.1:{server.port}", options_for(server, prompt=answer)) as ssh,
    ):
        with pytest.raises(LinkLost, match="waits for somebody"):
            await said(ssh, "echo here")
        task = asyncio.create_task(said(ssh, "echo here"))
        await asyncio.sleep(1.5)
        answered.set()
        assert await task == "here\n"
    assert len(asked) == 1


async def test_leaving_an_open_question() -> None:
    """Whoever leaves needn't wait for somebody to answer."""
    answered = threading.Event()
    async with Server(password="open").running() as server:
        options = options_for(server, prompt=lambda words: answered.wait(20))
        async with asyncio.timeout(5), linked(f"127.0.0.1:{server.port}", options) as ssh:
            task = asyncio.create_task(said(ssh, "echo here"))
            await asyncio.sleep(0.5)
            task.cancel()
    answered.set()


async def test_password() -> None:
    """A password among the options logs in; one that is wrong isn't tried twice, nor told."""
    async with Server(password="s3cret").running() as server:
        options = options_for(server, password="s3cret")
        async with linked(f"127.0.0.1:{server.port}", options) as ssh:
            assert await said(ssh, "echo here") == "here\n"
        async with linked(f"127.0.0.1:{server.port}", {**options, "password": "Wr0ng"}) as ssh:
            with pytest.raises(ht.TransportError, match="doesn't let us in") as refused:
                await said(ssh, "echo here")
    assert "Wr0ng" not in str(refused.value)
    assert server.n_log_ins == 1


async def test_agent(node: LoginNode, tmp_path: Path) -> None:
    """A key that only an agent holds logs in."""
    agent = shutil.which("ssh-agent")
    if agent is None:
        pytest.skip("no ssh-agent here")
    path = tmp_path / "agent"
    with subprocess.Popen([agent, "-D", "-a", str(path)], stdout=subprocess.DEVNULL) as process:
        try:
            await until(path.exists)
            env = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            subprocess.run(["ssh-add", "-q", node.client_key], env=env, check=True)
            options = {"known_hosts": str(node.known_hosts), "config": None, "client_keys": ()}
            options |= {"agent_path": str(path)}
            async with linked(f"{node.user}@{node.host}:{node.port}", options) as ssh:
                assert await said(ssh, "id -un") == f"{node.user}\n"
        finally:
            process.terminate()


async def test_ipv6(tmp_path: Path) -> None:
    """A host may be given by an address of six."""
    try:
        node = LoginNode(tmp_path, host="::1")
        with node:
            async with linked(f"{node.user}@[::1]:{node.port}", connect(node)) as ssh:
                assert await said(ssh, "echo here") == "here\n"
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


async def test_frozen_link_is_noticed(node: LoginNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that says nothing any more is given up, and used again when it's back."""
    login = _ssh.login
    defaults = tuple((n, w, 0.3 if n == "keepalive_interval" else d) for n, w, d in login._DEFAULTS)
    monkeypatch.setattr(login, "_DEFAULTS", defaults)
    events: list[object] = []
    with Link(node.port) as link:
        ssh = SSH(f"{node.user}@{node.host}:{link.port}", connect(node), events.append)
        task = asyncio.create_task(said(ssh, "sleep 100"))
        await until(lambda: ssh._link.current is not None)
        link.freeze()
        with pytest.raises(LinkLost):
            await task
        assert [type(event) for event in events] == [ht.LinkDown]
        link.restore()
        assert await said(ssh, "echo again") == "again\n"
        assert [type(event) for event in events] == [ht.LinkDown, ht.LinkUp]
        await ssh.aclose()
