"""What runs in a worker process: one call at a time, off a socket, until the socket ends.

A worker *takes* a call by reading it off the socket; the driver may take it back the same way as long as
it lies there unread. So the kernel decides who has it, and a call that ran is told from one that didn't
without a word between the two.

Packets to the worker: a kind byte, the call's number (u64), its function's (u32), the length of what
introduces the function (u32; 0 if the worker should know it), that introduction, then
    `c`  payload
    `C`  pickle of `Extras`
An introduction is a kind byte, then
    `f`  function blob
    `F`  pickle of (path of a file with the blob, or the blob; files)
Packets from it:
    `v` `x` `p`  call's number, started, finished (f64, seconds since the epoch), the reply's pickle
    `o`          the same header, then a pickle of (kind, reply's pickle, files, stdout, stderr)
    `O`          the same header, then a pickle of (kind, the file with what would follow)
    `u`          the same header: the call was not run, since the worker does not know its function
A function lies in the place that its number gives it, and each call is checked against what lies there.
So the driver's picture of what a worker knows may be wrong at any time: it costs a `u`, never a job. Taking
calls back makes it wrong, for example, when the packet with an introduction is taken back and the worker
reads the next one. An introduction travels in the packet of the call that needs it, hence an idle worker's
socket is always empty.

The shared page begins with four doubles: the running call's number, when it started, and where in the
files of stdout and stderr its own output begins.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # see Surroundings
import atexit
import contextlib
import ctypes
import errno
import faulthandler
import mmap
import os
import pickle
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..._host.tails import tail
from ..._wire import payloads
from ..._wire.payloads import PACKET

if TYPE_CHECKING:
    from collections.abc import Callable


LONGEST = 3 * PACKET
"""No packet to a worker is longer: a function, a payload, and the paths of the files beside it."""

KNOWN_FUNCTIONS = 32
"""The number of places for functions. The one of number n takes the place of the one of n - 32."""

CALL = struct.Struct("<cQII")
REPLY = struct.Struct("<cQdd")

LONGEST_REPLY = REPLY.size + PACKET
"""No packet from a worker is longer."""

UNKNOWN = b"u"
"""The kind of reply to a call whose function the worker does not know."""

REPLIES = frozenset({payloads.VALUE, payloads.RAISED, payloads.UNREADABLE, b"o", b"O", UNKNOWN})
"""All kinds of reply."""

_TRIM = 1 << 20
_RLIMIT_LOCKS = 10
"""The limit by which `guardian` knows a tree; the `resource` module has no name for it."""

_SIGNALS = sorted(map(int, _signal.valid_signals()))
_TIMERS = (_signal.ITIMER_REAL, _signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF)
_LONG = 0.0005
"""Seconds from which on a call is long: whatever takes 10 µs more after it costs next to nothing."""


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
            try:
                stream.flush()
            except Exception:  # noqa: S110 - closed or replaced by the call, or a full disk
                pass
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


def raw_environ() -> dict[Any, Any]:
    """A copy of the environment as the system has it: ten times as quick as one of `os.environ`."""
    return dict(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001


def has_environ(raw: dict[Any, Any]) -> bool:
    """Whether the environment is what it was when `raw_environ` gave `raw`."""
    return bool(os.environ._data == raw)  # type: ignore[attr-defined]  # noqa: SLF001


class Surroundings:
    """The state of the process that a call may change, to be restored before the next call.

    Each is read, and written only where it differs. Reading the handlers, the mask and the timers takes
    3 µs, and reading the 16 limits 7 µs, more than all else that a short call costs. A short call is spared
    both unless its process has imported `signal` or `resource`, the public ways to set any; so neither is
    in `sys.modules` at first. (`signal.getsignal` would also make an enum of each handler, at 4 µs.)
    Handlers that C code installed behind Python's back are left alone: some
    runtimes that a call loads (Julia's, say) do not work without theirs.
    """

    def __init__(self) -> None:
        self._cwd = os.getcwd()
        self._environ = dict(os.environ)
        self._raw_environ = raw_environ()
        was_imported = "resource" in sys.modules
        import resource

        if not was_imported:
            del sys.modules["resource"]
        numbers = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
        if sys.platform == "linux":
            numbers.add(_RLIMIT_LOCKS)
        self._resource, self._limited = resource, sorted(numbers)
        self.keep()

    def keep(self) -> None:
        """Take what is set at present for what is to be restored.

        What a module sets when it is imported lasts as long as the module does. Otherwise a module that raises
        the recursion limit would work for the first call only, the one that imports it.
        """
        self._handlers = list(map(_signal.getsignal, _SIGNALS))
        self._mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._limits = self._read_limits()
        self._recursion_limit = sys.getrecursionlimit()

    def _read_limits(self) -> list[tuple[int, int]]:
        return list(map(self._resource.getrlimit, self._limited))

    def restore(self, seconds: float) -> bool:
        """Restore all of it after a call that took `seconds`. Return False if something can't be restored."""
        try:
            is_long = seconds > _LONG
            if is_long or "signal" in sys.modules:
                self._restore_timers()
                self._restore_signals()
            self._restore()
            if is_long or "resource" in sys.modules:
                self._restore_limits()
        except BaseException:  # a handler that the call installed may raise anything
            return False
        return True

    def _restore_timers(self) -> None:
        # Before the handlers: a timer would end in one that is restored.
        for timer in _TIMERS:
            _signal.setitimer(timer, 0)
        _signal.set_wakeup_fd(-1)

    def _restore(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        os.umask(self._umask)
        if sys.getrecursionlimit() != self._recursion_limit:
            sys.setrecursionlimit(self._recursion_limit)
        try:
            if os.getcwd() != self._cwd:
                os.chdir(self._cwd)
        except OSError:  # somebody removed the directory
            with contextlib.suppress(OSError):
                os.chdir(self._cwd)
        if not has_environ(self._raw_environ):
            os.environ.clear()
            os.environ.update(self._environ)

    def _restore_limits(self) -> None:
        if self._read_limits() != self._limits:
            for number, limits in zip(self._limited, self._limits, strict=True):
                self._resource.setrlimit(number, limits)

    def _restore_signals(self) -> None:
        masked = _signal.pthread_sigmask(_signal.SIG_BLOCK, ()) != self._mask
        if masked:
            for number in _signal.sigpending():  # to ignore one that is pending discards it
                _signal.signal(number, _signal.SIG_IGN)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, self._mask)
        if list(map(_signal.getsignal, _SIGNALS)) != self._handlers:
            for number, handler in zip(_SIGNALS, self._handlers, strict=True):
                if _signal.getsignal(number) is not handler:
                    _signal.signal(number, handler)


class _Known:
    """A function that the driver introduced.

    Attributes:
        number: Its number.
        blob: The function blob, or the path of a file with it.
        files: The files of its large buffers.
        function: The function, once it is loaded. One with large buffers is loaded for each call: it
            would keep them mapped when the last job is long done.
    """

    __slots__ = ("blob", "files", "function", "number")

    def __init__(self, number: int, introduction: memoryview) -> None:
        self.number = number
        self.blob: bytes | str
        self.files: list[str] = []
        self.function: Callable[..., Any] | None = None
        if bytes(introduction[:1]) == b"F":
            self.blob, self.files = pickle.loads(introduction[1:])  # noqa: S301 - from the driver
        else:
            self.blob = bytes(introduction[1:])


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
        self._socket_type = calls.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        self._page = memoryview(page).cast("d")
        self._streams = Streams(streams)
        self._directories = directories
        self._surroundings = Surroundings()
        self._functions: list[_Known | None] = [None] * KNOWN_FUNCTIONS
        self._pid = os.getpid()

    def run(self) -> None:
        """Take calls until the other end is closed, or this process can't be restored after one."""
        # A buffer that is made once: `recv` would map and unmap one of this size for each call.
        buffer = memoryview(bytearray(LONGEST))
        while (size := self._socket.recv_into(buffer)) and self._call(buffer[:size]):
            pass

    def _function(self, known: _Known) -> Callable[..., Any]:
        if known.function is not None:
            return known.function
        n_modules = len(sys.modules)
        if isinstance(known.blob, str):
            try:
                with open(known.blob, "rb") as file:
                    known.blob = file.read()
            except OSError:
                # Another call of the same function has a file of its own.
                self._functions[known.number % KNOWN_FUNCTIONS] = None
                raise
        function = payloads.load_function(known.blob, known.files)
        if not known.files:
            known.function, known.blob = function, b""
        if len(sys.modules) != n_modules:
            self._surroundings.keep()
        return function

    def _call(self, packet: memoryview) -> bool:
        """Run a call and answer it. Return True if this process can run another."""
        kind, number, function, length = CALL.unpack_from(packet)
        body = packet[CALL.size + length :]
        place = function % KNOWN_FUNCTIONS
        if length:
            self._functions[place] = _Known(function, packet[CALL.size : CALL.size + length])
        known = self._functions[place]
        if known is None or known.number != function:
            self._socket.send(REPLY.pack(UNKNOWN, number, 0, 0))
            return True
        extras = Extras(*pickle.loads(body)) if kind == b"C" else _NO_EXTRAS  # noqa: S301
        self._page[2], self._page[3] = self._streams.begin(extras.logs)
        self._page[1] = started = time.time()
        # The number last: who reads it finds the rest already there.
        self._page[0] = number
        reply = payloads.run(
            lambda: self._prepared(known, extras),
            lambda: _arguments(extras, body),
            self._write,
        )
        if os.getpid() != self._pid:
            _end_child(*reply)
        try:
            self._answer(number, started, *reply, self._streams.end())
        except ConnectionError:  # the driver is gone
            raise
        except OSError as error:
            _end_severed(error)
        # Only now: what the next call needs doesn't keep the driver from this one's answer.
        if not self._surroundings.restore(time.time() - started):
            return False
        self._streams.mend()
        return True

    def _prepared(self, known: _Known, extras: Extras) -> Callable[..., Any]:
        if extras.cwd is not None:
            try:
                os.chdir(extras.cwd)
            except OSError as error:  # it was there at dispatch: it's the call that fails
                return _Failing(error)
        function = self._function(known)
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
                    kind, blob, _ = payloads.unreadable("the return value", error)
                else:  # on a full disk rather the outcome without the output than neither
                    kind, blob = bare
        # The call may have closed the socket, and opened another that got the number of its descriptor.
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != self._socket_type:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._socket.send(REPLY.pack(kind, number, started, time.time()) + blob)

    def _write(self, buffer: memoryview) -> str:
        from ..._host.rundir import write_buffer

        return write_buffer(self._directories, buffer)


_NO_EXTRAS = Extras()


def _end_child(kind: bytes, blob: bytes, files: list[str]) -> NoReturn:
    """End a process that a call forked and that came back from the call, as Python would end it."""
    status = 0
    with contextlib.suppress(BaseException):
        if kind != payloads.VALUE:
            status = 1
            error, _, text = pickle.loads(blob)[:3]  # noqa: S301 - made by this process
            raised = pickle.loads(error) if kind == payloads.RAISED else None  # noqa: S301
            if isinstance(raised, SystemExit) and isinstance(raised.code, int | None):
                status = raised.code or 0
            else:
                sys.stderr.write(text)
        for file in files:
            os.unlink(file)
        sys.stdout.flush()
    os._exit(status)


def _end_severed(error: OSError) -> NoReturn:
    """End this process, which can no longer answer: its call closed what it answers through."""
    words = (
        f"aiohypertunity: the job closed descriptors that belong to its worker ({error}): "
        "close only what the job has opened\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, words.encode())
    os._exit(1)


def _arguments(extras: Extras, body: memoryview) -> Any:
    if extras is _NO_EXTRAS:
        return pickle.loads(body)  # noqa: S301 - from the process that started this one
    if extras.path is not None:
        with open(extras.path, "rb") as file:
            return payloads.loads(file.read(), extras.files)
    return payloads.loads(extras.payload or b"", extras.files)


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

    def __call__(self, *inputs: Any) -> list[Any] | payloads.FailedChunk:
        values: list[Any] = []
        append, function = values.append, self._function
        try:
            for item in inputs:
                append(function(item))
        except BaseException as error:
            kind, body, _ = payloads.raised(error)
            return payloads.FailedChunk(values, kind, body, payloads.short(inputs[len(values)]))
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
    os.set_inheritable(calls, False)
    with mmap.mmap(page, mmap.PAGESIZE) as shared:
        os.close(page)
        worker = Worker(socket.socket(fileno=calls), shared, streams, directories)
        with contextlib.suppress(ConnectionError):
            worker.run()
        # A thread that a call left behind must not keep this process; what it registered still runs.
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # noqa: SLF001 - what os._exit leaves out
        os._exit(0)
