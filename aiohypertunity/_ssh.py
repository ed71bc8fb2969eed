"""A login node across SSH: the `Transport` of a cluster that this machine isn't part of.

One connection carries everything, in channels: each command has one for as long as it runs, and the
watcher keeps one. Servers bound their number (`MaxSessions`): where one is refused while others are open, we
make do with fewer, and in the end with one, for which the watcher then gives way.

A host that never answered may be a slip of the pen: after some tries that is said. One that has answered is waited
for, whatever it does: drops channels, refuses them, refuses us, or is gone.

What the login shell is and what its rc files print can't be known. So a command goes to /bin/sh, in letters
that mean the same to every shell, and what it says stands between marks. Without the second mark
nobody knows what became of it: that is a `LinkLost`, whatever the channel's exit status says.

Files travel as a tar stream through such a command: it works without SFTP, takes one channel for any number of
files, and is quicker. A large one comes through a channel of its own, from where the last attempt left off.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from ._threads import in_thread, start_thread
from ._transports import LONGEST_COMMAND, Done, LinkLost, by_stdin, private_mode

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

_FIRST = 30.0
"""Seconds for which a host that never answered is tried: it may be down, but it may be a slip as well."""

_LONGEST_PAUSE = 15.0
_SMALL, _LARGE = 16 << 10, 8 << 20
"""Bytes of a file that is small, whatever there is of them; and of one that travels alone, or of an archive."""

_PIECE = 1 << 20

_TROUBLE = (OSError, asyncssh.Error)


class SSH:
    """A host across SSH.

    Args:
        host: `user@host:port`, or an alias of `~/.ssh/config`.
        connect: Options of `asyncssh.connect`, which are for jump hosts too, except the password. And `prompt`:
            what answers when a server asks for a password or a code: a function, sync or async, from
            its words to the answer. A jump host's words begin with its name.
        emit: Takes `LinkDown` and `LinkUp`.
    """

    def __init__(
        self, host: str, connect: Mapping[str, Any] | None, emit: Callable[[Event], None]
    ) -> None:
        self._address = Address.parse(host)
        self._link = _Link(self._address, dict(connect or {}), emit)
        self._slots = _Slots(_CHANNELS)
        self._mark = f"aiohypertunity-{secrets.token_hex(8)}"
        self._has_answered = False
        self._n_mute = 0
        self._patience = _Patience()
        self._opening: set[asyncio.Future[_Process]] = set()
        self._parts: dict[str, _Part] = {}
        self._directory: str | None = None

    @property
    def host(self) -> str:
        """As `Transport.host`."""
        return self._address.host

    async def run(self, command: str, *, stdin: str = "", timeout: float) -> Done:
        """As `Transport.run`. What it takes to have a channel doesn't count for `timeout`."""
        feed = (lambda: _once(os.fsencode(stdin))) if stdin else None
        said = await self._exchange(command, feed, timeout, once=True)
        stdout, ended, words = said.stdout.rpartition(f"\n{self._mark} stderr\n".encode())
        if not ended:
            # Its shell had no process to be had.
            raise LinkLost(f"{self.host} can't run commands now: {said.words}")
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
        try:
            part = await self._part(path)
            for is_last in (False, True):
                if await self._bring(part):
                    break
                await in_thread(part.restart)
                if is_last:
                    raise TransportError(f"{path} on {self.host} came twice with a wrong checksum")
        except OSError as error:
            words = f"can't write what comes of {path} to {tempfile.gettempdir()}: {error.strerror}"
            raise TransportError(words) from error
        del self._parts[path]
        return part.here

    async def _part(self, path: str) -> _Part:
        """What there is of a file here."""
        if self._directory is None:
            prefix = f"aiohypertunity-{os.getuid()}-"
            self._directory = await in_thread(tempfile.mkdtemp, "", prefix)
        if path not in self._parts:
            here = f"{self._directory}/{secrets.token_hex(8)}"
            self._parts[path] = await in_thread(_Part, path, here)
        return self._parts[path]

    async def _bring(self, part: _Part) -> bool:
        """Brings what is missing of a file; says whether the whole is right."""
        path = shlex.quote(part.path)
        summing = asyncio.ensure_future(self._exchange(f"cksum <{path}"))
        try:
            await self._receive(part, f"tail -c +{part.size + 1} {path}")
            words = (await summing).stdout.split()
            if not words:
                raise LinkLost(f"{self.host} can't read {part.path} now")
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
        self._answered()
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
        if self._opening:
            await asyncio.wait(self._opening)
        if self._directory is not None:
            await in_thread(shutil.rmtree, self._directory, True)  # whatever is in the way

    # Channels.

    async def _exchange(
        self,
        command: str,
        stdin: Callable[[], AsyncIterator[bytes]] | None = None,
        timeout: float | None = None,
        *,
        once: bool = False,
    ) -> _Said:
        """Runs a command; again, if its channel was dropped before it began to speak.

        Args:
            command: For a POSIX shell.
            stdin: What it reads.
            timeout: Seconds after which it is ended.
            once: It mustn't run twice, and is to say what it says in one piece of text.
        """
        if stdin is None and len(command) > LONGEST_COMMAND:
            command, text = by_stdin(command)
            stdin = functools.partial(_once, os.fsencode(text))
        frame = _in_one_piece if once else _marked
        script = frame(command, self._mark, with_stdin=stdin is not None)
        for is_last in (*[once] * (_MUTE - 1), True):
            async with self._channel(script) as process:
                try:
                    async with asyncio.timeout(timeout):
                        return await self._talk(process, stdin and stdin())
                except TimeoutError:
                    # Its place is for the question whether anybody is there.
                    await _end(process)
                    if not await self._answers():
                        raise LinkLost(f"{self.host} doesn't answer") from None
                    raise
                except _Mute as error:
                    if is_last:
                        # It may have begun all the same: what it said may be lost with its channel.
                        raise LinkLost(str(error)) from None
        raise AssertionError("unreachable")

    async def _answers(self) -> bool:
        """Whether the host says anything at all; the connection is given up if not."""
        connection = self._link.current
        if connection is None:
            return False
        try:
            async with asyncio.timeout(5):
                process = await self._create(connection, "exit 0")
                process.close()
        except asyncssh.ChannelOpenError:
            return not connection.is_closed()
        except (TimeoutError, *_TROUBLE):
            connection.abort()
            return False
        return True

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
        await asyncio.sleep(self._patience.pause())
        while True:
            await self._slots.acquire(give_way)
            release = functools.partial(self._slots.release, give_way)
            try:
                connection = await self._link.connection()
            except BaseException:
                release()
                raise
            try:
                return await self._create(connection, command, release)
            except asyncssh.ChannelOpenError as error:
                if connection.is_closed():
                    raise LinkLost(f"the link to {self.host} failed: {error}") from error
                n_refused += 1
                if n_refused > 1:
                    # Twice is no accident: so many are too many.
                    self._slots.shrink()
                if n_refused > _REFUSALS:
                    words = f"{self.host} opens no channel: {error}"
                    raise self._trouble(words, final=not self._has_answered) from error
                await asyncio.sleep(0.05 * n_refused)
            except _TROUBLE as error:
                raise LinkLost(f"the link to {self.host} failed: {error}") from error

    async def _create(
        self,
        connection: asyncssh.SSHClientConnection,
        command: str,
        release: Callable[[], None] = lambda: None,
    ) -> _Process:
        """Opens a channel, or releases its place: when it has opened and is closed, if that was cancelled."""
        opening = asyncio.ensure_future(connection.create_process(command, encoding=None))
        try:
            return await asyncio.shield(opening)
        except BaseException:
            self._opening.add(opening)
            if opening.done():
                self._close_late(release, opening)
            else:
                opening.add_done_callback(functools.partial(self._close_late, release))
            raise

    def _close_late(self, release: Callable[[], None], opening: asyncio.Future[_Process]) -> None:
        self._opening.discard(opening)
        release()
        if not opening.cancelled() and opening.exception() is None:
            opening.result().close()

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
        if len(out) > _PIECE:
            said = await in_thread(_between, out, err, self._mark)
        else:
            said = _between(out, err, self._mark)
        if said is None:
            raise self._muted(process, out + err)
        self._answered()
        if said.status < 0:
            raise self._link.lost_in(process)
        return said

    def _muted(self, process: _Process, words: bytes) -> TransportError:
        """It ended before it spoke: a channel that was dropped, or a host that runs no commands."""
        if self._link.is_down:
            return self._link.lost_in(process)
        self._n_mute += 1
        said = words.decode(errors="replace").strip()[-500:] or "it says nothing"
        if self._has_answered or self._n_mute < _MUTE:
            return self._trouble(f"{self.host} dropped a channel: {said}", final=False)
        return self._trouble(f"{self.host} runs no commands: {said}", final=True)

    def _trouble(self, words: str, *, final: bool) -> TransportError:
        self._patience.failed()
        return TransportError(words) if final else _Mute(words)

    def _answered(self) -> None:
        self._has_answered = True
        self._n_mute = 0
        self._patience.succeeded()
        self._link.answered()


