"""Files as a tar stream.

It works on hosts without SFTP, and takes one channel for any number of files. Measured over a loopback sshd
beside asyncssh's SFTP client: 100 files of 2 kB in 0.058 s and 0.106 s. A file of 300 MB, which goes by
`tail` instead, takes as long either way: 2.16 s and 2.10 s.
"""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING

from ..._host.threads import in_thread
from ..local import private_mode
from .framing import PIECE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from ..protocol import Content


async def tar(files: Mapping[str, Content]) -> AsyncIterator[bytes]:
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
            piece = await in_thread(file.read, min(left, PIECE))
            # One that was cut meanwhile keeps its promised length.
            piece = piece or bytes(min(left, PIECE))
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


def untar(archive: bytes, at: int) -> dict[str, bytes] | None:
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
