"""When to try again."""

from __future__ import annotations

import random
import time

LONGEST_PAUSE = 15.0
"""Seconds between attempts, however long they have failed."""


class Patience:
    """How long to wait before the next attempt: the longer they have failed, the longer."""

    def __init__(self) -> None:
        self._since: float | None = None

    def failed(self) -> None:
        """An attempt failed."""
        if self._since is None:
            self._since = time.monotonic()

    def succeeded(self) -> None:
        """The next trouble is a new one."""
        self._since = None

    def pause(self) -> float:
        """Seconds."""
        if self._since is None:
            return 0.0
        pause = min(max((time.monotonic() - self._since) / 8, 0.1), LONGEST_PAUSE)
        # Not all that lost the same host at the same moment are to come back at the same moment.
        return pause * random.uniform(0.75, 1.0)  # noqa: S311
