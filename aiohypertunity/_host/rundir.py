"""What a scheduler has on this machine while it runs: two 0700 directories, and a guardian.

One directory is for captured output and results of scripts, under the temporary directory; the other
for large buffers, in shared memory where there is room, so that they are never written to a disk. Both
hold a locked file: a later run removes what it finds unlocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import guardian

_PREFIX = f"aiohypertunity-{os.getuid()}-"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the directories made in it are 0700 and of random names
_ROOM = 64 << 20


class RunDirectory:
    """The directories of a run, and the guardian that ends what is left of it. Blocks: use a thread.

    Attributes:
        path: The directory for output and results.
        run: The first part of every mark of this run.

    Raises:
        OSError: No directory can be made in the temporary directory.
    """

    def __init__(self) -> None:
        self.run = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        bases = dict.fromkeys((tempfile.gettempdir(), _shared_memory()))
        for base in bases:
            _remove_stale(base)
        self._groups: set[int] = set()
        self._locks: list[int] = []
        self._directories: list[str] = []
        try:
            for base in bases:
                self._make(base)
            self._guardian = self._start_guardian()
        except BaseException:
            self._remove()
            raise
        self.path = self._directories[0]

    def _make(self, base: str) -> None:
        try:
            path = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
            self._directories.append(path)
            lock = os.open(f"{path}/new-lock", os.O_WRONLY | os.O_CREAT, 0o600)
            self._locks.append(lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(f"{path}/new-lock", f"{path}/lock")  # never seen unlocked by another run
        except OSError as error:
            error.add_note(
                f"the scheduler needs a directory in {base}: make room there, or set TMPDIR"
            )
            raise

    def _start_guardian(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", guardian.__file__]
        process = guardian.start_guardian(
            lambda: subprocess.Popen(
                [*command, str(os.getpid()), f"{self.run}.", *self._directories],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            ),
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)  # it may be stopped, and the pipe be full
        return process

    def new_mark(self) -> str:
        """A mark for another process tree, for its environment."""
        return f"{self.run}.{next(self._numbers)}."

    def new_path(self, name: str) -> str:
        """A path in the directory that nobody else uses."""
        return f"{self.path}/{next(self._numbers)}-{name}"

    def guard(self, group: int) -> None:
        """From now on the guardian ends this process group if we die."""
        self._groups.add(group)
        self._order(b"+ %d\n" % group)

    def unguard(self, group: int) -> None:
        """The process group is gone, and its number may become another's."""
        self._groups.discard(group)
        self._order(b"- %d\n" % group)

    def _order(self, line: bytes) -> None:
        assert self._guardian.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # somebody killed it: the marks still hold
            self._guardian.stdin.write(line)

    def write(self, buffer: bytes | memoryview) -> str:
        """Stores a large buffer; says in which file.

        Raises:
            OSError: There's no room for it.
        """
        return write_buffer(self._directories, buffer)

    @property
    def buffer_directories(self) -> list[str]:
        """Where large buffers may lie, the best place last."""
        return self._directories

    def close(self) -> None:
        """Ends what is left of all trees, and removes the directories. Blocks.

        The guardian does the same if this process dies meanwhile. Nothing here relies on it: it may be
        stopped, or dead.
        """
        for group in self._groups:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        guardian.kill_tree(None, f"{self.run}.")
        self._remove()
        self._guardian.kill()
        with self._guardian:  # closes the pipe, and waits
            pass

    def _remove(self) -> None:
        for path in self._directories:
            shutil.rmtree(path, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)


def write_buffer(directories: list[str], buffer: bytes | memoryview) -> str:
    """Writes a buffer to a new file in the last of `directories` that has room for it, or the first.

    Raises:
        OSError: There's no room for it.
    """
    from .._wire.payloads import write_file

    size = memoryview(buffer).nbytes
    name = f"buffer-{os.getpid()}-{secrets.token_hex(8)}"
    for directory in reversed(directories):
        if directory is directories[0] or _free(directory) > size + _ROOM:
            write_file(f"{directory}/{name}", buffer)
            return f"{directory}/{name}"
    raise ValueError("no directory to write to")


def _shared_memory() -> str:
    usable = os.path.isdir(_SHARED_MEMORY) and os.access(_SHARED_MEMORY, os.W_OK | os.X_OK)
    return _SHARED_MEMORY if usable else tempfile.gettempdir()


def _free(directory: str) -> int:
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def _remove_stale(base: str) -> None:
    """Removes directories of runs that were killed together with their guardians."""
    with contextlib.suppress(OSError):
        for path in Path(base).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if _is_stale(path):
                    shutil.rmtree(path, ignore_errors=True)


def _is_stale(path: Path) -> bool:
    if path.stat().st_uid != os.getuid():
        return False
    try:
        lock = os.open(path / "lock", os.O_WRONLY)
    except FileNotFoundError:  # another run has just made it, or died while making it
        return time.time() - path.stat().st_mtime > 60
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
