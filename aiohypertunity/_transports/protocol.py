"""The interface of a host that runs shell commands and stores files, local or remote.

A transport runs lines of POSIX shell on one host, and moves files to and from one directory tree there.
No caller knows whether that host is this one. All paths are absolute paths of that host.

A failure to move something (a link, a disk, a missing shell) is a `TransportError`. `Done` has what a
command reports itself. An error of the link says nothing about whether the command ran.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from .._model.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path


Content: TypeAlias = "bytes | Path"
"""What a file is to hold: these bytes, or what this local file holds."""


class LinkLost(TransportError):
    """The link is down, or this machine too busy, and that may pass.

    Nobody knows what became of a command under way.
    """


class Distrusted(LinkLost):
    """The host shows another key than before, which only a person can resolve."""


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
