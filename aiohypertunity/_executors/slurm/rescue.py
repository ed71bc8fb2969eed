"""Rescues elements that Slurm has lost, or cannot launch.

Two questions decide what is done. *May it run, now or later?* One that has started, as far as the
spool tells, is stopped through the spool, since Slurm may know nothing of it; its end is waited
for, and a result that it leaves counts. *Did it ever start?* The fence answers that: the driver
takes the claim of the element, which is made once for all restarts. If the claim was free, nothing
of the element has run or ever will, however Slurm's memory comes back, and the same attempt is
submitted again in another directory. The fenced directory is kept until the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING

from ..._model.errors import TransportError
from . import shell, text
from .verdict import Fate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .arbiter import Arbiter
    from .cluster import Cluster
    from .elements import Element, Submission
    from .state import State
    from .watcher import Watcher

_LAST_WORD, _PAUSE = 60.0, 0.5
"""Seconds that a stopped job may take to end (NFS remembers names for so long); and between looks.

slurmd kills what slurmctld has forgotten with SIGKILL (22.05), which leaves no sign of an end either.
"""

_AGAIN = 2.0
"""Seconds after which an scancel that failed is tried again."""

_LAUNCHES = 2
"""How many times a job that could not be launched is submitted again."""


class Rescuer:
    """Stops what may run, and submits again what cannot.

    Args:
        cluster: Where the spool is.
        state: Where the endings and the queue are.
        watcher: Takes the names that are found in the spool.
        arbiter: Limits the wait of what is submitted again.
    """

    def __init__(self, cluster: Cluster, state: State, watcher: Watcher, arbiter: Arbiter) -> None:
        self._cluster = cluster
        self._state = state
        self._watcher = watcher
        self._arbiter = arbiter

    async def stop(self, lost: Sequence[tuple[Element, Fate]]) -> None:
        """End elements that may run on though Slurm has lost them.

        Those that will be tried again are waited for, as far as that has a bound: nothing runs
        twice. So are those that Slurm has forgotten: their nodes may be well.
        """
        with contextlib.suppress(TransportError):
            for submission, elements in _by_submission(e for e, _ in lost):
                command = shell.stop(submission.directory, [e.index for e in elements])
                await self._cluster.through(functools.partial(self._cluster.shell, command))
            until = self._cluster.now() + _LAST_WORD
            awaited = [e for e, fate in lost if fate is not Fate.NODE or e.entry.retries_left]
            while any(map(_may_run, awaited)) and self._cluster.now() < until:
                await asyncio.sleep(_PAUSE)
                await self._cluster.through(functools.partial(self._watcher.list_now, awaited))
        for element, fate in lost:
            element.stopped = True
            if _left_result(element):
                element.reading = False
                self._state.suspect(element)
            else:
                self._state.end(element, fate)

    async def submit_again(self, lost: Sequence[tuple[Element, Fate]]) -> None:
        """Submit elements again that have never started; stop those that have, against all signs."""
        try:
            await self._withdraw([e for e, fate in lost if fate is Fate.UNLAUNCHED])
            taken = await self._fence([e for e, _ in lost if not e.done])
        except TransportError:
            taken = {e for e, _ in lost}
        for element, fate in lost:
            if element.done or element in taken:
                continue
            element.stopped = True
            if element.stopping or element.expired:
                self._state.end(element, Fate.CANCELLED)
            elif fate is Fate.UNLAUNCHED and element.n_launches_tried >= _LAUNCHES:
                self._state.end(element, fate)
            else:
                self._replace(element, fate)
        await self.stop([(e, fate) for e, fate in lost if e in taken and not e.done])

    async def _withdraw(self, elements: Sequence[Element]) -> None:
        """Cancel elements, and wait until Slurm has nothing of them that could run."""
        if not elements:
            return
        since = self._cluster.now()
        keys = {key for e in elements if (key := e.key) is not None}
        command = text.cancel_command(self._cluster.run, keys)
        while True:
            self._cluster.budget.spend(2, self._cluster.now())
            done = await self._cluster.through(functools.partial(self._cluster.command, command))
            if done.exit_status == 0 or text.refusal(done.stderr) == "never":
                break
            await asyncio.sleep(_AGAIN)
        while not all(e.done or _is_gone(e, since) for e in elements):
            self._state.changed()
            await asyncio.sleep(_PAUSE)

    async def _fence(self, elements: Sequence[Element]) -> set[Element]:
        """Take the claims of elements; return those whose claim an array has taken before."""
        taken = set()
        for submission, own in _by_submission(elements):
            command = shell.fence(submission.directory, [e.index for e in own])
            done = await self._cluster.through(functools.partial(self._cluster.shell, command))
            if done.exit_status != 0:
                taken.update(own)
            indices = set(done.stdout.split())
            taken.update(e for e in own if str(e.index) in indices)
        if taken:
            await self._cluster.through(functools.partial(self._watcher.list_now, taken))
        return taken

    def _replace(self, element: Element, fate: Fate) -> None:
        why = element.reason if fate is Fate.UNLAUNCHED else "slurmctld has lost its state"
        again = self._state.submit_again(element, f"submitted again: {why}")
        again.n_launches_tried = element.n_launches_tried + (fate is Fate.UNLAUNCHED)
        self._arbiter.limit_turn(again)


def _by_submission(elements: Iterable[Element]) -> list[tuple[Submission, list[Element]]]:
    found: dict[Submission, list[Element]] = {}
    for element in elements:
        if element.submission is not None:
            found.setdefault(element.submission, []).append(element)
    return list(found.items())


def _may_run(element: Element) -> bool:
    """Return True if no sign of an end is newer than the last sign of a start."""
    last = max(element.claims, default=-1)
    ended = element.end is not None and element.end.restart >= last
    return not (ended or element.result is not None or element.done)


def _left_result(element: Element) -> bool:
    """Return True if it has ended well by itself."""
    end = element.end
    well = element.is_script and end is not None and (end.code, end.why) == (0, "0")
    return element.result is not None or well


def _is_gone(element: Element, since: float) -> bool:
    """Return True if a squeue that began after `since` lacks it, or lists it as ended."""
    if element.missing_since is not None and element.missing_since >= since:
        return True
    return element.seen is not None and element.seen.state in text.ENDED
