"""Channels of the connection: each command has one for as long as it runs.

A host that has answered may drop channels or refuse them: it is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import asyncssh

from ..._host.threads import in_thread
from ..._model.errors import TransportError
from ..protocol import LONGEST_COMMAND, LinkLost, by_stdin
from .framing import PIECE, between, for_any_shell, in_one_piece, marked
from .link import TROUBLE
from .patience import Patience
from .slots import Slots

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .framing import Said
    from .link import Link, Process

_CHANNELS = 8
"""Channels at a time: sshd allows ten by default."""

_REFUSALS = 20
"""How many times in a row a channel may be refused."""

_MUTE = 5
"""How many in a row may be dropped before they speak."""


class Channels:
    """The channels of a link.

    Args:
        link: The connection.

    Attributes:
        link: The same.
        mark: What stands before and after what a command says.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.mark = f"aiohypertunity-{secrets.token_hex(8)}"
        self._slots = Slots(_CHANNELS)
        self._has_answered = False
        self._n_mute = 0
        self._patience = Patience()
        self._opening: set[asyncio.Future[None]] = set()

    async def exchange(
        self,
        command: str,
        stdin: Callable[[], AsyncIterator[bytes]] | None = None,
        timeout: float | None = None,
        *,
        once: bool = False,
    ) -> Said:
        """Runs a command; again, if its channel was dropped before it began to speak.

        Args:
            command: For a POSIX shell.
            stdin: What it reads.
            timeout: Seconds after which it is ended.
            once: It mustn't run twice, and is to say what it says in one piece of text.
        """
        if stdin is None and len(command) > LONGEST_COMMAND:
            command, text = by_stdin(command)
            stdin = functools.partial(only, os.fsencode(text))
        frame = in_one_piece if once else marked
        script = frame(command, self.mark, with_stdin=stdin is not None)
        for is_last in (*[once] * (_MUTE - 1), True):
            async with self.channel(script) as process:
                try:
                    async with asyncio.timeout(timeout):
                        return await self._talk(process, stdin and stdin())
                except TimeoutError:
                    # Its place is for the question whether anybody is there.
                    await _end(process)
                    if not await self._answers():
                        raise LinkLost(f"{self.link.host} doesn't answer") from None
                    raise
                except _Mute as error:
                    if is_last:
                        # It may have begun all the same: what it said may be lost with its channel.
                        raise LinkLost(str(error)) from None
        raise AssertionError("unreachable")

    async def _answers(self) -> bool:
        """Whether the host says anything at all; the connection is given up if not."""
        connection = self.link.current
        if connection is None:
            return False
        try:
            async with asyncio.timeout(5):
                process = await self._create(connection, "exit 0")
                process.close()
        except asyncssh.ChannelOpenError:
            return not connection.is_closed()
        except (TimeoutError, *TROUBLE):
            connection.abort()
            return False
        return True

    @asynccontextmanager
    async def channel(
        self, script: str, give_way: Callable[[], None] | None = None
    ) -> AsyncIterator[Process]:
        """A shell that runs a script, for as long as the `with` lasts."""
        process = await self._open(for_any_shell(script), give_way)
        try:
            yield process
        finally:
            with anyio.CancelScope(shield=True):
                await _end(process)
            self._slots.release(give_way)

    async def _open(self, command: str, give_way: Callable[[], None] | None) -> Process:
        n_refused = 0
        await asyncio.sleep(self._patience.pause())
        while True:
            await self._slots.acquire(give_way)
            release = functools.partial(self._slots.release, give_way)
            try:
                connection = await self.link.connection()
            except BaseException:
                release()
                raise
            try:
                return await self._create(connection, command, release)
            except asyncssh.ChannelOpenError as error:
                if connection.is_closed():
                    raise LinkLost(f"the link to {self.link.host} failed: {error}") from error
                n_refused += 1
                if n_refused > 1:
                    # Twice is no accident: so many are too many.
                    self._slots.shrink()
                if n_refused > _REFUSALS:
                    words = f"{self.link.host} opens no channel: {error}"
                    raise self._trouble(words, final=not self._has_answered) from error
                await asyncio.sleep(0.05 * n_refused)
            except TROUBLE as error:
                raise LinkLost(f"the link to {self.link.host} failed: {error}") from error

    async def _create(
        self,
        connection: asyncssh.SSHClientConnection,
        command: str,
        release: Callable[[], None] = lambda: None,
    ) -> Process:
        """Opens a channel, or releases its place: if that was cancelled, once it has opened and is gone."""
        opening = asyncio.ensure_future(connection.create_process(command, encoding=None))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            ending = asyncio.ensure_future(_end_late(opening, release))
            self._opening.add(ending)
            ending.add_done_callback(self._opening.discard)
            raise
        except BaseException:
            release()
            raise

    async def _talk(self, process: Process, stdin: AsyncIterator[bytes] | None) -> Said:
        try:
            # In this order: whoever is fed must be listened to.
            feeding = asyncio.ensure_future(_feed(process, stdin))
            try:
                out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
            finally:
                feeding.cancel()
                await asyncio.wait([feeding])
        except TROUBLE as error:
            raise LinkLost(f"the link to {self.link.host} failed: {error}") from error
        failed = None if feeding.cancelled() else feeding.exception()
        if failed is not None:
            raise failed
        if len(out) > PIECE:
            said = await in_thread(between, out, err, self.mark)
        else:
            said = between(out, err, self.mark)
        if said is None:
            raise self.muted(process, out + err)
        self.answered()
        if said.status < 0:
            raise self.link.lost_in(process)
        return said

    def muted(self, process: Process, words: bytes) -> TransportError:
        """It ended before it spoke: a channel that was dropped, or a host that runs no commands."""
        if self.link.is_down:
            return self.link.lost_in(process)
        self._n_mute += 1
        said = words.decode(errors="replace").strip()[-500:] or "it says nothing"
        if self._has_answered or self._n_mute < _MUTE:
            return self._trouble(f"{self.link.host} dropped a channel: {said}", final=False)
        return self._trouble(f"{self.link.host} runs no commands: {said}", final=True)

    def _trouble(self, words: str, *, final: bool) -> TransportError:
        self._patience.failed()
        return TransportError(words) if final else _Mute(words)

    def answered(self) -> None:
        """The host does what it's there for."""
        self._has_answered = True
        self._n_mute = 0
        self._patience.succeeded()
        self.link.answered()

    async def aclose(self) -> None:
        """Waits until none is about to open any more: the link is closed."""
        if self._opening:
            await asyncio.wait(self._opening)


class _Mute(LinkLost):
    """A channel was dropped before its command spoke, or didn't open."""


async def only(content: bytes) -> AsyncIterator[bytes]:
    """A stdin of one piece."""
    yield content


async def _feed(process: Process, stdin: AsyncIterator[bytes] | None) -> None:
    if stdin is None:
        return
    try:
        async for piece in stdin:
            process.stdin.write(piece)
            await process.stdin.drain()
    except TROUBLE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise TransportError(f"can't read {error.filename}: {error.strerror}") from error
        # Else it stopped listening: what it said tells why.
    finally:
        with contextlib.suppress(*TROUBLE):
            process.stdin.write_eof()


async def _end_late(opening: asyncio.Future[Process], release: Callable[[], None]) -> None:
    try:
        with contextlib.suppress(*TROUBLE):
            # What was begun runs on there, and counts as a session, until it's ended.
            await _end(await opening)
    finally:
        release()


async def _end(process: Process) -> None:
    """Ends a command with all that it started, and gives its channel back."""
    with contextlib.suppress(*TROUBLE):
        if process.exit_status is None:
            process.kill()
        process.close()
        with anyio.move_on_after(2):
            await process.wait_closed()
