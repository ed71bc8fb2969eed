"""A large file, through a channel of its own, from where the last attempt left off."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import shutil
import tempfile
import zlib
from typing import TYPE_CHECKING

from ..._host.threads import in_thread
from ..._model.errors import TransportError
from ..protocol import LinkLost
from .framing import PIECE, marked
from .link import TROUBLE

if TYPE_CHECKING:
    from .channels import Channels
    from .link import Process


class Parts:
    """The large files that are on their way here.

    Args:
        channels: Through which they come.
        directory: Where they go; if None, one that's made when it's needed.
    """

    def __init__(self, channels: Channels, directory: str | None) -> None:
        self._channels = channels
        self._link = channels.link
        self._mark = channels.mark
        self._parts: dict[str, Part] = {}
        self._directory = directory
        self._is_ours = directory is None

    async def fetch(self, path: str) -> str:
        """As `Transport.fetch`."""
        try:
            part = await self._part(path)
            for is_last in (False, True):
                if await self._bring(part):
                    break
                await in_thread(part.restart)
                if is_last:
                    raise TransportError(
                        f"{path} on {self._link.host} came twice with a wrong checksum"
                    )
        except OSError as error:
            where = self._directory or tempfile.gettempdir()
            words = f"can't write what comes of {path} to {where}: {error.strerror}"
            raise TransportError(words) from error
        del self._parts[path]
        return part.here

    async def _part(self, path: str) -> Part:
        """What there is of a file here."""
        if self._directory is None:
            self._directory = await in_thread(tempfile.mkdtemp, "", "aiohypertunity-large-")
        if path not in self._parts:
            here = f"{self._directory}/large-{secrets.token_hex(8)}"
            self._parts[path] = await in_thread(Part, path, here)
        return self._parts[path]

    async def _bring(self, part: Part) -> bool:
        """Brings what is missing of a file; says whether the whole is right."""
        path = shlex.quote(part.path)
        summing = asyncio.ensure_future(self._channels.exchange(_SUM.format(path=path)))
        try:
            await self._receive(part, f"tail -c +{part.size + 1} {path}")
            words = (await summing).stdout.split()
            if not words:
                raise LinkLost(f"{self._link.host} can't read {part.path} now")
        finally:
            summing.cancel()
            await asyncio.wait([summing])
        return await in_thread(part.agrees, words)

    async def _receive(self, part: Part, command: str) -> None:
        """Appends to a file what a command says."""
        begin, end = f"\n{self._mark}\n".encode(), f"\n{self._mark} 0\n".encode()
        async with self._channels.channel(marked(command, self._mark)) as process:
            last = await self._read_until(process, begin)
            while block := await self._read_block(process):
                if len(block) < len(end):  # then the mark may have begun before it
                    last += block
                    continue
                await in_thread(part.append, last)
                last = block
            if last.rpartition(f"\n{self._mark} ".encode())[1] and not last.endswith(end):
                raise TransportError(f"can't read {part.path} on {self._link.host}")
            # It ends with the mark, or with as much of it as has come.
            await in_thread(part.append, last[: -len(end)])
            if not last.endswith(end):
                raise self._link.lost_in(process)

    async def _read_until(self, process: Process, mark: bytes) -> bytes:
        """Reads as far as a mark; gives what came after it."""
        seen = b""
        while mark not in seen:
            piece = await self._read_piece(process)
            if not piece:
                raise self._channels.muted(process, seen)
            seen += piece
        self._channels.answered()
        return seen.partition(mark)[2]

    async def _read_block(self, process: Process) -> bytes:
        """Reads so much that it's worth a thread's while; nothing at the end."""
        pieces, size = [], 0
        while size < PIECE and (piece := await self._read_piece(process)):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    async def _read_piece(self, process: Process) -> bytes:
        try:
            return await process.stdout.read(PIECE)
        except TROUBLE as error:
            raise LinkLost(f"the link to {self._link.host} failed: {error}") from error

    async def aclose(self) -> None:
        """Removes whatever of them is still here, as far as nobody else does."""
        if self._is_ours and self._directory is not None:
            await in_thread(shutil.rmtree, self._directory, True)  # whatever is in the way


class Part:
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
        self._crc = 0
        with open(self.here, "wb", opener=_private):
            pass

    def append(self, piece: bytes) -> None:
        """Takes a piece."""
        with open(self.here, "r+b") as file:
            file.seek(self.size)
            file.write(piece)
        # After it is written: what fails in between comes again.
        self._crc = zlib.crc32(piece, self._crc)
        self.size += len(piece)

    def agrees(self, said: list[bytes]) -> bool:
        """Whether the checksum there is that of what is here. Blocks.

        Args:
            said: What `_SUM` said, by words.
        """
        if said[0] == b"zlib":
            return said[1:] == [b"%d" % self._crc, b"%d" % self.size]
        return said == [b"%d" % _posix_checksum(self.here), b"%d" % self.size]


# Python where there is one: to compute the sum of cksum here takes as long as all the rest.
_CODE = """\
import sys, zlib
crc = size = 0
while piece := sys.stdin.buffer.read(1 << 20):
    crc, size = zlib.crc32(piece, crc), size + len(piece)
print("zlib", crc, size)"""
_SUM = f"python3 -ISc {shlex.quote(_CODE)} <{{path}} 2>/dev/null || cksum <{{path}}"


def _posix_checksum(path: str) -> int:
    """What POSIX's `cksum` says of a file.

    Its CRC is that of zlib with the bits of each byte, and of the sum, the other way round; it begins with 0
    instead of ones, and ends with the length.
    """
    crc, size = 0xFFFFFFFF, 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            crc, size = zlib.crc32(piece.translate(_REVERSED), crc), size + len(piece)
    length = size.to_bytes((size.bit_length() + 7) // 8, "little").translate(_REVERSED)
    return int(f"{zlib.crc32(length, crc):032b}"[::-1], 2)


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
