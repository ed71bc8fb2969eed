"""What the loops share: who waits, who is with Slurm, who has to be judged, read, cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .. import _failures
from .._results import Outcome, Status
from . import text
from .pace import Mood
from .queue import Queue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._ledger import Owner
    from .cluster import Cluster
    from .elements import Element, Submission
    from .verdict import Fate


class State:
    """All elements of a run, by what is to be done with them next. Each kind has an event that wakes its loop.

    Args:
        cluster: Whose clock counts.
        owner: To whom to report.
    """

    def __init__(self, cluster: Cluster, owner: Owner) -> None:
        self.owner = owner
        self._cluster = cluster
        self.queue = Queue()
        self.queued = asyncio.Event()
        self.submitting: list[Element] = []
        self.submissions: dict[str, Submission] = {}
        self.n_in_flight = 0
        self.active = asyncio.Event()
        self.suspects: set[Element] = set()
        self.suspected = asyncio.Event()
        self.endings: list[tuple[Element, Fate]] = []
        self.ended = asyncio.Event()
        self.cancels: dict[Element, None] = {}
        self.twins: set[tuple[str, int]] = set()
        self.cancelling = asyncio.Event()
        self.mood = Mood(None, cluster.now())
        self.look_now = asyncio.Event()

    def submitted(self, submission: Submission, array: str) -> None:
        if submission.array is not None:
            return
        submission.array = array
        submission.submitted_at = self._cluster.now()
        submission.epoch = time.time()
        self.changed()
        self.look_now.set()
        for element in submission.elements:
            element.reason = ""
            if not element.done:
                self.owner.pending(element.entry, None, slurm_id=element.slurm_id)
            if element.stopping or element.expired:
                self.cancel(element)

    def say_pending(self, elements: Iterable[Element], reason: str) -> None:
        for element in elements:
            if element.reason != reason:
                element.reason = reason
                self.owner.pending(element.entry, reason, slurm_id=element.slurm_id)

    def suspect(self, element: Element) -> None:
        self.suspects.add(element)
        self.suspected.set()

    def cancel(self, element: Element) -> None:
        self.cancels[element] = None
        self.cancelling.set()

    def changed(self) -> None:
        self.mood = self.mood._replace(changed_at=self._cluster.now())

    def forget(self, submission: Submission) -> None:
        """Nothing will come of it; its directory goes with the run's."""
        self.submissions.pop(submission.name, None)

    def finish_unstarted(self, element: Element) -> None:
        if not element.done:
            error = _failures.cancelled(element.entry.job, started=False)
            self.finish(element, Outcome(Status.CANCELLED, error=error))

    def finish(self, element: Element, outcome: Outcome) -> None:
        element.done = True
        element.entry.place = None
        self.suspects.discard(element)
        submission = element.submission
        if submission is not None:
            self.cancel_twin(element)
            submission.n_left -= 1
            self.n_in_flight -= 1
            if self.queue:
                self.queued.set()
        self.owner.finished(element.entry, outcome)

    def cancel_twin(self, element: Element) -> None:
        """Its result is here, and Slurm would run it again."""
        seen, key = element.seen, element.key
        requeued = seen is not None and seen.state in text.WAITING and bool(element.claims)
        if requeued and element.seen_at > element.claimed_at and key is not None:
            self.twins.add(key)
            self.cancelling.set()
