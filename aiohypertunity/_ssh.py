"""A login node across SSH: the `Transport` of a cluster that this machine isn't part of.

One connection carries everything, in channels: each command has one for as long as it runs, and the
watcher keeps one. Servers bound their number (`MaxSessions`): where one is refused while others are open, we
make do with fewer, and in the end with one, for which the watcher then gives way.

What the login shell is and what its rc files print can't be known. So a command goes to /bin/sh, in letters
that mean the same to every shell, and what it says stands between marks. Without the second mark
nobody knows what became of it: that is a `LinkLost`, whatever the channel's exit status says.

Files travel as a tar stream through such a command: it works without SFTP, takes one channel for any number of
files, and is quicker. A large one comes through a channel of its own, from where the last attempt left off.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import os
import random
import re
import secrets
import shlex
import shutil
import socket
import tarfile
import tempfile
import time
import zlib
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import asyncssh

from ._address import Address
from ._errors import TransportError
from ._events import LinkDown, LinkUp
from ._threads import in_thread
from ._transports import Done, LinkLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from ._events import Event
    from ._transports import Content, Wanted

_LOG = logging.getLogger("aiohypertunity.ssh")

_CHANNELS = 8
"""Channels at a time: sshd allows ten by default."""

_KEEPALIVE, _KEEPALIVES = 15.0, 3
"""Seconds between signs of life when nothing else comes, and how many may be missing."""

_CONNECT, _LOGIN, _TYPING = 10.0, 30.0, 120.0
"""Seconds that a connection, a log-in, and a log-in for which somebody types may take."""

_LONGEST_PAUSE = 15.0
_SMALL, _LARGE = 16 << 10, 8 << 20
"""Bytes of a file that is small, whatever there is of them; and of one that travels alone, or of an archive."""

_PIECE = 1 << 20

_TROUBLE = (OSError, asyncssh.Error)


class SSH:
    """A host across SSH.

    Args:
        host: `user@host:port`, or an alias of `~/.ssh/config`.
        connect: Options of `asyncssh.connect`. And `prompt`: what answers when the server asks for a
            password or a code: a function, sync or async, from its words to the answer.
        emit: Takes `LinkDown` and `LinkUp`.
    """

    def __init__(
        self, host: str, connect: Mapping[str, Any] | None, emit: Callable[[Event], None]
    ) -> None:
        self._address = Address.parse(host)
        self._link = _Link(self._address, dict(connect or {}), emit)
        self._slots = _Slots(_CHANNELS)
        self._mark = f"aiohypertunity-{secrets.token_hex(8)}"
        self._n_mute = 0
        self._parts: dict[str, _Part] = {}
        self._directory: str | None = None

    @property
    def host(self) -> str:
        """As `Transport.host`."""
        return self._address.host

    async def run(self, command: str, *, stdin: str = "", timeout: float) -> Done:
        """As `Transport.run`. What it takes to have a channel doesn't count for `timeout`."""
        feed = (lambda: _once(stdin.encode())) if stdin else None
        said = await self._exchange(command, feed, timeout, frame=_in_one_piece)
        stdout, _, words = said.stdout.rpartition(f"\n{self._mark} stderr\n".encode())
        stderr, _, status = words.rpartition(b"\n")
        return Done(int(status), stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    async def put(self, files: Mapping[str, Content]) -> None:
        """As `Transport.put`."""
        # No owner, no times: they would be this machine's.
        said = await self._exchange("umask 077; cd / && tar -xmof -", lambda: _tar(files))
        if said.status != 0:
            # All that tar says of a full disk is how little it could write.
            hint = ": the disk is full, or a quota" if "Wrote only" in said.words else ""
            raise TransportError(f"can't write files on {self.host}{hint}: {said.words}")

    async def get(self, files: Sequence[Wanted]) -> list[bytes | TransportError | None]:
        """As `Transport.get`."""
        contents: dict[str, bytes | TransportError | None] = {}
        last = {wanted.path: wanted.last for wanted in files if wanted.path}
        while last:
            found = await self._get_some(last)
            for path in found.long:
                contents[path] = await self._get_long(path)
            contents |= found.contents
            last = {path: last[path] for path in found.left}
        return [contents.get(wanted.path) for wanted in files]

    async def _get_some(self, last: Mapping[str, int | None]) -> _Found:
        """As many files as fit into one archive."""
        said = await self._exchange(_get_command(last, self._mark))
        found = await in_thread(_sort_out, last, said, self._mark)
        if found is None and said.status == _NOT_FOUND:
            raise TransportError(f"can't read files on {self.host}: {said.words}")
        if found is None:
            # So it ended in the middle: there was no process to be had, or no memory.
            raise LinkLost(f"{self.host} can't read files now: {said.words}")
        return found

    async def _get_long(self, path: str) -> bytes | TransportError:
        try:
            here = await self.fetch(path)
            try:
                return await in_thread(Path(here).read_bytes)
            finally:
                await in_thread(os.unlink, here)
        except OSError as error:
            return TransportError(f"can't read what came of {path}: {error.strerror}")
        except LinkLost:
            raise
        except TransportError as error:
            return error

    async def fetch(self, path: str) -> str:
        """As `Transport.fetch`."""
        if self._directory is None:
            prefix = f"aiohypertunity-{os.getuid()}-"
            self._directory = await in_thread(tempfile.mkdtemp, "", prefix)
        part = self._parts.get(path)
        if part is None:
            part = self._parts[path] = _Part(path, f"{self._directory}/{secrets.token_hex(8)}")
        try:
            for is_last in (False, True):
                if await self._bring(part):
                    break
                await in_thread(part.restart)
                if is_last:
                    raise TransportError(f"{path} on {self.host} came twice with a wrong checksum")
        except OSError as error:
            raise TransportError(f"can't write {part.here}: {error.strerror}") from error
        del self._parts[path]
        return part.here

    async def _bring(self, part: _Part) -> bool:
        """Brings what is missing of a file; says whether the whole is right."""
        path = shlex.quote(part.path)
        summing = asyncio.ensure_future(self._exchange(f"cksum <{path}"))
        try:
            await self._receive(part, f"tail -c +{part.size + 1} {path}")
            words = (await summing).stdout.split()
        finally:
            summing.cancel()
            await asyncio.wait([summing])
        return words == [b"%d" % part.checksum, b"%d" % part.size]

    async def _receive(self, part: _Part, command: str) -> None:
        """Appends to a file what a command says."""
        begin, end = f"\n{self._mark}\n".encode(), f"\n{self._mark} 0\n".encode()
        async with self._channel(_marked(command, self._mark)) as process:
            held = await self._read_until(process, begin)
            while block := await self._read_block(process):
                held += block
                # What may be the mark at the end stays behind.
                await in_thread(part.append, held[: -len(end)])
                held = held[-len(end) :]
            if held != end:
                words = held.rpartition(f"\n{self._mark} ".encode())
                if words[1]:
                    raise TransportError(f"can't read {part.path} on {self.host}")
                raise self._link.lost_in(process)

    async def _read_until(self, process: _Process, mark: bytes) -> bytes:
        """Reads as far as a mark; gives what came after it."""
        seen = b""
        while mark not in seen:
            piece = await self._read_piece(process)
            if not piece:
                raise self._muted(process, seen)
            seen += piece
        return seen.partition(mark)[2]

    async def _read_block(self, process: _Process) -> bytes:
        """Reads so much that it's worth a thread's while; nothing at the end."""
        pieces, size = [], 0
        while size < _PIECE and (piece := await self._read_piece(process)):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    async def _read_piece(self, process: _Process) -> bytes:
        try:
            return await process.stdout.read(_PIECE)
        except _TROUBLE as error:
            raise LinkLost(f"the link to {self.host} failed: {error}") from error

    @asynccontextmanager
    async def watch(self, command: str) -> AsyncIterator[_Lines]:
        """As `Transport.watch`."""
        lines = _Lines(self, f"exec 2>/dev/null\nprintf '\\n{self._mark}\\n'\n{command}")
        try:
            await lines.open()
            yield lines
        finally:
            await lines.close()

    async def aclose(self) -> None:
        """As `Transport.aclose`."""
        await self._link.aclose()
        if self._directory is not None:
            await in_thread(shutil.rmtree, self._directory, True)  # whatever is in the way

    # Channels.

    async def _exchange(
        self,
        command: str,
        stdin: Callable[[], AsyncIterator[bytes]] | None = None,
        timeout: float | None = None,
        *,
        frame: Callable[..., str] | None = None,
    ) -> _Said:
        """Runs a command; again, if its channel was dropped before it began."""
        if stdin is None and len(command) > _LONGEST_COMMAND:
            long = os.fsencode(command)
            command, stdin = 'eval "$(cat)"', lambda: _once(long)
        script = (frame or _marked)(command, self._mark, with_stdin=stdin is not None)
        while True:
            async with self._channel(script) as process:
                try:
                    async with asyncio.timeout(timeout):
                        return await self._talk(process, stdin and stdin())
                except TimeoutError:
                    if not await self._link.answers():
                        raise LinkLost(f"{self.host} doesn't answer") from None
                    raise
                except _NotBegun:
                    continue

    @asynccontextmanager
    async def _channel(
        self, script: str, give_way: Callable[[], None] | None = None
    ) -> AsyncIterator[_Process]:
        """A shell that runs a script, for as long as the `with` lasts."""
        process = await self._open(_for_any_shell(script), give_way)
        try:
            yield process
        finally:
            with anyio.CancelScope(shield=True):
                await _end(process)
            self._slots.release(give_way)

    async def _open(self, command: str, give_way: Callable[[], None] | None) -> _Process:
        n_refused = 0
        while True:
            await self._slots.acquire(give_way)
            connection = None
            try:
                connection = await self._link.connection()
                return await connection.create_process(command, encoding=None)
            except asyncssh.ChannelOpenError as error:
                self._slots.release(give_way)
                if connection is None or connection.is_closed():
                    raise LinkLost(f"the link to {self.host} failed: {error}") from error
                n_refused += 1
                if n_refused > 1:
                    # Twice is no accident: so many are too many.
                    self._slots.shrink()
                if n_refused > _PATIENCE:
                    raise TransportError(f"{self.host} opens no channel: {error}") from error
                await asyncio.sleep(0.05 * n_refused)
            except _TROUBLE as error:
                self._slots.release(give_way)
                raise LinkLost(f"the link to {self.host} failed: {error}") from error
            except BaseException:
                self._slots.release(give_way)
                raise

    async def _talk(self, process: _Process, stdin: AsyncIterator[bytes] | None) -> _Said:
        try:
            # In this order: whoever is fed must be listened to.
            feeding = asyncio.ensure_future(_feed(process, stdin))
            try:
                out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
            finally:
                feeding.cancel()
                await asyncio.wait([feeding])
        except _TROUBLE as error:
            raise LinkLost(f"the link to {self.host} failed: {error}") from error
        failed = None if feeding.cancelled() else feeding.exception()
        if failed is not None:
            raise failed
        begin, end = f"\n{self._mark}\n".encode(), f"\n{self._mark} ".encode()
        noise, began, rest = out.partition(begin)
        if not began:
            raise self._muted(process, noise + err)
        body, ended, status = rest.rpartition(end)
        if not ended or not status.endswith(b"\n"):
            raise self._link.lost_in(process)
        self._n_mute = 0
        return _Said(int(status), body, err.partition(begin)[2])

    def _muted(self, process: _Process, words: bytes) -> TransportError:
        """It ended before it began: a channel that was dropped, or a host that runs no commands."""
        if self._link.is_down:
            return self._link.lost_in(process)
        self._n_mute += 1
        if self._n_mute < _MUTE:
            return _NotBegun(f"{self.host} dropped a channel")
        said = words.decode(errors="replace").strip()[-500:] or "it says nothing"
        return TransportError(f"{self.host} runs no commands: {said}")


if TYPE_CHECKING:
    _Process = asyncssh.SSHClientProcess[bytes]

_PATIENCE = 20
"""How many times in a row a channel may be refused."""

_LONGEST_COMMAND = 16 << 10
"""One argument may have 128 KiB, with five letters for one that isn't harmless."""

_NOT_FOUND = 127
"""What a shell says of a program that isn't there."""

_MUTE = 5
"""How many in a row may be dropped before they begin."""


class _NotBegun(LinkLost):
    """A channel was dropped before its command began."""


class _Said(NamedTuple):
    status: int
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """The end of its stderr, on one line."""
        lines = self.stderr.decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines[-5:]) or f"exit code {self.status}"


