"""How commands and files get to where `sbatch` is: `Transport`, and `LocalShell`, this machine.

A transport runs lines of POSIX shell on one host, and moves files to and from one directory tree there.
Nothing above it knows whether that host is this one. All paths are absolute paths of that host.

What fails in the moving (a link, a disk, a missing shell) is a `TransportError`. What a command says of
itself is in `Done`. An error of the link says nothing about whether the command ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import shutil
import signal
import stat
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from ._errors import TransportError
from ._threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from ._events import Event
    from ._slurm import Slurm

Content: TypeAlias = "bytes | Path"
"""What a file is to hold: these bytes, or what this local file holds."""


class LinkLost(TransportError):
    """The link is down, or this machine too busy, and that may pass.

    Nobody knows what became of a command under way.
    """


class Distrusted(LinkLost):
    """The host shows another key than before, which only a person can resolve."""


_TEMPORARY = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What a machine says that has too much to do at the moment."""


class Done(NamedTuple):
    """A command that came to its end.

    Attributes:
        exit_status: Its exit code, negative for a signal; None if nobody knows.
    """

    exit_status: int | None
    stdout: str
    stderr: str


class Wanted(NamedTuple):
    """A file to read.

    Attributes:
        last: Only the last so many bytes of it; None for all.
    """

    path: str
    last: int | None = None


class Lines(Protocol):
    """A command that runs on, and says something now and then."""

    def __aiter__(self) -> AsyncIterator[str]:
        """Its lines, until it ends."""
        ...

    def send(self, line: str) -> None:
        """Writes a line to its stdin, sooner or later; does nothing if it has ended."""


class Transport(Protocol):
    """A shell, and a file system, on some host."""

    @property
    def host(self) -> str | None:
        """The host's name; None for this machine."""

    async def run(self, command: str, *, stdin: str = "", timeout: float) -> Done:
        """Runs a command line.

        Args:
            command: For a POSIX shell.
            stdin: What it reads.
            timeout: Seconds after which it is ended.

        Raises:
            TimeoutError: It took longer, and has been ended.
            LinkLost: It may have run, or not.
            TransportError: It can't be run.
        """
        ...

    async def put(self, files: Mapping[str, Content]) -> None:
        """Writes files, over what may be there; makes missing directories, mode 0700.

        Their mode is 0600; 0700 for what is to hold what a local program does.

        Raises:
            LinkLost: Some may be there; putting them again is harmless.
            TransportError: They can't all be written: the disk is full, say.
        """

    async def get(
        self, files: Sequence[Wanted], *, guard: str | None = None
    ) -> list[bytes | TransportError | None]:
        """Reads files.

        Args:
            files: Which.
            guard: A directory. Nothing is read unless it belongs to this user and nobody else can write
                in it.

        Returns:
            What each holds; None for one that isn't there; and, not raised, a TransportError for one
            that is there and can't be read: a directory, say, or one that we may not read.

        Raises:
            LinkLost: Nothing can be read now.
            TransportError: Nothing can be read at all: it may be somebody else's, say.
        """
        ...

    async def fetch(self, path: str) -> str:
        """Brings a large file here, and says where it is: its own path, if it is here already.

        The caller removes it.

        Raises:
            LinkLost: It couldn't be brought now; what came so far needn't come again.
            TransportError: It can't be brought.
        """
        ...

    def watch(self, command: str) -> AbstractAsyncContextManager[Lines]:
        """Runs a command for as long as the `with` lasts.

        Raises:
            LinkLost: It couldn't be started, or (from the iteration) the link failed.
            TransportError: It can't be started.
        """
        ...

    async def aclose(self) -> None:
        """Lets go of the link."""


LONGEST_COMMAND = 16 << 10
"""Letters of a command; one that is longer goes by stdin. An argument may have 128 KiB, and on its way grow."""


def by_stdin(command: str) -> tuple[str, str]:
    """The same as a short command and its stdin. It runs only if all of it arrives: half a path is another one."""
    end = "# that was all"
    short = f'all=$(cat); case $all in *"{end}") eval "$all" ;; *) exit 1 ;; esac'
    return short, f"{command}\n{end}"


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
        # Shielded: a zombie, and a transport that outlives its loop, would be left.
        await asyncio.shield(asyncio.ensure_future(process.wait()))
    process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - else the pipes wait for the garbage collector


def transport_to(
    slurm: Slurm, emit: Callable[[Event], None], directory: str | None = None
) -> Transport:
    """The way to a cluster.

    Args:
        slurm: The cluster.
        emit: Takes `LinkDown` and `LinkUp`.
        directory: Where large files from there go; if None, one that's made when it's needed.
    """
    if slurm.host is not None:
        # Takes a tenth of a second, and most schedulers don't need it.
        from ._ssh import SSH

        return SSH(slurm.host, slurm.connect, emit, directory)
    return LocalShell()


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
