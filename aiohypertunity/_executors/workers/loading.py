"""Loads results in the driver. Their pickles run code of the user, which may do anything.

What names nothing but a few harmless types is loaded on the event loop. Everything else is loaded in
a thread: one thread loads one result after the other, so that a result costs little. When a result
takes its time, another thread loads the rest; when a result takes too long, its job fails, and the
thread is left to itself, because a thread cannot be ended.

A result that cannot be loaded because the process has no file descriptor left is tried again until
it can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import pickle
import sys
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from ..._host.threads import threads_of_loop
from ..._model.errors import ResultLost
from ..._model.results import Outcome, Status
from ..._rules import messages
from ..._wire import payloads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..._model.jobs import Job

_LOAD_WITHIN = 60.0
"""Seconds within which a result must be loaded."""

_TURN = 0.05
"""Seconds after which another thread loads what waits behind a result. They double with each thread
that such a result occupies: threads that compute slow each other down."""

_SLICE = 0.002
"""Seconds for which loaded results are delivered in one turn of the loop."""

_LAST_TRY = 1.0
"""Seconds that are left to a result whose job was cancelled."""

_FIRST_DELAY, _LONGEST_DELAY = 0.05, 1.0
"""Seconds until a result is tried again for which there was no descriptor."""

_HARMLESS = {
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "collections": {"OrderedDict", "deque"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "uuid": {"UUID"},
}
"""What a pickle may name and yet be loaded on the loop, by module."""


class _HarmlessUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, name: str) -> Any:
        """Return what a pickle names.

        Raises:
            NotNow: It may do anything, or its module must be imported first.
        """
        found = None
        module = sys.modules.get(module_name)
        if name in _HARMLESS.get(module_name, ()):
            found = getattr(module, name, None)
        elif module_name == "builtins":
            value = getattr(module, name, None)
            found = value if isinstance(value, type) and issubclass(value, BaseException) else None
        if found is None:
            raise messages.NotNow(f"{module_name}.{name} may run any code")
        return found


def load_harmless(blob: bytes | memoryview, files: Sequence[str] = ()) -> Any:
    """Return what a pickle stands for.

    Raises:
        NotNow: Loading it may run any code, or take its time.
    """
    if files:
        raise messages.NotNow("it has files, whose reading takes its time")
    # The pickles of protocol 5 have no other way to name something.
    if pickle.STACK_GLOBAL not in bytes(blob):
        return payloads.loads(blob)
    return _HarmlessUnpickler(io.BytesIO(blob)).load()


class Reading:
    """A result that is being loaded, or waits for it."""

    def __init__(
        self,
        loader: Loader,
        job: Job[Any],
        part: str,
        read: Callable[[], Outcome],
        done: Callable[[Outcome], None],
    ) -> None:
        self.job = job
        self.part = part
        self.since = 0.0
        self.delay = _FIRST_DELAY
        self.retry: asyncio.TimerHandle | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.stopped = False
        self.is_over = False
        self._loader = loader
        self._read = read
        self._done = done

    def stop(self) -> None:
        """Try once more if there was no descriptor, and give up soon: the job was cancelled."""
        self._loader.stop(self)

    def read(self) -> Outcome | None:
        """Return what came of the job, in a thread; None if it must be tried again."""
        try:
            return self._read()
        except messages.NotNow as error:
            return self.lost(error) if self.stopped else None
        except BaseException as error:  # the entry must end, whatever is raised
            return self.lost(error)

    def lost(self, error: BaseException) -> Outcome:
        """Return the outcome of a job whose result cannot be read."""
        words = f"the result of {messages.name(self.job)} can't be read: {error}"
        return Outcome(Status.FAILED, error=ResultLost(words, job=self.job))

    def settle(self, outcome: Outcome) -> None:
        """Report the outcome, unless one was reported before."""
        if self.is_over:
            return
        self.is_over = True
        for timer in (self.retry, self.deadline):
            if timer is not None:
                timer.cancel()
        self._done(outcome)


class _Thread:
    """What a thread is at: the loop relieves it of all but its present reading."""

    def __init__(self) -> None:
        self.current: Reading | None = None
        self.relieved = False


class Loader:
    """Loads the results of an executor in threads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = threads_of_loop()
        self._lock = threading.Lock()
        self._queue: deque[Reading] = deque()
        self._loaded: deque[tuple[Reading, Outcome | None]] = deque()
        self._thread: _Thread | None = None
        self._slow: set[Reading] = set()

    def start(
        self,
        job: Job[Any],
        part: str,
        read: Callable[[], Outcome],
        done: Callable[[Outcome], None],
    ) -> Reading:
        """Load a result.

        Args:
            job: Whose result it is.
            part: The part of the call that is loaded, in words.
            read: Loads it, in a thread. It raises `NotNow` if it is to be called again.
            done: Called with the outcome, on the loop and once.
        """
        reading = Reading(self, job, part, read, done)
        self._enqueue(reading)
        return reading

    def stop(self, reading: Reading) -> None:
        """See `Reading.stop`."""
        if reading.stopped or reading.is_over:
            return
        reading.stopped = True
        if reading.deadline is not None:
            reading.deadline.cancel()
        given_up = Outcome(Status.CRASHED)
        reading.deadline = self._loop.call_later(_LAST_TRY, self._give_up, reading, given_up)
        if reading.retry is not None:
            reading.retry.cancel()
            self._enqueue(reading)

    def _enqueue(self, reading: Reading) -> None:
        reading.retry = None
        with self._lock:
            self._queue.append(reading)
            is_first = self._thread is None
        if is_first:
            self._start_thread()

    def _start_thread(self) -> None:
        self._thread = thread = _Thread()
        self._threads.call(partial(self._work, thread))
        self._loop.call_later(self._turn(), self._watch, thread)

    def _turn(self) -> float:
        return float(min(_TURN * 2 ** len(self._slow), _LOAD_WITHIN / 2))

    def _work(self, thread: _Thread) -> None:
        while True:
            with self._lock:
                if thread.relieved or not self._queue:
                    if self._thread is thread:
                        self._thread = None
                    return
                reading = self._queue.popleft()
                reading.since = time.monotonic()
                thread.current = reading
            pair = reading, None if reading.is_over else reading.read()
            with self._lock:
                thread.current = None
                is_first = not self._loaded
                self._loaded.append(pair)
            del reading, pair  # the user's objects
            if is_first:
                with contextlib.suppress(RuntimeError):  # the loop has ended without it
                    self._loop.call_soon_threadsafe(self._deliver)

    def _watch(self, thread: _Thread) -> None:
        """Relieve a thread whose present reading takes its time."""
        with self._lock:
            if self._thread is not thread:
                return
            reading = thread.current
            waited = 0.0 if reading is None else time.monotonic() - reading.since
            if reading is None or waited < self._turn():
                self._loop.call_later(self._turn(), self._watch, thread)
                return
            thread.relieved = True
            self._thread = None
            waiting = bool(self._queue)
        self._slow.add(reading)
        if reading.deadline is None:
            reason = f"it did not finish loading within {_LOAD_WITHIN:g} s"
            error = messages.unreadable(reading.job, reading.part, reason)
            outcome = Outcome(Status.FAILED, error=error)
            left = _LOAD_WITHIN - waited
            reading.deadline = self._loop.call_later(left, self._give_up, reading, outcome)
        if waiting:
            self._start_thread()

    def _give_up(self, reading: Reading, outcome: Outcome) -> None:
        self._slow.discard(reading)
        reading.settle(outcome)

    def _deliver(self) -> None:
        let_loop_run_at = time.monotonic() + _SLICE
        while True:
            with self._lock:
                if not self._loaded:
                    return
                reading, outcome = self._loaded.popleft()
                more = bool(self._loaded)
            self._slow.discard(reading)
            if outcome is not None:
                reading.settle(outcome)
            elif not reading.is_over:
                reading.retry = self._loop.call_later(reading.delay, self._enqueue, reading)
                reading.delay = min(2 * reading.delay, _LONGEST_DELAY)
            if more and time.monotonic() > let_loop_run_at:
                self._loop.call_soon(self._deliver)
                return