class _Lines:
    """The lines of a command, in spite of a channel that gives way to others."""

    def __init__(self, ssh: SSH, script: str) -> None:
        self._ssh = ssh
        self._script = script
        self._stack = contextlib.AsyncExitStack()
        self._process: _Process | None = None
        self._began = False
        self._asked = False
        self._leaving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._leaving, self._asked, self._began = None, False, False
        channel = self._ssh._channel(self._script, self._give_way)  # noqa: SLF001 - a part of it
        self._process = await self._stack.enter_async_context(channel)
        if self._asked:
            self._give_way()

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):
            if self._leaving is not None:
                await asyncio.wait([self._leaving])
            await self._stack.aclose()
        self._process = None

    def _give_way(self) -> None:
        self._asked = True
        # Else it is about to open, and gives way as soon as it has.
        if self._leaving is None and self._process is not None:
            self._leaving = asyncio.get_running_loop().create_task(self._stack.aclose())

    def send(self, line: str) -> None:
        """As `Lines.send`."""
        process = self._process
        if process is not None and not process.stdin.is_closing():
            with contextlib.suppress(*_TROUBLE):
                process.stdin.write(f"{line}\n".encode())

    def __aiter__(self) -> _Lines:
        return self

    async def __anext__(self) -> str:
        while True:
            line = await self._read()
            if line == self._ssh._mark:  # noqa: SLF001
                self._began = True
            elif line is not None and self._began:
                return line
            elif line is None and self._leaving is not None:
                await self.close()
                await self.open()
            elif line is None:
                raise StopAsyncIteration

    async def _read(self) -> str | None:
        """A line; None when there are no more."""
        process = self._process
        assert process is not None
        try:
            line = await process.stdout.readline()
        except _TROUBLE as error:
            if self._leaving is not None:
                return None
            raise LinkLost(f"the link to {self._ssh.host} failed: {error}") from error
        if line.endswith(b"\n"):
            return line[:-1].decode(errors="replace")
        if self._leaving is None and self._ssh._link.is_down:  # noqa: SLF001
            raise self._ssh._link.lost_in(process)  # noqa: SLF001
        return None


