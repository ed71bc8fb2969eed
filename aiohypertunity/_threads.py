"""Blocking work of ours, in threads of ours: a service that fills the loop's own pool can't hold us up.

Not in AnyIO's threads, which end with the task that the loop was run for: where that never ends (a notebook,
`python -m asyncio`, `run_forever`) they would keep the process. An executor's end with the loop's object, or when
the interpreter exits.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_AT_ONCE = 16
_UNBOUNDED = 1 << 16
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiohypertunity-limiter")
_threads: RunVar[ThreadPoolExecutor] = RunVar("aiohypertunity-threads")


async def in_thread(
    function: Callable[..., T],
    *args: object,
    limiter: anyio.CapacityLimiter | None = None,
    endless: bool = False,
) -> T:
    """Calls a blocking function in a thread; a scope that is cancelled waits for it all the same.

    Args:
        function: What to call.
        *args: Its arguments.
        limiter: What bounds the number of threads, for calls that last as long as a job does.
        endless: Whether the process may end before the call does.
    """
    if limiter is None:
        limiter = _of_loop(_limiter, lambda: anyio.CapacityLimiter(_AT_ONCE))
    async with limiter:
        with anyio.CancelScope(shield=True):
            return await asyncio.wrap_future(start_thread(function, *args, endless=endless))
    raise AssertionError("unreachable")


def start_thread(function: Callable[..., T], *args: object, endless: bool = False) -> Future[T]:
    """The same without waiting, and without a bound. What it gives can't be cancelled once it runs."""
    run = contextvars.copy_context().run
    if not endless:
        threads = _of_loop(_threads, lambda: ThreadPoolExecutor(_UNBOUNDED, "aiohypertunity"))
        try:
            return threads.submit(run, function, *args)
        except RuntimeError:  # the interpreter exits, and a scheduler is closed by what exit calls
            pass
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_call, args=(future, run, function, args), daemon=endless).start()
    return future


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