if TYPE_CHECKING:
    _Process = asyncssh.SSHClientProcess[bytes]

_REFUSALS = 20
"""How many times in a row a channel may be refused."""

_NOT_FOUND = 127
"""What a shell says of a program that isn't there."""

_MUTE = 5
"""How many in a row may be dropped before they speak."""


class _Mute(LinkLost):
    """A channel was dropped before its command spoke, or didn't open."""


class _Said(NamedTuple):
    """What a command said, between its marks.

    Attributes:
        status: Its exit code; negative if the second mark is missing.
    """

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """The end of its stderr, on one line."""
        lines = self.stderr.decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines[-5:]) or f"exit code {self.status}"


def _between(out: bytes, err: bytes, mark: str) -> _Said | None:
    """What was said between the marks; None if not even the first is there."""
    begin, end = f"\n{mark}\n".encode(), f"\n{mark} ".encode()
    began, ended = out.find(begin), out.rfind(end)
    if began < 0:
        return None
    status = out[ended + len(end) :] if ended >= began else b""
    number = int(status) if status.endswith(b"\n") else -1
    return _Said(number, out[began + len(begin) : ended], err.partition(begin)[2])


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
                process.stdin.write(os.fsencode(f"{line}\n"))

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


class _Patience:
    """How long to wait before the next attempt: the longer they have failed, the longer."""

    def __init__(self) -> None:
        self._since: float | None = None

    def failed(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def succeeded(self) -> None:
        self._since = None

    def pause(self) -> float:
        """Seconds."""
        if self._since is None:
            return 0.0
        pause = min(max((time.monotonic() - self._since) / 8, 0.1), _LONGEST_PAUSE)
        # Not all that lost the same host at the same moment are to come back at the same moment.
        return pause * random.uniform(0.75, 1.0)  # noqa: S311


class _Link:
    """The connection, made when it's first needed and again whenever it was lost."""

    def __init__(
        self, address: Address, options: dict[str, Any], emit: Callable[[Event], None]
    ) -> None:
        self._address = address
        prompt = options.pop("prompt", None)
        self._questions = None if prompt is None else _Questions(prompt)
        self._make_client = options.pop("client_factory", None)
        self._options = options
        self._emit = emit
        self._connection: asyncssh.SSHClientConnection | None = None
        self._attempt: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._patience = _Patience()
        self._first_tried: float | None = None
        self._is_reported_down = False
        self._was_up = False
        self._is_closing = False
        self._slow = False
        self._secret_given = "password" in options

    @property
    def current(self) -> asyncssh.SSHClientConnection | None:
        """The connection, if it stands."""
        if self._connection is not None and self._connection.is_closed():
            self.connection_lost(self._connection, None)
        return self._connection

    @property
    def is_down(self) -> bool:
        return self.current is None

    async def connection(self) -> asyncssh.SSHClientConnection:
        """The connection; made, if there's none, by one attempt for all who ask meanwhile.

        Raises:
            LinkLost: It can't be made now.
            TransportError: It can't be made, and trying again wouldn't help.
        """
        connection = self.current
        if connection is not None:
            return connection
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.get_running_loop().create_task(self._connect())
            self._attempt.add_done_callback(_look_at)
        return await asyncio.shield(self._attempt)

    def lost_in(self, process: _Process) -> LinkLost:
        """What to say when a channel ended too early."""
        host = self._address.host
        if self.is_down:
            return LinkLost(f"the link to {host} failed")
        return LinkLost(f"{host} dropped a channel (exit status {process.exit_status})")

    def answered(self) -> None:
        """It does what it's there for: only then the next trouble is a new one."""
        self._patience.succeeded()

    async def aclose(self) -> None:
        self._is_closing = True
        if self._questions is not None:
            self._questions.close()
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait([self._attempt])
        if self._connection is not None:
            self._connection.close()
            with anyio.move_on_after(2, shield=True):
                await self._connection.wait_closed()

    async def _connect(self) -> asyncssh.SSHClientConnection:
        if self._first_tried is None:
            self._first_tried = time.monotonic()
        pause = self._patience.pause()
        await asyncio.sleep(max(pause, _LONGEST_PAUSE) if pause and self._slow else pause)
        if self._questions is not None:
            await self._questions.answered()
        connection = await self._dial(self._address, self._options)
        if connection.is_closed():
            raise self._lose(f"{self._address.host} closed the connection after the log-in")
        self._connection = connection
        self._was_up, self._slow = True, False
        if self._is_reported_down:
            self._is_reported_down = False
            _LOG.info("the link to %s stands again", self._address.host)
            self._emit(LinkUp(self._address.host, time.time()))
        return connection

    async def _dial(
        self,
        address: Address,
        options: dict[str, Any],
        via: asyncssh.SSHClientConnection | None = None,
        through: frozenset[str] = frozenset(),
    ) -> asyncssh.SSHClientConnection:
        """Logs in to a host, and before that to those on the way to it.

        Args:
            address: The host.
            options: For `asyncssh.connect`.
            via: The last host on the way, if it's known already.
            through: Those for which this one is on the way.
        """
        facts = _Facts(address.host, address.port or 22)
        try:
            way = await in_thread(_resolve, address, options, self._questions is not None)
            facts = _Facts(address.host, way.port, way.known_hosts)
            hop = via
            if hop is None and isinstance(way.tunnel, str) and address.host not in through:
                for name in way.tunnel.split(","):
                    hop = await self._dial(
                        Address.parse(name), _for_hop(options), hop, through | {address.host}
                    )
            try:
                connection = await self._log_in(way, facts, hop, is_hop=bool(through))
            except BaseException:
                if hop is not None:
                    hop.close()
                raise
        except TransportError:
            raise
        except Exception as error:
            raise self._judge(error, facts) from error
        if hop is not None:
            connection.set_tunnel(hop)  # which ends with it
        return connection

    async def _log_in(
        self, way: _Way, facts: _Facts, hop: asyncssh.SSHClientConnection | None, *, is_hop: bool
    ) -> asyncssh.SSHClientConnection:
        tunnel = hop if hop is not None or isinstance(way.tunnel, str) else way.tunnel
        async with asyncio.timeout(way.patience) as deadline:
            return await asyncssh.connect(
                tunnel=tunnel,
                client_factory=lambda: self._client(facts, deadline, is_hop=is_hop),
                **way.options,
            )

    def _judge(self, error: Exception, facts: _Facts) -> TransportError:
        """What a log-in that failed means: to try again, or not."""
        where = facts.host
        words = str(error) or ("no answer" if isinstance(error, TimeoutError) else repr(error))
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return TransportError(facts.distrust(words))
        if isinstance(error, asyncssh.PermissionDenied):
            if self._was_up and not self._secret_given:
                # It knew us: it may still be booting. What somebody typed isn't tried again, though.
                self._slow = True
                return self._lose(f"{where} doesn't let us in at present: {error}")
            return TransportError(f"{where} doesn't let us in: {error}")
        if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ProtocolNotSupported):
            return TransportError(f"can't talk with {where}: {error}")
        if not isinstance(error, OSError | asyncssh.Error):
            # A key that can't be read, an option that makes no sense.
            return TransportError(f"can't log in to {where}: {error}")
        if self._questions is not None and self._questions.is_open:
            self._first_tried = None
            return self._lose(f"{where} waits for somebody to answer: {words}")
        if self._was_up:
            return self._lose(f"can't reach {where}: {words}")
        if isinstance(error, socket.gaierror):
            return TransportError(f"there is no host {where!r}: {error.strerror}")
        if isinstance(error, OSError) and (error.filename or isinstance(error, _WRONG_FILE)):
            return TransportError(f"can't log in to {where}: {error}")
        if self._first_tried is None or time.monotonic() - self._first_tried < _FIRST:
            return self._lose(f"can't reach {where}, port {facts.port}: {words}")
        self._first_tried = None
        return TransportError(f"can't reach {where}, port {facts.port}, in {_FIRST:g} s: {words}")

    def _client(
        self, facts: _Facts, deadline: asyncio.Timeout, *, is_hop: bool
    ) -> asyncssh.SSHClient:
        if self._make_client is not None and not is_hop:
            inner = self._make_client()
        elif self._questions is not None:
            self._questions.prefix = f"{facts.host}: " if is_hop else ""
            inner = _Answering(self._questions, self._gave_secret)
        else:
            inner = asyncssh.SSHClient()
        return _Client(inner, self, facts, deadline)  # type: ignore[return-value]  # it has all its methods

    def _gave_secret(self) -> None:
        self._secret_given = True

    def connection_lost(
        self, connection: asyncssh.SSHClientConnection | None, error: Exception | None
    ) -> None:
        """A connection is gone; it may be one that never stood, or another one."""
        if connection is None or connection is not self._connection or self._is_closing:
            return
        self._connection = None
        self._lose(str(error) if error is not None else "the host closed it")

    def _lose(self, reason: str) -> LinkLost:
        self._patience.failed()
        if not self._is_reported_down:
            self._is_reported_down = True
            _LOG.warning("the link to %s is down: %s", self._address.host, reason)
            self._emit(LinkDown(self._address.host, time.time(), reason))
        return LinkLost(reason)