class _Slots:
    """How many channels there may be, and are.

    Args:
        limit: How many there may be, until the server has taught us better.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._n_open = 0
        self._n_waiting = 0
        self._polite: list[Callable[[], None]] = []
        self._changed = asyncio.Event()

    async def acquire(self, give_way: Callable[[], None] | None) -> None:
        """Waits for a place.

        Args:
            give_way: Is called when others want the place and there's none; its holder waits for a new
                one until nobody else does. None if the holder keeps it.
        """
        while self._n_open >= self._limit or (give_way is not None and self._is_tight):
            if give_way is None:
                for ask in self._polite[:]:
                    ask()
            self._changed.clear()
            self._n_waiting += give_way is None
            try:
                await self._changed.wait()
            except BaseException:
                # Somebody may have been waiting for us not to wait.
                self._changed.set()
                raise
            finally:
                self._n_waiting -= give_way is None
        self._n_open += 1
        if give_way is not None:
            self._polite.append(give_way)

    @property
    def _is_tight(self) -> bool:
        return self._n_waiting > 0 and self._n_open + 1 >= self._limit

    def release(self, give_way: Callable[[], None] | None) -> None:
        """Gives a place back."""
        self._n_open -= 1
        if give_way is not None:
            self._polite.remove(give_way)
        self._changed.set()

    def shrink(self) -> None:
        """The server takes no more than are open now."""
        if 1 <= self._n_open < self._limit:
            self._limit = self._n_open
            _LOG.info("the server takes %d channels at a time", self._limit)


class _Link:
    """The connection, made when it's first needed and again whenever it was lost."""

    def __init__(
        self, address: Address, options: dict[str, Any], emit: Callable[[Event], None]
    ) -> None:
        self._address = address
        self._prompt = options.pop("prompt", None)
        self._make_client = options.pop("client_factory", None)
        self._options = _with_defaults(address, options, typing=self._prompt is not None)
        self._emit = emit
        self._connection: asyncssh.SSHClientConnection | None = None
        self._attempt: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._down_since: float | None = None
        self._was_up = False
        self._is_closing = False
        self._slow = False
        self.unknown: tuple[str, int, asyncssh.SSHKey] | None = None
        self.secret_given = "password" in options

    @property
    def is_down(self) -> bool:
        return self._connection is None

    async def connection(self) -> asyncssh.SSHClientConnection:
        """The connection; made, if there's none, by one attempt for all who ask meanwhile.

        Raises:
            LinkLost: It can't be made now.
            TransportError: It can't be made, and trying again wouldn't help.
        """
        if self._connection is not None:
            return self._connection
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.get_running_loop().create_task(self._connect())
            self._attempt.add_done_callback(_look_at)
        return await asyncio.shield(self._attempt)

    async def answers(self) -> bool:
        """Whether the host says anything at all; the connection is given up if not."""
        connection = self._connection
        if connection is None:
            return False
        try:
            async with asyncio.timeout(5):
                process = await connection.create_process("exit 0")
                process.close()
        except asyncssh.ChannelOpenError:
            return not connection.is_closed()
        except (TimeoutError, *_TROUBLE):
            connection.abort()
            return False
        return True

    def lost_in(self, process: _Process) -> LinkLost:
        """What to say when a channel ended too early."""
        host = self._address.host
        if self.is_down:
            return LinkLost(f"the link to {host} failed")
        return LinkLost(f"{host} dropped a channel (exit status {process.exit_status})")

    async def aclose(self) -> None:
        self._is_closing = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait([self._attempt])
        if self._connection is not None:
            self._connection.close()
            with anyio.move_on_after(2, shield=True):
                await self._connection.wait_closed()

    async def _connect(self) -> asyncssh.SSHClientConnection:
        await asyncio.sleep(self._pause())
        self.unknown = None
        try:
            connection = await asyncssh.connect(
                self._address.host, client_factory=self._client, **self._options
            )
        except Exception as error:
            raise self._judge(error) from error
        self._connection = connection
        self._was_up, self._slow = True, False
        if self._down_since is not None:
            self._down_since = None
            _LOG.info("the link to %s stands again", self._address.host)
            self._emit(LinkUp(self._address.host, time.time()))
        return connection

    def _pause(self) -> float:
        """Seconds before the next attempt: the longer it has been down, the more patient."""
        if self._down_since is None:
            return 0.0
        pause = min(max((time.monotonic() - self._down_since) / 8, 0.1), _LONGEST_PAUSE)
        if self._slow:
            pause = max(pause, _LONGEST_PAUSE)
        # Not all that lost the same host at the same moment are to come back at the same moment.
        return pause * random.uniform(0.75, 1.0)  # noqa: S311

    def _judge(self, error: Exception) -> TransportError:
        """What a log-in that failed means: to try again, or not."""
        where = self._address.host
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return TransportError(self._unknown(error))
        if isinstance(error, asyncssh.PermissionDenied):
            if self._was_up and not self.secret_given:
                # It knew us: it may still be booting. What somebody typed isn't tried again, though.
                self._slow = True
                return self._lose(f"{where} doesn't let us in at present: {error}")
            return TransportError(f"{where} doesn't let us in: {error}")
        if isinstance(error, socket.gaierror) and not self._was_up:
            return TransportError(f"there is no host {where!r}: {error.strerror}")
        if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ProtocolNotSupported):
            return TransportError(f"can't talk with {where}: {error}")
        if isinstance(error, OSError | asyncssh.Error):
            words = str(error) or type(error).__name__
            return self._lose(f"can't reach {where}: {words}")
        # A key that can't be read, an option that makes no sense.
        return TransportError(f"can't log in to {where}: {error}")

    def _unknown(self, error: asyncssh.HostKeyNotVerifiable) -> str:
        if self.unknown is None:
            return f"{error}: known_hosts must have its key, as for ssh itself"
        host, port, key = self.unknown
        name = host if port == 22 else f"[{host}]:{port}"
        return (
            f"the key of {name} isn't in known_hosts, so it may be anybody's. If its fingerprint "
            f"{key.get_fingerprint()} is the one that its owners give, add this line to "
            f"~/.ssh/known_hosts (ssh-keyscan -p {port} {host} prints it, too):\n"
            f"{name} {key.export_public_key().decode().strip()}"
        )

    def _client(self) -> asyncssh.SSHClient:
        if self._make_client is not None:
            inner = self._make_client()
        elif self._prompt is not None:
            inner = _Answering(self._prompt, self)
        else:
            inner = asyncssh.SSHClient()
        return _Client(inner, self)  # type: ignore[return-value]  # it has all its methods

    def connection_lost(self, error: Exception | None) -> None:
        """A connection is gone; it may be one that never stood."""
        if self._connection is None or self._is_closing:
            return
        self._connection = None
        self._lose(str(error) if error is not None else "the host closed it")

    def _lose(self, reason: str) -> LinkLost:
        if self._down_since is None:
            self._down_since = time.monotonic()
            _LOG.warning("the link to %s is down: %s", self._address.host, reason)
            self._emit(LinkDown(self._address.host, time.time(), reason))
        return LinkLost(reason)


