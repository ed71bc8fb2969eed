"""Looks at the cluster: one squeue for all jobs; and the accounting, for those it has forgotten."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import anyio

from . import text
from .pace import next_look

if TYPE_CHECKING:
    from .accounting import Accounting
    from .cluster import Cluster
    from .elements import Element
    from .state import State

_ACCOUNT_LAG = 8.0
"""Seconds for which the accounting may not know yet what squeue doesn't know any more."""


class Looker:
    """Takes what Slurm says, as evidence.

    Args:
        cluster: The cluster.
        state: Whose elements it's about.
        accounting: What remembers.
    """

    def __init__(self, cluster: Cluster, state: State, accounting: Accounting) -> None:
        self._cluster = cluster
        self._state = state
        self._accounting = accounting
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Looks as often as it's worth it, for ever."""
        last = -1e9
        durations: deque[float] = deque(maxlen=5)
        while True:
            await self._state.active.wait()
            await self._until_look(last)
            last = self._cluster.now()
            began = self._loop.time()
            found = await self._cluster.look()
            # The quickest of the last ones: what else slows one down is no load on Slurm.
            durations.append(self._loop.time() - began)
            self._state.mood = self._state.mood._replace(duration=min(durations))
            if found is None:
                self._state.mood = self._state.mood._replace(n_failed=self._state.mood.n_failed + 1)
                continue
            self._state.mood = self._state.mood._replace(n_failed=0)
            await self._take_look(found, last)
            await self._ask_accounts()

    async def _until_look(self, last: float) -> None:
        while True:
            now = self._cluster.now()
            at = next_look(self._state.mood, last, now)
            if self._cluster.host is not None and self._state.mood.urgent_since is None:
                at += at - last  # across a link each look is nine messages
            at = max(at, self._cluster.budget.look_at(last, now))
            if at <= now:
                return
            self._state.look_now.clear()
            with anyio.move_on_after(at - now):
                await self._state.look_now.wait()

    async def _take_look(self, found: dict[tuple[str, int], text.Seen], began: float) -> None:
        listed = {array for array, _ in found}
        for submission in tuple(self._state.submissions.values()):
            if submission.array is None or submission.submitted_at >= began:
                continue
            for element in submission.elements:
                key = element.key
                seen = None if key is None else found.get(key)
                try:
                    if seen is not None and seen.submission == submission.token:
                        self._take_seen(element, seen, began)
                    elif not element.done:
                        element.missed(began, siblings=key is not None and key[0] in listed)
                        self._state.suspect(element)
                except Exception as error:  # a fault of ours is this element's alone
                    self._state.fault([element], error)
            await asyncio.sleep(0)  # thousands of elements are looked through in steps

    def _take_seen(self, element: Element, seen: text.Seen, began: float) -> None:
        waits = seen.state in text.WAITING
        if element.done:
            element.saw(seen, began)
            self._state.cancel_twin(element)
            return
        if element.seen is None or element.seen.state != seen.state:
            self._state.changed()
        element.saw(seen, began)
        if waits and began > element.claimed_at:
            self._state.say_pending([element], seen.reason or seen.state)
        if seen.state in text.ENDED:
            self._state.suspect(element)

    async def _ask_accounts(self) -> None:
        """Asks the accounting about elements that squeue no longer knows."""
        if not self._accounting.answers():
            return
        lost = [
            e for e in self._state.suspects if e.missing_since is not None and not e.account_asked
        ]
        lost = [e for e in lost if e.submission is not None and e.submission.array is not None]
        if lost:
            await self._accounting.ask(lost)
            now = self._cluster.now()
            for element in lost:
                known = element.account is not None and element.account.state in text.ENDED
                # It may lag, so it is asked again for a while.
                element.account_asked = known or now > (element.missing_since or now) + _ACCOUNT_LAG
