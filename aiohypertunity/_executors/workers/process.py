"""The driver's end of one isolated worker process. What the other end does is in `child`.

Calls go through a packet socket. As long as a call lies unread in it, it can be taken back, by reading it
from this side: so a worker can be given calls ahead of time, and none of them waits behind a long one or is
lost with a process that dies. What was read and never answered is what the process died of.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from ..._host.capture import Capture, log_files
from ..._host.guardian import MARK, kill_tree, start_marked
from ..._host.threads import in_thread
from ..calls import present_directory
from .child import (
    CALL,
    KNOWN_FUNCTIONS,
    LONGEST,
    LONGEST_REPLY,
    REPLIES,
    REPLY,
    UNKNOWN,
    Extras,
    has_environ,
    raw_environ,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from ..._host.rundir import RunDirectory
    from ..._rules.ledger import Entry
    from ..calls import Call

_BOOTSTRAP = (
    "import json, sys; given = json.load(open(int(sys.argv[1]))); sys.path[:] = given.pop('path'); "
    "from aiohypertunity._executors.workers.child import main; main(**given)"
)
_AT_ONCE = 64
GARBLED = b"g"
"""The kind of reply in place of that to a call during which the worker sent something else as well."""

_NO_ROOM = {errno.EAGAIN, errno.ENOBUFS}
_PACKETS = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM


class Reply(NamedTuple):
    """What a worker answered to a call.

    Attributes:
        entry: Whose call it was.
        kind: A kind of reply of `payloads`, or one of `child` with more to unpack, or `GARBLED`.
        body: Its pickle.
        started_at: When the call started, in seconds since the epoch.
        finished_at: When it ended.
    """

    entry: Entry
    kind: bytes
    body: memoryview
    started_at: float
    finished_at: float


class Death(NamedTuple):
    """How a worker died.

    Attributes:
        exit_code: What it exited with; None if a signal killed it.
        signal: The signal that killed it, or None.
        guilty: The entry whose call it had taken and not answered; None if there was none.
        started_at: When that call started, in seconds since the epoch.
        unstarted: The entries whose calls it never took.
        stdout: The tail of what the guilty call, or the process before its first call, wrote.
        stderr: The same of stderr.
        in_need: Whether the machine killed something for want of memory meanwhile.
        is_garbled: True if it was killed for something that was no reply to the guilty call.
    """

    exit_code: int | None
    signal: int | None
    guilty: Entry | None
    started_at: float | None
    unstarted: list[Entry]
    stdout: str
    stderr: str
    in_need: bool
    is_garbled: bool = False


class WorkerProcess:
    """A worker process, usable at once: what is sent before it stands waits in the socket.

    Args:
        key: What it was made for; it runs nothing else.
        env: Its environment.
        rundir: Where its files go.
        on_replies: Called when there is something to `read`.
        on_death: Called once, when its process is gone and so is its tree.

    Attributes:
        calls: The entries it was given; the first one is running, or will be.
        acknowledged: Whether the start of the first one was reported.
        used: Whether it was ever given a call.
        retired: Whether it is to have no more.
        has_answered: True once it has answered a call.
        is_garbled: True once it has sent what is no reply: nothing else that it sends can be relied on.
        gone: A future that is done after `on_death`.
    """

    def __init__(
        self,
        key: object,
        env: Mapping[str, str],
        rundir: RunDirectory,
        on_replies: Callable[[WorkerProcess], None],
        on_death: Callable[[WorkerProcess, Death], None],
    ) -> None:
        self.key = key
        self.calls: deque[Entry] = deque()
        self.pid: int | None = None
        self.acknowledged = False
        self.used = False
        self.retired = False
        self.has_answered = False
        self.is_garbled = False
        self._rundir = rundir
        self._cwd = present_directory() or "/"
        self._path = list(sys.path)
        self._environ = raw_environ()
        self._mark = rundir.new_mark()
        self._env = {**env, MARK: self._mark}
        self._on_replies = on_replies
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:  # a process can run out of descriptors half-way
            self._ours, self._theirs = _socket_pair(stack)
            self._page_file = _anonymous_file()
            stack.callback(os.close, self._page_file)
            self._page = mmap.mmap(self._page_file, mmap.PAGESIZE)
            stack.pop_all()
        self._started = memoryview(self._page).cast("d")
        self._capture = Capture([rundir.new_path(name) for name in ("stdout", "stderr")])
        self._numbers: deque[int] = deque()
        self._next_number = 1
        self._next_function = 1
        self._known: dict[object, int] = {}
        self._suspect: int | None = None
        self._killed = self._ended = False
        self._n_oom_kills = 0
        self._loop.add_reader(self._ours, on_replies, self)
        self.gone = self._loop.create_task(self._live())

    # --- calls, out and back ---------------------------------------------------------------

    def send(self, entry: Entry) -> bool:
        """Gives it a call; says whether there was room. For an idle worker there always is.

        Raises:
            OSError: The call can't be sent at all.
        """
        call: Call = entry.call
        cwd = None if call.cwd == self._cwd else call.cwd
        logs, payload = entry.log_path, call.payload
        key = _function_key(call) if call.packed.shared else call.packed.blob
        function, introduction = self._known.get(key), b""
        if function is None:
            function, introduction = self._next_function, _introduction(call)
        kind = b"c"
        if call.shared or call.chunk or cwd or logs or not isinstance(payload, bytes):
            kind, payload = b"C", pickle.dumps(tuple(_extras(call, cwd, logs)))
        packet = CALL.pack(kind, self._next_number, function, len(introduction)) + payload
        if introduction:
            packet = packet[: CALL.size] + introduction + payload
        if len(packet) > LONGEST:
            raise OSError(errno.EMSGSIZE, "its call has too many large parts")
        try:
            self._ours.send(packet)
        except ConnectionError:  # a call shut the socket down, and nothing has come of it yet
            self.kill()
            return False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return False
        if introduction:
            self._note_known(key)
        self.used = True
        self.calls.append(entry)
        self._numbers.append(self._next_number)
        self._next_number += 1
        return True

    def _note_known(self, key: object) -> None:
        """Note that a function was introduced, and so another one replaced."""
        replaced = self._next_function - KNOWN_FUNCTIONS
        oldest = next(iter(self._known), None)
        if oldest is not None and self._known[oldest] <= replaced:
            del self._known[oldest]
        self._known[key] = self._next_function
        self._next_function += 1

    def take_back(self) -> list[Entry]:
        """Takes back all calls that it hasn't taken itself."""
        taken = set()
        while True:
            try:
                packet = self._theirs.recv(CALL.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not packet:  # it was retired
                break
            _, number, function, length = CALL.unpack(packet)
            taken.add(number)
            if length:
                self._known = {key: n for key, n in self._known.items() if n != function}
        if not taken:
            return []
        pairs = list(zip(self._numbers, self.calls, strict=True))
        kept = [(number, entry) for number, entry in pairs if number not in taken]
        self._numbers = deque(number for number, _ in kept)
        self.calls = deque(entry for _, entry in kept)
        return [entry for number, entry in pairs if number in taken]

    def read(self) -> Iterator[Reply]:
        """Yield what it has answered, as much as the loop may be held for.

        A packet that is no reply to the first of its calls is evidence against that call: the reply that may
        yet come is `GARBLED`. The worker gets no more calls; the replies to those it has taken are sound.
        """
        # Once at least: whatever comes while it has no call is no reply.
        for _ in range(min(len(self.calls), _AT_ONCE) or 1):
            try:
                packet = self._ours.recv(LONGEST_REPLY)
            except BlockingIOError:
                return
            if len(packet) < REPLY.size or not self._numbers:
                self._suspect_call(packet)
                continue
            kind, number, started_at, finished_at = REPLY.unpack_from(packet)
            if number != self._numbers[0] or kind not in REPLIES:
                self._suspect_call(packet)
                continue
            self._numbers.popleft()
            self.has_answered = True
            entry = self.calls.popleft()
            if number == self._suspect:
                kind = GARBLED
            elif kind == UNKNOWN:
                self._known.pop(_function_key(entry.call), None)
            if self.acknowledged:
                self.acknowledged = False
                self._capture.unwatch()
                self._capture.forget()
            body = memoryview(packet)[REPLY.size :]
            yield Reply(entry, kind, body, started_at, finished_at)

    def _suspect_call(self, packet: bytes) -> None:
        self.retired = self.is_garbled = True
        self._suspect = self._numbers[0] if self._numbers else None
        if not packet:  # shut down: there is nothing more to come, and always something to read
            self._loop.remove_reader(self._ours)

    @property
    def is_innocent(self) -> bool:
        """True if there is no evidence against the first of its calls."""
        return bool(self._numbers) and self._numbers[0] != self._suspect

    @property
    def is_current(self) -> bool:
        """Whether it imports from where the driver does, and has the driver's environment."""
        return self._path == sys.path and has_environ(self._environ)

    @property
    def running_since(self) -> float | None:
        """When the first of its calls started, in seconds since the epoch; None if it hasn't."""
        if self._numbers and self._started[0] == self._numbers[0]:
            return self._started[1]
        return None

    # --- its life --------------------------------------------------------------------------

    def kill(self) -> None:
        """Kills its process group. The rest of its tree goes before `on_death`."""
        self.retired = self._killed = True
        if self.pid is not None and not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def retire(self) -> None:
        """Lets it end by itself, being idle. One that was retired before may take its time."""
        self.retired = True
        self._hang_up()

    def acknowledge(self) -> None:
        """Notes that the call it runs takes its time: what the machine lacks now is of its doing."""
        self.acknowledged = True
        self._n_oom_kills = _n_oom_kills()
        self._capture.unwatch()
        self._capture.watch(self._loop)

    async def _live(self) -> None:
        try:
            process = await in_thread(self._spawn)
        except Exception as error:
            unstarted = list(self.calls)
            self.calls.clear()
            words = f"{type(error).__name__}: {error}"
            self._close(Death(None, None, None, None, unstarted, "", words, in_need=False))
            return
        self.pid = process.pid
        self._rundir.guard(process.pid)
        if self._killed:
            self.kill()
        status = await exit_status(process)
        self._ended = True
        await in_thread(kill_tree, process.pid, self._mark)
        self._rundir.unguard(process.pid)
        self._bury(status)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._n_oom_kills = _n_oom_kills()
        given = {
            "path": [entry for entry in self._path if isinstance(entry, str)],
            "calls": self._theirs.fileno(),
            "page": self._page_file,
            "streams": self._capture.paths,
            "directories": self._rundir.buffer_directories,
            "argv": [str(word) for word in sys.argv],
        }
        with contextlib.ExitStack() as stack:
            # Not on the command line: it holds 128 KiB of it, and sys.argv may well be longer.
            orders = stack.enter_context(open(_anonymous_file(), "w+b"))
            orders.truncate(orders.write(json.dumps(given).encode()))
            orders.seek(0)
            stdout, stderr = (stack.enter_context(open(path, "ab")) for path in self._capture.paths)
            return start_marked(
                lambda: subprocess.Popen(
                    # -P: a json.py in the present directory is none of ours.
                    [sys.executable, "-P", "-c", _BOOTSTRAP, str(orders.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=self._env,
                    cwd=self._cwd,
                    pass_fds=(self._theirs.fileno(), self._page_file, orders.fileno()),
                    start_new_session=True,
                ),
                self._mark,
            )

    def _bury(self, status: int) -> None:
        while self.calls and self._has_answered():
            self._on_replies(self)
        since = self.running_since
        unstarted = self.take_back()
        is_garbled = bool(self.calls) and not self.is_innocent
        guilty = self.calls.popleft() if self.calls else None
        if guilty is not None and guilty.log_path is not None:
            logs = [str(path) for path in log_files(guilty.log_path)]
            stdout, stderr = Capture(logs).tails()
        else:
            starts = (0, 0) if since is None else (int(self._started[2]), int(self._started[3]))
            stdout, stderr = self._capture.tails(starts)
        in_need = status == -signal.SIGKILL and _n_oom_kills() > self._n_oom_kills
        exit_code, number = (status, None) if status >= 0 else (None, -status)
        death = Death(
            exit_code, number, guilty, since, unstarted, stdout, stderr, in_need, is_garbled
        )
        self._close(death)

    def _has_answered(self) -> bool:
        try:
            return bool(self._ours.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _close(self, death: Death) -> None:
        self.retired = True
        self._hang_up()
        self._theirs.close()
        self._started.release()
        self._page.close()
        os.close(self._page_file)
        self._capture.unwatch()
        self._capture.remove()
        self._on_death(self, death)

    def _hang_up(self) -> None:
        """Close the driver's end of the socket, unless that is done."""
        if self._ours.fileno() >= 0:
            self._loop.remove_reader(self._ours)
            self._ours.close()


def _function_key(call: Call) -> object:
    """Return what tells the function of a call from others."""
    # The bytes themselves are the key: Python remembers their hash.
    return (call.function, *call.function_files) if call.packed.shared else call.function


def _introduction(call: Call) -> bytes:
    """Return what introduces the function of a call to a worker."""
    stored, files = call.packed.stored, call.function_files
    if stored or files:
        return b"F" + pickle.dumps((stored.path if stored else call.function, files))
    return b"f" + call.function


def _extras(call: Call, cwd: Any, log_path: Path | None) -> Extras:
    stdout, stderr = log_files(log_path) if log_path else (None, None)
    logs = (str(stdout), str(stderr)) if log_path else None
    files = tuple(call.files)
    if isinstance(call.payload, bytes):
        return Extras(call.payload, None, files, cwd, logs, call.chunk)
    return Extras(None, call.payload.path, files, cwd, logs, call.chunk)


async def exit_status(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process to end, without a thread where the system can tell."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        # Not in one of our few threads: it lasts as long as the worker does.
        return await in_thread(process.wait, limiter=anyio.CapacityLimiter(1))
    loop = asyncio.get_running_loop()
    owner = os.getpid()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        if os.getpid() == owner:  # a forked child shares the selector: it would remove ours
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return process.wait()


def _socket_pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a packet socket, with room for a call or two; ours doesn't block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _PACKETS)
    for end in (ours, theirs):
        stack.enter_context(end)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 2 * LONGEST)
    ours.setblocking(False)
    return ours, theirs


def _anonymous_file() -> int:
    """A page of memory with a descriptor, for a child to inherit."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("aiohypertunity")
    else:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor


def _n_oom_kills() -> int:
    """How many processes this machine has killed for want of memory; 0 where it doesn't say."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as vmstat:
        for line in vmstat:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0