def _look_at(attempt: asyncio.Task[Any]) -> None:
    # Whoever asked for it may be gone.
    if not attempt.cancelled():
        attempt.exception()


def _with_defaults(address: Address, options: dict[str, Any], *, typing: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "keepalive_interval": _KEEPALIVE,
        "keepalive_count_max": _KEEPALIVES,
        "connect_timeout": _CONNECT,
        "login_timeout": _TYPING if typing else _LOGIN,
        # Quicker by half than asyncssh's first choice.
        "encryption_algs": "^aes128-gcm@openssh.com,aes256-gcm@openssh.com",
    }
    if address.port is not None:
        defaults["port"] = address.port
    if address.user is not None:
        defaults["username"] = address.user
    return defaults | options


class _Client:
    """What asyncssh asks and tells, on its way to whom the user named."""

    def __init__(self, inner: asyncssh.SSHClient, link: _Link) -> None:
        self._inner = inner
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self._link.unknown = host, port, key
        return self._inner.validate_host_public_key(host, addr, port, key)

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        self._link.connection_lost(error)


class _Answering(asyncssh.SSHClient):
    """Hands the server's questions on, each log-in's once: a wrong answer isn't repeated unasked."""

    def __init__(self, prompt: Callable[[str], Any], link: _Link) -> None:
        self._prompt = prompt
        self._link = link
        self._asked = False

    async def _answer(self, words: str) -> str:
        self._link.secret_given = True
        if inspect.iscoroutinefunction(self._prompt):
            return str(await self._prompt(words))
        return str(await in_thread(self._prompt, words))

    def kbdint_auth_requested(self) -> str | None:
        if self._asked:
            return None
        self._asked = True
        return ""

    async def kbdint_challenge_received(
        self,
        name: str,  # noqa: ARG002 - asyncssh's signature
        instructions: str,  # noqa: ARG002
        lang: str,  # noqa: ARG002
        prompts: Sequence[tuple[str, bool]],
    ) -> list[str]:
        return [await self._answer(words) for words, _ in prompts]

    async def password_auth_requested(self) -> str | None:
        if self._asked:
            return None
        self._asked = True
        return await self._answer("Password: ")


