"""Bounded streams of events that report what they dropped."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from .._model.events import Dropped, Event

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self


class EventStream:
    """An async iterator of the events since it was made.

    A slow reader loses the oldest events, and gets a `Dropped` with their number.

    Args:
        most: The number of unread events that are kept.
        closed: A function that returns True once the scheduler is closed and no event can follow.
    """

    def __init__(self, most: int, closed: Callable[[], bool]) -> None:
        if type(most) is not int or most < 1:
            raise ValueError(f"maxsize={most!r}: must be a whole number from 1")
        self._events: deque[Event] = deque()
        self._most = most
        self._n_dropped = 0
        self._closed = closed
        self._news = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event."""
        if len(self._events) >= self._most:
            self._events.popleft()
            self._n_dropped += 1
        self._events.append(event)
        self._news.set()

    def wake(self) -> None:
        """Wake the reader, so that it sees that the scheduler has closed."""
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Return the next event, or a `Dropped` where some are missing."""
        while not self._events:
            if self._closed():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        if self._n_dropped:
            n, self._n_dropped = self._n_dropped, 0
            return Dropped(n, time.time())
        return self._events.popleft()
