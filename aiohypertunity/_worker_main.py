"""What runs in a worker process: one call at a time, off a socket, until the socket ends.

A worker *takes* a call by reading it off the socket; the driver may take it back the same way as long as
it lies there unread. So the kernel decides who has it, and a call that ran is told from one that didn't
without a word between the two.

Packets to the worker: a kind byte, then
    `f`  number (u32), function blob                 a function, known by that number from now on
    `F`  number (u32), pickle of (path, files)       the same, its blob in a file
    `c`  call's number (u64), function's (u32), payload
    `C`  call's number (u64), function's (u32), pickle of `Extras`
Packets from it:
    `v` `x` `p`  call's number, started, finished (f64, seconds since the epoch), the reply's pickle
    `o`          the same header, then a pickle of (kind, reply's pickle, files, stdout, stderr)
    `O`          the same header, then a pickle of (kind, the file with what would follow)
The shared page begins with four doubles: the running call's number, when it started, and where in the
files of stdout and stderr its own output begins.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal makes an enum of what it finds, at 4 µs a piece
import atexit
import contextlib
import ctypes
import faulthandler
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _payload
from ._payload import PACKET

if TYPE_CHECKING:
    from collections.abc import Callable

TAIL = 65_536
"""How many bytes of each stream a result carries."""

LONGEST = 2 * PACKET
"""No packet is longer: a payload, and the paths of the files beside it."""

KNOWN_FUNCTIONS = 32
"""How many functions a worker keeps; the oldest go first, and the driver counts along."""

FUNCTION = struct.Struct("<cI")
CALL = struct.Struct("<cQI")
REPLY = struct.Struct("<cQdd")

_TRIM = 1 << 20
_HANDLERS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
)


class Extras(NamedTuple):
    """What a call brings besides a short payload.

    Attributes:
        payload: The payload, or None if it lies in `path`.
        path: A file with the payload.
        files: Those of its large buffers.
        cwd: The directory to run in.
        logs: The files to write its stdout and stderr to, where they are kept.
        chunk: Whether the payload is a list of single arguments, to be called with one by one.
    """

    payload: bytes | None = None
    path: str | None = None
    files: tuple[str, ...] = ()
    cwd: str | None = None
    logs: tuple[str, str] | None = None
    chunk: bool = False


class Streams:
    """This process's stdout and stderr, in two files of its own; C-level writes included."""

    def __init__(self, paths: tuple[str, str]) -> None:
        self._files = [os.open(p, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for p in paths]
        self._current = list(self._files)
        self._fflush = ctypes.CDLL(None).fflush
        self._from = [0, 0]
        self._attach(self._files)
        self._open()

    def _open(self) -> None:
        # Line by line, so that the last words of a process that is killed are there to be read.
        self._python = [
            open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115 - for life
            for number in (1, 2)
        ]
        sys.stdout, sys.stderr = self._python

    def _attach(self, files: list[int]) -> None:
        self._current = files
        self._inodes = [os.fstat(file).st_ino for file in files]
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)

    def mend(self) -> None:
        """Undoes whatever a call has done to the streams."""
        try:
            inodes = [os.fstat(1).st_ino, os.fstat(2).st_ino]
        except OSError:
            inodes = []
        if inodes != self._inodes:
            self._attach(self._current)
        stdout, stderr = self._python
        if stdout.closed or stderr.closed:
            self._open()
        sys.stdout, sys.stderr = self._python

    def _sizes(self) -> list[int]:
        """How much there is. By seeking, which is several times as quick as fstat; they are appended to."""
        stdout, stderr = self._current
        return [os.lseek(stdout, 0, os.SEEK_END), os.lseek(stderr, 0, os.SEEK_END)]

    def begin(self, logs: tuple[str, str] | None) -> list[int]:
        """A call starts: what is written from now on is its own. Says from where in the files."""
        if logs is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._attach([os.open(path, flags, 0o644) for path in logs])
        sizes = self._sizes()
        if max(sizes) > _TRIM and logs is None:
            for file in self._files:
                os.ftruncate(file, 0)
            sizes = [0, 0]
        self._from = sizes
        return sizes

    def end(self) -> tuple[bytes, bytes] | None:
        """The call is over: the tails of what it wrote, or None if it was silent."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed or replaced by the call, or a full disk
                stream.flush()
        self._fflush(None)
        # The call may have put something else in the place of these descriptors.
        tails = None
        if self._sizes() != self._from:
            tails = tuple(map(tail, self._current, self._from))
        if self._current is not self._files:
            for file in self._current:
                os.close(file)
            self._attach(self._files)
        return tails  # type: ignore[return-value]  # there are two


def tail(file: int, start: int = 0) -> bytes:
    """The last `TAIL` bytes of a file from `start` on; a file cut in the meantime is read whole."""
    size = os.fstat(file).st_size
    if size < start:
        start = 0
    return os.pread(file, TAIL, max(start, size - TAIL))


def raw_environ() -> dict[Any, Any]:
    """A copy of the environment as the system has it: ten times as quick as one of `os.environ`."""
    return dict(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001


def has_environ(raw: dict[Any, Any]) -> bool:
    """Whether the environment is what it was when `raw_environ` gave `raw`."""
    return bool(os.environ._data == raw)  # type: ignore[attr-defined]  # noqa: SLF001


class Surroundings:
    """What a call may change in its process, to be put right before the next."""

    def __init__(self) -> None:
        self._cwd = os.getcwd()
        self._environ = dict(os.environ)
        self._raw_environ = raw_environ()
        self._handlers = [(int(number), _signal.getsignal(number)) for number in _HANDLERS]

    def restore(self) -> None:
        """Puts back directory, environment, signal handlers and timers."""
        try:
            if os.getcwd() != self._cwd:
                os.chdir(self._cwd)
        except OSError:  # somebody removed the directory
            with contextlib.suppress(OSError):
                os.chdir(self._cwd)
        if not has_environ(self._raw_environ):
            os.environ.clear()
            os.environ.update(self._environ)
        signal.alarm(0)
        for number, handler in self._handlers:
            if _signal.getsignal(number) is not handler:
                signal.signal(number, handler)


class Worker:
    """The loop of a worker process.

    Args:
        calls: The socket of packets.
        page: The shared page.
        streams: The paths of the files for stdout and stderr.
        directories: Where large buffers may be written.
    """

    def __init__(
        self,
        calls: socket.socket,
        page: mmap.mmap,
        streams: tuple[str, str],
        directories: list[str],
    ) -> None:
        self._socket = calls
        self._page = memoryview(page).cast("d")
        self._streams = Streams(streams)
        self._directories = directories
        self._surroundings = Surroundings()
        self._blobs: dict[int, tuple[bytes, list[str]]] = {}
        self._functions: dict[int, Callable[..., Any]] = {}

    def run(self) -> None:
        """Takes calls until the other end is closed."""
        while True:
            packet = self._socket.recv(LONGEST)
            kind = packet[:1]
            if kind in (b"c", b"C"):
                self._call(packet)
            elif kind == b"f":
                self._learn(FUNCTION.unpack_from(packet)[1], packet[FUNCTION.size :], [])
            elif kind == b"F":
                self._learn(FUNCTION.unpack_from(packet)[1], *pickle.loads(packet[FUNCTION.size :]))  # noqa: S301
            else:
                return

    def _learn(self, number: int, blob: bytes | str, files: list[str]) -> None:
        if len(self._blobs) >= KNOWN_FUNCTIONS:
            oldest = next(iter(self._blobs))
            del self._blobs[oldest]
            self._functions.pop(oldest, None)
        if isinstance(blob, str):
            try:
                with open(blob, "rb") as file:
                    blob = file.read()
            except FileNotFoundError:  # the call that brought it was taken back
                return
        self._blobs[number] = blob, files

    def _function(self, number: int) -> Callable[..., Any]:
        function = self._functions.get(number)
        if function is None:
            blob, files = self._blobs[number]
            function = _payload.load_function(blob, files)
            if not files:  # else it would keep large buffers mapped when the last job is long done
                self._functions[number] = function
        return function

    def _call(self, packet: bytes) -> None:
        kind, number, function = CALL.unpack_from(packet)
        body = memoryview(packet)[CALL.size :]
        extras = Extras(*pickle.loads(body)) if kind == b"C" else _NO_EXTRAS  # noqa: S301
        self._page[2], self._page[3] = self._streams.begin(extras.logs)
        self._page[1] = started = time.time()
        # The number last: who reads it finds the rest already there.
        self._page[0] = number
        reply = _payload.run(
            lambda: self._prepared(function, extras),
            lambda: _arguments(extras, body),
            self._write,
        )
        self._answer(number, started, *reply, self._streams.end())
        # Only now: what the next call needs doesn't keep the driver from this one's answer.
        self._surroundings.restore()
        self._streams.mend()

    def _prepared(self, number: int, extras: Extras) -> Callable[..., Any]:
        if extras.cwd is not None:
            try:
                os.chdir(extras.cwd)
            except OSError as error:  # it was there at dispatch: it's the call that fails
                return _Failing(error)
        function = self._function(number)
        return Chunk(function) if extras.chunk else function

    def _answer(
        self,
        number: int,
        started: float,
        kind: bytes,
        blob: bytes,
        files: list[str],
        tails: tuple[bytes, bytes] | None,
    ) -> None:
        bare = kind, blob
        if files or tails:
            blob = pickle.dumps((kind, blob, files, *(tails or (b"", b""))))
            kind = b"o"
        if len(blob) > PACKET:
            try:
                kind, blob = b"O", pickle.dumps((kind, self._write(memoryview(blob))))
            except OSError as error:
                if files or len(bare[1]) > PACKET:
                    kind, blob, _ = _payload.unreadable("the return value", error)
                else:  # on a full disk rather the outcome without the output than neither
                    kind, blob = bare
        self._socket.send(REPLY.pack(kind, number, started, time.time()) + blob)

    def _write(self, buffer: memoryview) -> str:
        from ._rundir import write_buffer

        return write_buffer(self._directories, buffer)


_NO_EXTRAS = Extras()


def _arguments(extras: Extras, body: memoryview) -> Any:
    if extras is _NO_EXTRAS:
        return pickle.loads(body)  # noqa: S301 - from the process that started this one
    if extras.path is not None:
        with open(extras.path, "rb") as file:
            return _payload.loads(file.read(), extras.files)
    return _payload.loads(extras.payload or b"", extras.files)


class _Failing:
    """Raises what is the matter when it's called."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error


class Chunk:
    """Calls a function with one argument after the other; gives what came before the first error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *inputs: Any) -> list[Any] | _payload.FailedChunk:
        values: list[Any] = []
        append, function = values.append, self._function
        try:
            for item in inputs:
                append(function(item))
        except BaseException as error:
            kind, body, _ = _payload.raised(error)
            return _payload.FailedChunk(values, kind, body, _payload.short(inputs[len(values)]))
        return values


def main(
    calls: int, page: int, streams: tuple[str, str], directories: list[str], argv: list[str]
) -> None:
    """A worker's life, to the end of its process.

    Args:
        calls: The descriptor of the socket.
        page: The descriptor of the shared page.
        streams: Paths for stdout and stderr.
        directories: Where large buffers may be written.
        argv: The driver's `sys.argv`.
    """
    sys.argv = argv
    faulthandler.enable()
    with mmap.mmap(page, mmap.PAGESIZE) as shared:
        os.close(page)
        worker = Worker(socket.socket(fileno=calls), shared, streams, directories)
        with contextlib.suppress(ConnectionError):
            worker.run()
        # A thread that a call left behind must not keep this process; what it registered still runs.
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # noqa: SLF001 - what os._exit leaves out
        os._exit(0)