# Commands.

# Neither tcsh nor fish does anything to these between single quotes. The rest becomes octal numbers.
_HARMLESS = re.compile(rb"[^ -&(-\[\]-~]|!")


def _for_any_shell(script: str) -> str:
    """A line with which any login shell runs a script for /bin/sh."""
    coded = _HARMLESS.sub(lambda found: b"\\0%03o" % ord(found[0]), os.fsencode(script))
    return f"""exec /bin/sh -c 'eval "$(printf %b "$1")"' sh '{coded.decode()}'"""


def _marked(command: str, mark: str, *, with_stdin: bool = False) -> str:
    """A script that says what a command says between marks, the second with its exit status."""
    begin = f"printf '\\n{mark}\\n'"
    # No stdin needs no end, which would be a message.
    stdin = "" if with_stdin else " </dev/null"
    return f"{begin}; {begin} >&2\n(\n{command}\n){stdin}\nprintf '\\n{mark} %s\\n' $?"


def _in_one_piece(command: str, mark: str, *, with_stdin: bool = False) -> str:
    """The same for text, with its stderr and status behind it, said at the end and at once.

    Each piece would be a message of its own.
    """
    stdin = "" if with_stdin else " </dev/null"
    return f"""\
said=$({{
err=$( (
{command}
) 2>&1 >&3 3>&-{stdin})
status=$?
printf '\\n{mark} stderr\\n%s\\n%s' "$err" "$status"
}} 3>&1)
printf '\\n{mark}\\n%s\\n{mark} 0\\n' "$said"
"""


