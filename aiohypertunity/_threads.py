"""Blocking work of ours, in threads of ours: a service that fills the loop's own pool can't hold us up."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_AT_ONCE = 16
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("aiohypertunity-threads")


async def in_thread(
    function: Callable[..., T], *args: object, limiter: anyio.CapacityLimiter | None = None
) -> T:
    """Calls a blocking function in a thread; if cancelled, waits for it all the same.

    Args:
        function: What to call.
        *args: Its arguments.
        limiter: What bounds the number of threads, for calls that last as long as a job does.
    """
    if limiter is not None:
        return await anyio.to_thread.run_sync(function, *args, limiter=limiter)
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_AT_ONCE)
        _limiter.set(limiter)
    return await anyio.to_thread.run_sync(function, *args, limiter=limiter)
