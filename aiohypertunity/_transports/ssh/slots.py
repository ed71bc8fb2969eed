"""How many channels there may be at a time.

Servers bound their number (`MaxSessions`): where one is refused while others are open, we make do with
fewer, and in the end with one, for which the watcher then gives way.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger("aiohypertunity.ssh")


class Slots:
    """How many channels there may be, and are.

    Args:
        limit: How many there may be, until the server has taught us better.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._n_open = 0
        self._n_waiting = 0
        self._polite: list[Callable[[], None]] = []
        self._changed = asyncio.Event()

    async def acquire(self, give_way: Callable[[], None] | None) -> None:
        """Waits for a place.

        Args:
            give_way: Is called when others want the place and there's none; its holder waits for a new
                one until nobody else does. None if the holder keeps it.
        """
        while self._n_open >= self._limit or (give_way is not None and self._is_tight):
            if give_way is None:
                for ask in self._polite[:]:
                    ask()
            self._changed.clear()
            self._n_waiting += give_way is None
            try:
                await self._changed.wait()
            except BaseException:
                # Somebody may have been waiting for us not to wait.
                self._changed.set()
                raise
            finally:
                self._n_waiting -= give_way is None
        self._n_open += 1
        if give_way is not None:
            self._polite.append(give_way)

    @property
    def _is_tight(self) -> bool:
        return self._n_waiting > 0 and self._n_open + 1 >= self._limit

    def release(self, give_way: Callable[[], None] | None) -> None:
        """Gives a place back."""
        self._n_open -= 1
        if give_way is not None:
            self._polite.remove(give_way)
        self._changed.set()

    def shrink(self) -> None:
        """The server takes no more than are open now."""
        if 1 <= self._n_open < self._limit:
            self._limit = self._n_open
            _LOG.info("the server takes %d channels at a time", self._limit)
