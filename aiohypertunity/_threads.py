"""Blocking work of ours, in threads of ours: a service that fills the loop's own pool can't hold us up.

A call has a thread of its own, which ends with it. Threads that wait for the next call would keep the process:
where a loop is never closed (a notebook, `python -m asyncio`, `run_forever`) nobody tells them to end.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_AT_ONCE = 16
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiohypertunity-threads")


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
    async with limiter or _shared_limiter():
        with anyio.CancelScope(shield=True):
            return await asyncio.wrap_future(start_thread(function, *args, endless=endless))
    raise AssertionError("unreachable")


def start_thread(function: Callable[..., T], *args: object, endless: bool = False) -> Future[T]:
    """The same without waiting, and without a bound. What it gives can't be cancelled."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    context = contextvars.copy_context()
    threading.Thread(
        target=_run, args=(future, context, function, args), name="aiohypertunity", daemon=endless
    ).start()
    return future


def _shared_limiter() -> anyio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        _limiter.set(limiter)
        return limiter


def _run(
    future: Future[T],
    context: contextvars.Context,
    function: Callable[..., T],
    args: tuple[object, ...],
) -> None:
    try:
        future.set_result(context.run(function, *args))
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future  # else the error's traceback would hold it, and it the error
