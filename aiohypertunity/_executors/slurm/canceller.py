"""Cancels: one scancel for all, and again until they are gone."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ..._model.errors import TransportError
from . import report, text
from .verdict import Fate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .cluster import Cluster
    from .elements import Element
    from .state import State

_LOG = logging.getLogger("aiohypertunity.slurm")

_SETTLE = 0.02
"""What is cancelled within so many seconds goes together."""

_AGAIN = 2.0
"""Seconds after which what failed is tried again."""

_GONE_WITHIN = 60.0
"""Seconds, and KillWait, after which a job that was cancelled isn't waited for any more."""


class Canceller:
    """Tells Slurm which elements are to end.

    Args:
        cluster: The cluster.
        state: Where those are that are to be cancelled.
    """

    def __init__(self, cluster: Cluster, state: State) -> None:
        self._cluster = cluster
        self._state = state
        self._loop = asyncio.get_running_loop()
        # Who leaves doesn't wait for a link that is down.
        self.is_leaving = False

    async def run(self) -> None:
        """Cancels who is to end, for ever."""
        while True:
            await self._state.cancelling.wait()
            await asyncio.sleep(_SETTLE)
            self._state.cancelling.clear()
            known = {e for e in self._state.cancels if e.slurm_id is not None}
            ready = [e for e in self._state.cancels if e in known and _is_to_end(e)]
            self._state.cancels = {
                e: None for e in self._state.cancels if e not in known and _is_to_end(e)
            }
            twins = set(self._state.twins)
            late = [e for e in ready if _may_still_run(e)]
            now = [e for e in ready if not _may_still_run(e)]
            if now or twins:
                if await self._scancel(now, self._command(now, twins)):
                    self._state.twins -= twins
                elif twins:
                    self._loop.call_later(_AGAIN, self._state.cancelling.set)
            if late:
                await self._scancel(late, self._command(late, set(), ("--state=PENDING",)))

    def _command(
        self,
        elements: Sequence[Element],
        twins: set[tuple[str, int]],
        options: Sequence[str] = (),
    ) -> str:
        keys, whole = self._whole(elements, twins)
        return text.cancel_command(self._cluster.run, keys, whole, options)

    def _whole(
        self, elements: Sequence[Element], twins: set[tuple[str, int]]
    ) -> tuple[set[tuple[str, int]], set[str]]:
        """The same as single elements and whole arrays, as few words as possible."""
        keys = _keys(elements) | twins
        whole = set()
        for submission in {e.submission for e in elements if e.submission is not None}:
            if submission.forgotten:
                continue
            own = [e.key for e in submission.elements]
            arrays = {key[0] for key in own if key is not None}
            if all(e.done or e.key in keys for e in submission.elements):
                whole |= arrays
        return {key for key in keys if key[0] not in whole}, whole

    async def _scancel(self, elements: Sequence[Element], command: str) -> bool:
        """Runs scancel; says whether Slurm has accepted it."""
        self._cluster.budget.spend(2, self._cluster.now())
        try:
            done = await self._cluster.command(command)
        except (TimeoutError, TransportError):
            accepted = False
        else:
            # It also fails for jobs that are gone, which is as good.
            accepted = done.exit_status == 0 or text.refusal(done.stderr) == "never"
        for element in elements:
            if accepted:
                element.disowned = False
                if element.stopping or element.expired:
                    element.cancelled_at = self._cluster.now()
            self._state.suspect(element)
        # Once more, if they are still there when they should long be gone.
        pause = self._cluster.site.kill_wait + 10 if accepted else _AGAIN
        self._loop.call_later(pause, self._cancel_again, list(elements))
        return accepted

    def _cancel_again(self, elements: list[Element]) -> None:
        for element in elements:
            if _is_to_end(element):
                self._state.cancel(element)

    def let_go_in_time(self, element: Element) -> None:
        """Nobody is to wait for ever for Slurm to say that it's gone."""
        patience = _GONE_WITHIN + self._cluster.site.kill_wait
        self._loop.call_later(patience, self._let_go_of, element, self._cluster.now() + patience)

    def _let_go_of(self, element: Element, until: float) -> None:
        left = until - self._cluster.now()
        if element.done:
            return
        if left > 0 and not self.is_leaving:
            self._loop.call_later(left, self._let_go_of, element, until)
            return
        _LOG.warning("nothing says that Slurm job %s is gone; it was told to", element.slurm_id)
        self._state.let_go(
            element, report.report(element.entry.job, Fate.CANCELLED, element.ending())
        )


def _is_to_end(element: Element) -> bool:
    return element.disowned or (not element.done and (element.stopping or element.expired))


def _may_still_run(element: Element) -> bool:
    """It waited for too long; but if it has just begun to run, it had its turn."""
    return element.expired and not element.stopping and not element.done


def _keys(elements: Iterable[Element]) -> set[tuple[str, int]]:
    """The ids of elements, less those that Slurm has forgotten and may have given to others."""
    return {
        key
        for element in elements
        if (key := element.key) is not None
        and element.submission is not None
        and not element.submission.forgotten
    }