def _get_command(last: Mapping[str, int | None], mark: str) -> str:
    """What is known of files, by number; the ends of some; and a tar archive of the others.

    Few processes, since it's done for every few jobs that end: two `find` and a `tar`, and more only for
    what is large. What isn't a regular file isn't opened: a FIFO would wait for somebody to write.
    """
    sizes = {size for size in last.values() if size is not None}
    ends = {size: shlex.join(path for path in last if last[path] == size) for size in sorted(sizes)}
    whole = shlex.join(path for path in last if last[path] is None)
    find_long = (
        f"find -L {whole} -prune -type f -size +{_SMALL}c -exec wc -c {{}} +" if whole else ""
    )
    find_ends = "\n".join(
        f"find -L {paths} -prune -type f -size +{size}c" for size, paths in ends.items()
    )
    tails = "\n".join(
        f"for path in {paths}; do\n"
        f'    ! holds "$cut" "$path" || {{ tail -c {size} "$path"; printf "\\n{mark} $?\\n"; }}\n'
        "done"
        for size, paths in ends.items()
    )
    return f"""\
cd /
set -f
LC_ALL=C N='
'
export LC_ALL
IFS=$N
holds() {{ case $1 in *"$N$2$N"*) ;; *) return 1 ;; esac; }}
cut=$N$({{
{find_ends}
:; }} 2>/dev/null)$N
long=$N left=$N room={_LARGE}
for line in $({find_long or ":"} 2>/dev/null); do
    case $line in *" /"*) ;; *) continue ;; esac
    path=/${{line#* /}} size=$((${{line%% /*}} + 0))
    if [ $size -gt {_LARGE} ]; then long=$long$path$N
    elif [ $size -gt $room ]; then left=$left$path$N
    else room=$((room - size))
    fi
done
n=0
for path in {shlex.join(last)}; do
    if holds "$long" "$path"; then echo long $n
    elif holds "$left" "$path"; then echo left $n
    elif holds "$cut" "$path"; then echo cut $n
    elif [ -f "$path" ]; then set -- "$@" ".$path"
    elif [ -e "$path" ]; then echo odd $n
    else echo gone $n; set -- "$@" ".$path"
    fi
    n=$((n + 1))
done
echo
{tails}
[ $# = 0 ] || tar -hcf - "$@"
"""


