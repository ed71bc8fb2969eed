"""Looks at the cluster: one squeue for all jobs; and the accounting, for those it has forgotten."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import anyio

from ..._model.events import Held
from . import text
from .pace import next_look

if TYPE_CHECKING:
    from .accounting import Accounting
    from .arbiter import Arbiter
    from .cluster import Cluster
    from .elements import Element
    from .state import State

_ABSENCE = 5.0
"""Seconds of absence from squeue after which slurmctld is asked whether it has lost its state."""

_ACCOUNT_LAG = 8.0
"""Seconds for which the accounting may not know yet what squeue doesn't know any more."""


class Looker:
    """Takes what Slurm says, as evidence.

    Args:
        cluster: The cluster.
        state: Whose elements it's about.
        accounting: What remembers.
        arbiter: Limits how long jobs wait that are queued again.
    """

    def __init__(
        self, cluster: Cluster, state: State, accounting: Accounting, arbiter: Arbiter
    ) -> None:
        self._cluster = cluster
        self._state = state
        self._accounting = accounting
        self._arbiter = arbiter
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
            contact_returned = self._state.mood.n_failed > 0
            self._state.mood = self._state.mood._replace(n_failed=0)
            await self._take_look(found, last)
            if contact_returned or self._misses_any():
                await self._ask_controller()
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
        listed = {(array, seen.submission) for (array, _), seen in found.items()}
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
                        siblings = key is not None and (key[0], submission.token) in listed
                        element.missed(began, siblings=siblings)
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
            self._take_waiting(element, seen, began)
        if seen.state in text.ENDED or text.launch_failed(seen):
            self._state.suspect(element)

    def _take_waiting(self, element: Element, seen: text.Seen, began: float) -> None:
        if element.waiting_since is None:
            element.waiting_since = began
            self._arbiter.limit_turn(element)
        if text.is_held(seen) and element.reason != seen.reason:
            self._state.emit(Held(element.entry.job, time.time(), seen.reason))
        self._state.say_pending([element], seen.reason or seen.state)

    def _misses_any(self) -> bool:
        """Return True if a loss of slurmctld's state would explain what it lacks."""
        now = self._cluster.now()
        return any(
            e.missing_since is not None
            and e.submission is not None
            and e.submission.asked_at < e.missing_since
            and (e.end is not None or now > e.missing_since + _ABSENCE)
            for e in self._state.suspects
        )

    async def _ask_controller(self) -> None:
        """Find out which arrays slurmctld has forgotten.

        As soon as contact returns: the more ids it gives out, the less its next one proves.
        """
        began = self._cluster.now()
        if not await self._cluster.ask_controller():
            return
        controller = self._cluster.controller
        for submission in self._state.submissions.values():
            array = submission.array
            if array is not None and submission.submitted_at < began:
                submission.asked_at = began
                submission.restarted = controller.boot != submission.boot
                submission.forgotten |= controller.has_lost(array, submission.boot)
        if self._state.suspects:
            self._state.suspected.set()

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
