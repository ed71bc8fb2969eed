"""Judges: acts on the evidence as `verdict` says, and on limits to waiting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio

from . import report
from .verdict import Fate, judge, needs_word

if TYPE_CHECKING:
    from .accounting import Accounting
    from .cluster import Cluster
    from .elements import Element
    from .state import State

_AT_ONCE = 250
"""Elements that are judged before others on the event loop have their turn."""

_AGAIN = 0.1
"""Seconds after which those that are still suspect are judged again: time is evidence too."""


class Arbiter:
    """Finds out what became of elements.

    Args:
        cluster: Whose clock counts.
        state: Where the suspects are.
        accounting: Whether its word is to be waited for.
    """

    def __init__(self, cluster: Cluster, state: State, accounting: Accounting) -> None:
        self._cluster = cluster
        self._state = state
        self._accounting = accounting
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Judges who is suspect, for ever."""
        while True:
            await self._state.suspected.wait()
            self._state.suspected.clear()
            urgent = False
            for n_judged, element in enumerate(tuple(self._state.suspects), 1):
                try:
                    urgent = self._judge(element) or urgent
                except Exception as error:  # a fault of ours is this element's alone
                    self._state.fault([element], error)
                if n_judged % _AT_ONCE == 0:
                    await asyncio.sleep(0)
            self._be_urgent(urgent)
            if self._state.suspects:
                with anyio.move_on_after(_AGAIN):
                    await self._state.suspected.wait()
                self._state.suspected.set()

    def _be_urgent(self, urgent: bool) -> None:
        if not urgent:
            self._state.mood = self._state.mood._replace(urgent_since=None)
        elif self._state.mood.urgent_since is None:
            self._state.mood = self._state.mood._replace(urgent_since=self._cluster.now())
            self._state.look_now.set()

    def _judge(self, element: Element) -> bool:
        """Acts on an element's evidence; says whether Slurm's word is needed."""
        if element.done or element.reading:
            self._state.suspects.discard(element)
            return False
        if element.submission is None or element.submission.array is None:
            self._state.suspects.discard(element)
            return False
        facts = element.facts(accounting=self._accounting.answers())
        fate = judge(facts, self._cluster.now())
        if fate is not Fate.WAIT:
            element.reading = True
            self._state.end(element, fate)
        elif not needs_word(facts):
            self._state.suspects.discard(element)
        return fate is Fate.WAIT and needs_word(facts)

    def limit_turn(self, element: Element) -> None:
        """Have it taken out of the queue if its turn does not come in time, by the cluster's clock.

        Each wait counts by itself: also that of a job that was queued again after it had started.
        """
        limit: float | None = getattr(element.entry.job, "queue_timeout", None)
        if limit is not None and element.waiting_since is not None:
            self._check_turn(element, limit)

    def _check_turn(self, element: Element, limit: float) -> None:
        if element.waiting_since is None or element.expired or element.stopping or element.done:
            return
        left = element.waiting_since + limit - self._cluster.now()
        if left > 0:
            self._loop.call_later(left, self._check_turn, element, limit)
            return
        words = element.reason or ""
        outcome = report.waited_too_long(element.entry.job, words, element.slurm_id)
        if element in self._state.queue:
            self._state.queue.remove(element)
            self._state.finish(element, outcome)
        elif element.slurm_id is None:
            self._state.let_go(element, outcome)
        else:
            element.expired = True
            self._state.cancel(element)