_WRONG_FILE = (FileNotFoundError, PermissionError)


def _look_at(attempt: asyncio.Task[Any]) -> None:
    # Whoever asked for it may be gone.
    if not attempt.cancelled():
        attempt.exception()


class _Way(NamedTuple):
    """How to log in to a host, by options, OpenSSH's configuration and our defaults, in this order.

    Attributes:
        port: Its port.
        tunnel: The hosts on the way, as ProxyJump has them; or a connection of the user's.
        known_hosts: Where its key is to be found.
        patience: Seconds for the connection; a log-in has its own.
        options: Of `asyncssh.connect`, less the tunnel.
    """

    port: int
    tunnel: object
    known_hosts: Any
    patience: float | None
    options: dict[str, Any]


def _resolve(address: Address, options: dict[str, Any], typing: bool) -> _Way:
    """Looks into the configuration. Blocks."""
    if "options" in options:
        raise TransportError(
            "connect: 'options' is one object for many options: give them one by one"
        )
    # No configuration means the user's, in asyncssh.connect though not in its options.
    options = {"config": (), **options, "host": address.host}
    if address.port is not None:
        options.setdefault("port", address.port)
    if address.user is not None:
        options.setdefault("username", address.user)
    asked = ("host", "port", "username", "config", "tunnel", "known_hosts", "connect_timeout")
    found = asyncssh.SSHClientConnectionOptions(
        client_keys=None, **{name: options[name] for name in asked if name in options}
    )
    defaults = {name: ours for name, word, ours in _DEFAULTS if found.config.get(word) is None}
    defaults["login_timeout"] = _TYPING if typing else _LOGIN
    known_hosts = _known_hosts(address.host, found.known_hosts, is_ours="known_hosts" in options)
    # asyncssh's own deadline for the connection would count the log-in, too.
    options |= {"known_hosts": known_hosts, "connect_timeout": None}
    options.pop("tunnel", None)
    return _Way(
        found.port, found.tunnel, known_hosts, found.connect_timeout or _CONNECT, defaults | options
    )