class _Found(NamedTuple):
    """What became of files that were asked for.

    Attributes:
        contents: What is known of them.
        long: Those that come one by one.
        left: Those that come with the next.
    """

    contents: dict[str, bytes | TransportError | None]
    long: list[str]
    left: list[str]


def _sort_out(last: Mapping[str, int | None], said: _Said, mark: str) -> _Found | None:
    """What a get command said; None if it ended in the middle."""
    paths, out, at = list(last), said.stdout, 0
    kinds: dict[bytes, list[str]] = {
        kind: [] for kind in (b"long", b"left", b"cut", b"odd", b"gone")
    }
    while True:
        end = out.find(b"\n", at)
        line, at = out[at:end], end + 1
        kind, _, number = line.partition(b" ")
        if end < 0 or (line and kind not in kinds):
            return None
        if not line:
            break
        kinds[kind].append(paths[int(number)])
    contents: dict[str, bytes | TransportError | None] = {}
    for path in sorted(kinds[b"cut"], key=lambda path: last[path] or 0):
        end = out.find(f"\n{mark} ".encode(), at)
        if end < 0:
            return None
        status = out[end + len(mark) + 2 : out.find(b"\n", end + 1)]
        contents[path] = out[at:end] if status == b"0" else _unreadable(path, "tail failed")
        at = end + len(mark) + len(status) + 3
    contents |= {path: _unreadable(path, "it isn't a regular file") for path in kinds[b"odd"]}
    settled = {*contents, *kinds[b"long"], *kinds[b"left"]}
    packed = [path for path in paths if path not in settled]
    came = _untar(out, at) if packed else {}
    if came is None:
        return None
    words = _complaints(said.stderr, set(packed))
    for path in packed:
        content, why = came.get(path.lstrip("/")), words.get(path, "")
        if path in kinds[b"gone"] and (not why or why.endswith(_ABSENT)):
            contents[path] = content
        # A log may grow.
        elif content is None or (why and not (last[path] is not None and "file changed" in why)):
            contents[path] = _unreadable(path, why or "it is left out of the archive")
        else:
            contents[path] = content
    return _Found(contents, kinds[b"long"], kinds[b"left"])


_ABSENT = ("No such file or directory", "Not a directory")


def _unreadable(path: str, why: str) -> TransportError:
    return TransportError(f"can't read {path}: {why}")


