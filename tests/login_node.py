"""A real sshd to log in to, and a link to it that can break.

The sshd is a cluster's login node, or any host behind SSH: it has a port, a host key and an
ordinary user of its own. `Link` stands in front of a port and does to the connections through it
what networks do: cut them, let them hang, slow them down.
"""

from __future__ import annotations

import asyncio
import pwd
import secrets
import shutil
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, Any

from slurm_cluster import (
    ClusterError,
    Daemons,
    free_ports,
    open_directory,
    program,
    tail,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from pathlib import Path
    from types import TracebackType

HOST = "127.0.0.1"
# As in sshd_config, where of two lines with one keyword the first counts.
SSHD_CONFIG = {
    "PidFile": "none",
    # Our directories lie below one that is everybody's.
    "StrictModes": "no",
    "UsePAM": "no",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "PrintMotd": "no",
    "Subsystem": "sftp internal-sftp",
}


class LoginNode:
    """An sshd on a free port of the loopback, with a user of its own.

    Args:
        directory: Its log goes here and stays.
        env: What every session finds in its environment: a cluster's `env` makes sbatch work.
        shell: The user's login shell.
        options: Lines for sshd_config, added or in place of ours; None leaves a line out
            (``{"Subsystem": None}`` is a host without SFTP).
        host: An address of this machine.

    Attributes:
        host: Where it listens.
        port: Where it listens.
        user: An ordinary user's name, new for this node.
        home: That user's home directory, removed with the user in `stop`.
        client_key: The private key that logs the user in.
        known_hosts: Names the host key, for this port and for any `Link`'s in front of it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        env: Mapping[str, str] | None = None,
        shell: str = "/bin/bash",
        options: Mapping[str, str | None] | None = None,
        host: str = HOST,
    ) -> None:
        self.directory = directory.absolute()
        self.host = host
        self.user = f"ht-{secrets.token_hex(4)}"
        self.log = self.directory / f"{self.user}.log"
        self._env = dict(env or {})
        self._shell = shell
        self._options = dict(options or {})
        self._keeper: Daemons | None = None
        self._sshd: Daemons | None = None

    def __enter__(self) -> LoginNode:
        try:
            self._create()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start sshd and wait until it takes connections, as after a boot."""
        self._sshd = sshd = Daemons(self.log)
        sshd.start("sshd", [program("sshd"), "-D", "-e", "-f", str(self._config)], self.log, {})
        wait_until(
            lambda: self._answers(sshd), 10, lambda: f"sshd doesn't answer\n{tail(self.log)}"
        )

    def kill(self) -> None:
        """Kill sshd and all that any session started, as a reboot does; the user stays."""
        sshd, self._sshd = self._sshd, None
        if sshd is not None:
            sshd.close()

    def swap_host_key(self) -> None:
        """Show another key from the next `start` on, or the former one again if this was called before."""
        key, other, spare = (self._public / name for name in ("host_key", "other_key", "spare_key"))
        if not other.exists():
            subprocess.run(
                [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", other], check=True
            )
        key.rename(spare)
        other.rename(key)
        spare.rename(other)

    def stop(self) -> None:
        """Kill everything, and remove the user and the home directory."""
        self.kill()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.close()

    def run(
        self, command: str, *, check: bool = True, port: int | None = None, **options: Any
    ) -> str:
        """Run a command line in a session of its own, by OpenSSH's client.

        Args:
            command: A line for the user's shell.
            check: Raise `ClusterError` with what it wrote if it fails.
            port: Another port, such as a `Link`'s.
            **options: For `subprocess.run`.

        Returns:
            Its stdout, stripped.
        """
        options = {"capture_output": True, "text": True, "timeout": 60} | options
        done = subprocess.run([*self._ssh(port or self.port), command], check=False, **options)
        if check and done.returncode:
            raise ClusterError(f"{command!r} exited {done.returncode}: {done.stdout}{done.stderr}")
        return str(done.stdout).strip()

    def _ssh(self, port: int) -> list[str]:
        files = {"IdentityFile": self.client_key, "UserKnownHostsFile": self.known_hosts}
        options = [f"-o{key}={value}" for key, value in files.items()]
        own = [
            "-F",
            "none",
            "-oIdentitiesOnly=yes",
            "-oBatchMode=yes",
            "-oStrictHostKeyChecking=yes",
        ]
        return [program("ssh"), *own, *options, "-p", str(port), f"{self.user}@{self.host}"]

    def _create(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._public = open_directory("login-")
        self.home = self._public / "home"
        # Outlives every sshd of ours, and sees to it that user and home go when we do.
        self._keeper = Daemons(
            self.log,
            farewell=[[program("userdel"), "-f", self.user], ["rm", "-rf", str(self._public)]],
        )
        self._create_user()
        self._create_keys()
        [self.port] = free_ports(1)
        self._config = self._public / "sshd_config"
        self._config.write_text(
            "".join(f"{key} {value}\n" for key, value in self._settings().items())
        )

    def _create_user(self) -> None:
        # A password that none can match: one that is locked would keep sshd from letting it in.
        home = ["--no-create-home", "--home-dir", str(self.home)]
        done = subprocess.run(
            [program("useradd"), "-U", "-p", "*", "-s", self._shell, *home, self.user],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ClusterError(f"useradd exited {done.returncode}: {done.stderr}")
        self.home.mkdir(mode=0o700)
        shutil.chown(self.home, *pwd.getpwnam(self.user)[2:4])

    def _create_keys(self) -> None:
        keys = [self._public / name for name in ("client_key", "host_key")]
        for key in keys:
            subprocess.run(
                [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key], check=True
            )
        self.client_key, host_key = keys
        self.known_hosts = self._public / "known_hosts"
        self.known_hosts.write_text(f"* {host_key.with_suffix('.pub').read_text()}")

    def _settings(self) -> dict[str, str]:
        # sshd insists on this directory for its unprivileged half.
        subprocess.run(["mkdir", "-p", "-m", "755", "/run/sshd"], check=True)
        settings: dict[str, str | None] = {
            **SSHD_CONFIG,
            "ListenAddress": self.host,
            "Port": str(self.port),
            "HostKey": str(self._public / "host_key"),
            "AuthorizedKeysFile": str(self._public / "client_key.pub"),
        }
        if self._env:
            settings["SetEnv"] = " ".join(f'"{key}={value}"' for key, value in self._env.items())
        return {
            key: value for key, value in (settings | self._options).items() if value is not None
        }

    def _answers(self, sshd: Daemons) -> bool:
        if sshd.exit_code("sshd") is not None:
            raise ClusterError(f"sshd ended\n{tail(self.log)}")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as attempt:
            return attempt.connect_ex((self.host, self.port)) == 0


class Link:
    """A network between a client and a port, for as long as the ``with`` lasts.

    Args:
        port: Where connections go.
        host: Where connections go.

    Attributes:
        port: Where a client connects instead, on the loopback.
        delay: Seconds that each way takes; may be changed at any time.
        bytes: How many were carried, both ways.
        messages: How many pieces they came in: what one end wrote at once is mostly one.
    """

    def __init__(self, port: int, host: str = HOST) -> None:
        self.target = host, port
        [self.port] = free_ports(1)
        self.delay = 0.0
        self.bytes = 0
        self.messages = 0
        self._flowing = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._carriers: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)

    def __enter__(self) -> Link:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        self._call(self._close())

    def freeze(self) -> None:
        """Carry nothing more and say nothing about it; new connections hang too."""
        self._call(self._hold())

    def restore(self) -> None:
        """Take connections again, and carry what a freeze held back."""
        self._call(self._open())

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open(self) -> None:
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, HOST, self.port)

    async def _hold(self) -> None:
        self._flowing.clear()

    async def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for writer in self._writers:
            _reset(writer)
        for carrier in self._carriers:
            carrier.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carriers.add(task)
        self._writers.add(writer)
        try:
            await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._carriers.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        self._writers.add(far_writer)
        try:
            await _together(self._carry(reader, far_writer), self._carry(far_reader, writer))
        finally:
            self._writers.discard(far_writer)
            far_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Between the ends lies a queue, so that a delay makes the way long and not narrow.
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        await _together(self._receive(reader, queue), self._send(queue, writer))

    async def _receive(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        piece = b"the first"
        while piece:
            await self._flowing.wait()
            piece = await reader.read(65536)
            queue.put_nowait((self._loop.time() + self.delay, piece))

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, piece = await queue.get()
            await asyncio.sleep(due - self._loop.time())
            await self._flowing.wait()
            if not piece:
                writer.write_eof()
                return
            self.bytes += len(piece)
            self.messages += 1
            writer.write(piece)
            await writer.drain()


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """Await all of them; when one fails the others end too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other end sees a reset, not an end of file."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() != -1:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