# What we say unless the user does, and the configuration's word for it.
_DEFAULTS: tuple[tuple[str, str, Any], ...] = (
    ("keepalive_interval", "ServerAliveInterval", _KEEPALIVE),
    ("keepalive_count_max", "ServerAliveCountMax", _KEEPALIVES),
    # Quicker by half than asyncssh's first choice.
    ("encryption_algs", "Ciphers", "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"),
)


def _known_hosts(host: str, known_hosts: Any, *, is_ours: bool) -> Any:
    """Where to find a host's key: never nowhere, which asyncssh would take for a host that needs none."""
    if known_hosts is None:
        raise TransportError(
            f"known_hosts of {host} is none, in connect or as UserKnownHostsFile in ~/.ssh/config: "
            "anybody could take its place; name a file of keys"
        )
    if is_ours:
        return known_hosts
    files = [os.path.expanduser(name) for name in known_hosts or ["~/.ssh/known_hosts"]]
    return [name for name in files if os.access(name, os.R_OK)] or b""


_OF_ONE_HOST = {"host", "port", "username", "password", "tunnel", "proxy_command", "sock"}
_OF_ONE_HOST |= {"host_key_alias", "local_addr", "family"}


def _for_hop(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are good for the hosts on the way, too; a password isn't."""
    return {name: value for name, value in options.items() if name not in _OF_ONE_HOST}


class _Facts:
    """What there is to say of a host whose key isn't trusted.

    Args:
        host: Its name.
        port: Its port.
        known_hosts: Where its key is to be found.
    """

    def __init__(self, host: str, port: int, known_hosts: Any = b"") -> None:
        self.host = host
        self.port = port
        self._known_hosts = known_hosts
        self._shown: tuple[str, str, int, asyncssh.SSHKey] | None = None

    def show(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> None:
        """Takes the key that it showed."""
        self._shown = host, addr, port, key

    def distrust(self, words: str) -> str:
        """Why it isn't trusted, and what to do."""
        if self._shown is None:
            return f"{self.host}: {words}: known_hosts must have its key, as for ssh itself"
        host, addr, port, key = self._shown
        name = host if port == 22 else f"[{host}]:{port}"
        fingerprint = f"fingerprint {key.get_fingerprint()}"
        if _keys_of(self._known_hosts, host, addr, port):
            where = " and ".join(self._lines(host, addr, port)) or "known_hosts"
            return (
                f"the key of {name} has CHANGED: it isn't the one in {where}. Somebody may be listening in, or "
                f"the host was installed anew: ask its owners whether {fingerprint} is right, "
                "and only then remove the old key"
            )
        return (
            f"the key of {name} isn't in known_hosts, so it may be anybody's. If its {fingerprint} "
            f"is the one that its owners give, add this line to "
            f"~/.ssh/known_hosts (ssh-keyscan -p {port} {host} prints it, too):\n"
            f"{name} {key.export_public_key().decode().strip()}"
        )

    def _lines(self, host: str, addr: str, port: int) -> list[str]:
        """The lines that have another key for it."""
        known = self._known_hosts
        files = [known] if isinstance(known, str) else known if isinstance(known, list) else []
        found = []
        for file in files:
            with contextlib.suppress(OSError, ValueError, TypeError):
                lines = Path(file).expanduser().read_text(errors="replace").splitlines()
                for number, line in enumerate(lines, 1):
                    if _keys_of(line.encode(), host, addr, port):
                        found.append(f"{file}, line {number}")
        return found


def _keys_of(known_hosts: Any, host: str, addr: str, port: int) -> bool:
    found = asyncssh.match_known_hosts(known_hosts, host, addr, None if port == 22 else port)
    return bool(found[0])


class _Client:
    """What asyncssh asks and tells, on its way to whom the user named."""

    def __init__(
        self, inner: asyncssh.SSHClient, link: _Link, facts: _Facts, deadline: asyncio.Timeout
    ) -> None:
        self._inner = inner
        self._link = link
        self._facts = facts
        self._deadline = deadline
        self._connection: asyncssh.SSHClientConnection | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connection_made(self, connection: asyncssh.SSHClientConnection) -> None:
        self._connection = connection
        if not self._deadline.expired():
            self._deadline.reschedule(None)
        self._inner.connection_made(connection)

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self._facts.show(host, addr, port, key)
        return self._inner.validate_host_public_key(host, addr, port, key)

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        self._link.connection_lost(self._connection, error)


class _Questions:
    """The server's questions, for somebody who may take their time.

    One that is still open when its log-in is over isn't asked again: the next log-in waits for the answer, and takes
    it. An answer that was given to the server is never used again.
    """

    def __init__(self, prompt: Callable[[str], Any]) -> None:
        self._prompt = prompt
        self._open: tuple[str, asyncio.Future[Any]] | None = None
        self.prefix = ""

    async def ask(self, words: str) -> str:
        """The answer to a question."""
        words = f"{self.prefix}{words}"
        if self._open is None or self._open[0] != words:
            await self.answered()
            self._open = words, self._begin(words)
        answer = self._open[1]
        try:
            return str(await asyncio.shield(answer))
        finally:
            if answer.done():
                self._open = None

    @property
    def is_open(self) -> bool:
        """Whether somebody is still to answer."""
        return self._open is not None and not self._open[1].done()

    def _begin(self, words: str) -> asyncio.Future[Any]:
        if inspect.iscoroutinefunction(self._prompt):
            answering: asyncio.Future[Any] = asyncio.ensure_future(self._prompt(words))
            return answering
        # The process may end though nobody has answered.
        return asyncio.wrap_future(start_thread(self._prompt, words, endless=True))

    async def answered(self) -> None:
        """Waits until no question is open."""
        if self._open is not None:
            await asyncio.wait([self._open[1]])

    def close(self) -> None:
        """Asks no more."""
        if self._open is not None:
            self._open[1].cancel()


class _Answering(asyncssh.SSHClient):
    """Hands the server's questions on, each log-in's once: a wrong answer isn't repeated unasked."""

    def __init__(self, questions: _Questions, gave_secret: Callable[[], None]) -> None:
        self._questions = questions
        self._gave_secret = gave_secret
        self._asked = False

    async def _answer(self, words: str) -> str:
        answer = await self._questions.ask(words)
        self._gave_secret()
        return answer

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
    """The same for text, with its stderr and status behind it, said at once: each piece would be a message."""
    stdin = "" if with_stdin else " </dev/null"
    return f"""\
printf '\\n{mark}\\n'
said=$({{
err=$( (
{command}
) 2>&1 >&3 3>&-{stdin})
status=$?
printf '\\n{mark} stderr\\n%s\\n%s' "$err" "$status"
}} 3>&1)
printf '%s\\n{mark} 0\\n' "$said"
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
        yield _tar_header(path, size, private_mode(file.fileno()))
        while left:
            piece = await in_thread(file.read, min(left, _PIECE))
            # One that was cut meanwhile keeps its promised length.
            piece = piece or bytes(min(left, _PIECE))
            left -= len(piece)
            yield piece
        yield _padding(size)


def _open(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _tar_header(path: str, size: int, mode: int = 0o600) -> bytes:
    entry = tarfile.TarInfo(path.lstrip("/"))
    entry.size, entry.mode = size, mode
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
