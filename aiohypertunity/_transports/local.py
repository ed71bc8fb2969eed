"""The transport of this machine: commands by /bin/sh, files by their paths."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import shutil
import signal
import stat
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from .._host.threads import in_thread
from .._model.errors import TransportError
from .protocol import LONGEST_COMMAND, Content, Done, Lines, LinkLost, Wanted, by_stdin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence


_TEMPORARY = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What a machine says that has too much to do at the moment."""


class LocalShell:
    """This machine, by /bin/sh."""

    host = None

    async def run(self, command: str, *, stdin: str = "", timeout: float) -> Done:
        """As `Transport.run`."""
        if not stdin and len(command) > LONGEST_COMMAND:
            command, stdin = by_stdin(command)
        process = await _start(command)
        try:
            async with asyncio.timeout(timeout):
                stdout, stderr = await process.communicate(os.fsencode(stdin))
        finally:
            await _end(process)
        assert process.returncode is not None
        return Done(
            process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace")
        )

    async def put(self, files: Mapping[str, Content]) -> None:
        """As `Transport.put`."""
        try:
            await in_thread(_write_all, files)
        except OSError as error:
            kind = LinkLost if error.errno in _TEMPORARY else TransportError
            raise kind(f"can't write {error.filename}: {error.strerror}") from error

    async def get(
        self, files: Sequence[Wanted], *, guard: str | None = None
    ) -> list[bytes | TransportError | None]:
        """As `Transport.get`."""
        return await in_thread(_read_all, files, guard)

    async def fetch(self, path: str) -> str:
        """As `Transport.fetch`."""
        return path

    @asynccontextmanager
    async def watch(self, command: str) -> AsyncIterator[Lines]:
        """As `Transport.watch`."""
        process = await _start(command)
        try:
            yield _LocalLines(process)
        finally:
            await _end(process)

    async def aclose(self) -> None:
        """As `Transport.aclose`."""


class _LocalLines:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __aiter__(self) -> AsyncIterator[str]:
        stdout = self._process.stdout
        assert stdout is not None
        while line := await stdout.readline():
            yield line.decode(errors="replace").rstrip("\n")

    def send(self, line: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        if not stdin.is_closing():
            stdin.write(os.fsencode(f"{line}\n"))


_LONGEST_LINE = 1 << 22


async def _start(command: str) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        kind = LinkLost if error.errno in _TEMPORARY else TransportError
        raise kind(f"can't start /bin/sh: {error.strerror}") from error


def _environment() -> dict[str, str]:
    """Ours, less what Slurm's commands would take for options, if we are a job ourselves or not."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _WAYS or not name.startswith(_OPTIONS)
    }


_OPTIONS = tuple(
    f"{program}_"
    for program in ("SLURM", "SLURMD", "SBATCH", "SQUEUE", "SCANCEL", "SACCT", "SINFO", "SCONTROL")
)
_WAYS = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}
"""How to get to Slurm at all."""


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A zombie, and a transport that outlives its loop, would be left. A cancelled scope of anyio
        # cancels again and again, so that asyncio's shield alone does not last.
        with anyio.CancelScope(shield=True):
            await asyncio.shield(asyncio.ensure_future(process.wait()))
    process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - else the pipes wait for the garbage collector


def _write_all(files: Mapping[str, Content]) -> None:
    for path, content in files.items():
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            if isinstance(content, Path):
                _copy(content, path)
            else:
                with open(path, "wb", opener=_private) as file:
                    file.write(content)
        except OSError as error:
            # What is written to has no name in the error, but it's the one that matters.
            error.filename = error.filename or path
            raise


def _copy(source: Path, path: str) -> None:
    with source.open("rb") as from_file, open(path, "wb", opener=_private) as to_file:
        os.fchmod(to_file.fileno(), private_mode(from_file.fileno()))
        shutil.copyfileobj(from_file, to_file, 1 << 20)


def private_mode(descriptor: int) -> int:
    """The mode of a copy of a file: a program stays one."""
    return 0o600 | os.fstat(descriptor).st_mode & stat.S_IXUSR


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def not_ours(guard: str) -> TransportError:
    """Return the error of a directory in which others may have put what is to be read."""
    return TransportError(
        f"{guard} is not a directory of this user's alone any more, and what lies in it is not read: "
        "see who else can write in the directories above it"
    )


def _read_all(files: Sequence[Wanted], guard: str | None) -> list[bytes | TransportError | None]:
    if guard is None:
        return [_read(wanted.path, wanted.last) for wanted in files]
    with contextlib.ExitStack() as stack:
        directory = _open_own(guard)
        if directory is not None:
            stack.callback(os.close, directory)
        contents: list[bytes | TransportError | None] = []
        for path, last in files:
            below = path.removeprefix(f"{guard}/")
            if below == path:
                contents.append(_read(path, last))
            elif directory is None:
                contents.append(None)
            else:
                contents.append(_read(below, last, directory))
        return contents


def _open_own(path: str) -> int | None:
    """Open a directory that nobody else can write in; return None if it isn't there.

    What is renamed into its place later is not what its descriptor leads to.
    """
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in _TEMPORARY:
            raise LinkLost(f"can't read {path}: {error.strerror}") from error
        raise not_ours(path) from error
    if not _is_ours(os.fstat(directory)):
        os.close(directory)
        raise not_ours(path)
    return directory


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(path: str, last: int | None, within: int | None = None) -> bytes | TransportError | None:
    try:
        # Not blocking: a FIFO would wait for somebody to write.
        with open(path, "rb", opener=functools.partial(_at_once, within=within)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return TransportError(f"can't read {path}: it isn't a regular file")
            if last is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last))
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        words = f"can't read {path}: {error.strerror}"
        if error.errno in _TEMPORARY:
            raise LinkLost(words) from error
        return TransportError(words)


def _at_once(path: str, flags: int, within: int | None = None) -> int:
    return os.open(path, flags | os.O_NONBLOCK, dir_fd=within)
