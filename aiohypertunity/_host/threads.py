"""Blocking work of ours, in threads of ours: a service that fills the loop's own pool can't hold us up.

Nobody has to tell them to end, since where a loop never ends (a notebook, `python -m asyncio`, `run_forever`) or
Ctrl-C strikes while one is started, nobody would: they go when they have had nothing to do for a while, and
don't keep the process. What it leaves half done, the guardian ends.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_AT_ONCE = 16
_IDLE = 5.0
"""Seconds after which a thread that has nothing to do ends."""


async def in_thread(
    function: Callable[..., T],
    *args: object,
    limiter: anyio.CapacityLimiter | None = None,
) -> T:
    """Calls a blocking function in a thread; a scope that is cancelled waits for it all the same.

    Args:
        function: What to call.
        *args: Its arguments.
        limiter: What bounds the number of threads, for calls that last as long as a job does.
    """
    if limiter is None:
        limiter = _of_loop(_limiter, lambda: anyio.CapacityLimiter(_AT_ONCE))
    async with limiter:
        with anyio.CancelScope(shield=True):
            return await asyncio.wrap_future(start_thread(function, *args))
    raise AssertionError("unreachable")


def start_thread(function: Callable[..., T], *args: object) -> Future[T]:
    """The same without waiting, and without a bound. What it gives can't be cancelled."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    run = contextvars.copy_context().run
    threads_of_loop().call(lambda: _call(future, run, function, args))
    return future


class Threads:
    """As many threads as have something to do at once, and those that have just had."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._n_idle = threading.Semaphore(0)

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function that raises nothing."""
        self._calls.put(function)
        if not self._n_idle.acquire(blocking=False):
            threading.Thread(target=self._work, name="aiohypertunity", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                function = self._calls.get(timeout=_IDLE)
            except queue.Empty:
                if self._n_idle.acquire(blocking=False):
                    return
                continue  # somebody relies on it: a call is on its way
            function()
            del function
            self._n_idle.release()


_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiohypertunity-limiter")
_threads: RunVar[Threads] = RunVar("aiohypertunity-threads")


def threads_of_loop() -> Threads:
    """Return the threads of the running loop. A callback of the loop can't: anyio knows tasks only."""
    return _of_loop(_threads, Threads)


def _of_loop(variable: RunVar[T], make: Callable[[], T]) -> T:
    try:
        return variable.get()
    except LookupError:
        value = make()
        variable.set(value)
        return value


def _call(
    future: Future[T], run: Callable[..., T], function: Callable[..., T], args: tuple[object, ...]
) -> None:
    try:
        future.set_result(run(function, *args))
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future  # else the error's traceback would hold it, and it the error