def _complaints(words: bytes, paths: set[str]) -> dict[str, str]:
    """What tar said of each file, as `tar: ./path: words`."""
    said = {}
    for line in words.splitlines():
        # It writes odd letters as octal numbers.
        plain = re.sub(rb"\\([0-7]{3}|.)", _unescape, line)
        text = os.fsdecode(plain.partition(b": .")[2])
        for colon in re.finditer(": ", text):
            if text[: colon.start()] in paths:
                said[text[: colon.start()]] = text[colon.end() :]
    return said


def _unescape(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1], 8) % 256]) if len(found[1]) > 1 else found[1]


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _feed(process: _Process, stdin: AsyncIterator[bytes] | None) -> None:
    if stdin is None:
        return
    try:
        async for piece in stdin:
            process.stdin.write(piece)
            await process.stdin.drain()
    except _TROUBLE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise TransportError(f"can't read {error.filename}: {error.strerror}") from error
        # Else it stopped listening: what it said tells why.
    finally:
        with contextlib.suppress(*_TROUBLE):
            process.stdin.write_eof()


async def _end(process: _Process) -> None:
    """Ends a command with all that it started, and gives its channel back."""
    with contextlib.suppress(*_TROUBLE):
        if process.exit_status is None:
            process.kill()
        process.close()
        with anyio.move_on_after(2):
            await process.wait_closed()


# Files.


async def _tar(files: Mapping[str, Content]) -> AsyncIterator[bytes]:
    """A tar archive, piece by piece."""
    for path, content in files.items():
        if isinstance(content, bytes):
            yield _tar_header(path, len(content)) + content + _padding(len(content))
        else:
            async for piece in _tar_file(path, content):
                yield piece
    yield bytes(2 * tarfile.BLOCKSIZE)


async def _tar_file(path: str, source: Path) -> AsyncIterator[bytes]:
    file = await in_thread(_open, source)
    with file:
        size = left = os.fstat(file.fileno()).st_size
        yield _tar_header(path, size)
        while left:
            piece = await in_thread(file.read, min(left, _PIECE))
            # One that was cut meanwhile keeps its promised length.
            piece = piece or bytes(min(left, _PIECE))
            left -= len(piece)
            yield piece
        yield _padding(size)


def _open(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _tar_header(path: str, size: int) -> bytes:
    entry = tarfile.TarInfo(path.lstrip("/"))
    entry.size, entry.mode = size, 0o600
    return entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _untar(archive: bytes, at: int) -> dict[str, bytes] | None:
    """The files, by their path from /, of an archive that begins somewhere in bytes; None if it's not whole."""
    source = io.BytesIO(archive)
    source.seek(at)
    contents = {}
    try:
        with tarfile.open(fileobj=source, mode="r:", encoding="utf-8") as files:
            for member in files:
                # What has two names comes once, and then as a link to that.
                file = files.extractfile(member) if member.isreg() or member.islnk() else None
                if file is not None:
                    contents[member.name.removeprefix(".").lstrip("/")] = file.read()
    except (tarfile.TarError, KeyError):
        return None
    return contents


class _Part:
    """A large file, as far as it has come.

    Attributes:
        path: Where it is.
        here: Where it is to be here.
        size: How much of it is here.
    """

    def __init__(self, path: str, here: str) -> None:
        self.path = path
        self.here = here
        self.restart()

    def restart(self) -> None:
        """Forgets what has come."""
        self.size = 0
        self._crc = 0xFFFFFFFF
        with open(self.here, "wb", opener=_private):
            pass

    def append(self, piece: bytes) -> None:
        """Takes a piece."""
        with open(self.here, "r+b") as file:
            file.seek(self.size)
            file.write(piece)
        # After it is written: what fails in between comes again.
        self._crc = zlib.crc32(piece.translate(_REVERSED), self._crc)
        self.size += len(piece)

    @property
    def checksum(self) -> int:
        """What POSIX's `cksum` says of it."""
        n_bytes = (self.size.bit_length() + 7) // 8
        size = self.size.to_bytes(n_bytes, "little").translate(_REVERSED)
        return int(f"{zlib.crc32(size, self._crc):032b}"[::-1], 2)


# The CRC of cksum is that of zlib with the bits of each byte, and of the sum, the other way round; it
# begins with 0 instead of ones, and ends with the length.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
