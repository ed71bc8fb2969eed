"""Slurm's accounting: off, late, down, or there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from ..._host.threads import in_thread
from ..._model.errors import TransportError
from . import text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .cluster import Cluster
    from .elements import Element

_PATIENCE = 10.0
"""Seconds that sacct may take."""

_REST = 60.0
"""Seconds for which it's left alone after it has failed."""


class Accounting:
    """What remembers jobs that squeue has forgotten.

    Args:
        cluster: The cluster.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.get_running_loop()
        self._from = 0.0

    def answers(self) -> bool:
        """Whether there is any, and it isn't to be left alone for a while."""
        return self._cluster.site.accounting and self._loop.time() >= self._from

    async def ask(self, elements: Sequence[Element]) -> None:
        """Ask about elements, and give them what the accounting knows. No elements, no question."""
        keys = {e: key for e in elements if (key := e.key) is not None}
        if not keys:
            return
        arrays = sorted({array for array, _ in keys.values()})
        oldest = min(e.submission.epoch for e in keys if e.submission is not None)
        age = int(time.time() - oldest) + 60
        found: dict[tuple[str, int], text.Accounted] | None = None
        with contextlib.suppress(TimeoutError, TransportError):
            command = text.account_command(arrays, f"now-{age}seconds")
            done = await self._cluster.command(command, timeout=_PATIENCE)
            if done.exit_status == 0:
                found = await in_thread(text.parse_accounts, done.stdout, self._cluster.run)
        if found is None:
            self._from = self._loop.time() + _REST
            return
        for element, key in keys.items():
            element.account = found.get(key, element.account)
