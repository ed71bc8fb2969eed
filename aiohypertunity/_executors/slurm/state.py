"""What the loops share: who waits, who is with Slurm, who has to be judged, read, cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from ..._model.results import Outcome, Status
from ..._rules import messages
from . import report, text
from .elements import Element
from .pace import Mood
from .queue import Queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..._model.events import Event
    from ..._rules.ledger import Owner
    from .cluster import Cluster
    from .elements import Submission
    from .verdict import Fate

_LOG = logging.getLogger("aiohypertunity.slurm")


class State:
    """All elements of a run, by what is to be done with them next. Each kind has an event that wakes its loop.

    Args:
        cluster: Whose clock counts.
        owner: To whom to report.
        emit: Takes events.
    """

    def __init__(self, cluster: Cluster, owner: Owner, emit: Callable[[Event], None]) -> None:
        self.owner = owner
        self.emit = emit
        self._cluster = cluster
        self.queue = Queue()
        self.queued = asyncio.Event()
        self.submissions: dict[str, Submission] = {}
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

    @property
    def n_in_flight(self) -> int:
        """Elements that are submitted, or about to be, and not over."""
        return sum(submission.n_left for submission in self.submissions.values())

    @property
    def unfinished(self) -> list[Element]:
        """All elements that aren't over."""
        submitted = [e for s in self.submissions.values() for e in s.elements]
        return [e for e in {*self.queue, *submitted} if not e.done]

    def submitted(self, submission: Submission, array: str) -> None:
        """Slurm has it, under this id."""
        if submission.array is not None:
            return
        for other in self.submissions.values():
            if other.array == array:  # slurmctld has lost its state, and gives ids out again
                other.forgotten = True
        submission.array = array
        submission.submitted_at = self._cluster.now()
        submission.epoch = time.time()
        self.changed()
        self.look_now.set()
        for element in submission.elements:
            element.reason = None
            if not element.done:
                self.owner.pending(element.entry, None, slurm_id=element.slurm_id)
            if element.stopping or element.expired or element.disowned:
                self.cancel(element)

    def say_pending(self, elements: Iterable[Element], reason: str | None) -> None:
        """Says why they wait."""
        for element in elements:
            if element.reason != reason:
                element.reason = reason
                self.owner.pending(element.entry, reason, slurm_id=element.slurm_id)

    def suspect(self, element: Element) -> None:
        """There's something new to be judged by."""
        self.suspects.add(element)
        self.suspected.set()

    def end(self, element: Element, fate: Fate) -> None:
        """Have what is left of it read, and reported as this fate."""
        self.endings.append((element, fate))
        self.ended.set()

    def submit_again(self, element: Element, why: str) -> Element:
        """Queue the same attempt again, of which nothing has run or ever will; return its new element."""
        again = Element(element.entry, element.group, element.queued_at)
        again.pinned = element.pinned
        if element.waiting_since is not None:
            again.waiting_since = element.waiting_since
        element.done = True
        element.entry.place = again
        self.suspects.discard(element)
        assert element.submission is not None
        element.submission.n_left -= 1
        element.submission.fenced = True
        self.queue.add(again)
        self.queued.set()
        self.say_pending([again], why)
        return again

    def cancel(self, element: Element) -> None:
        """Slurm is to be told to end it, as soon as its id is known."""
        self.cancels[element] = None
        self.cancelling.set()

    def changed(self) -> None:
        """Something happens: looks are worth more."""
        self.mood = self.mood._replace(changed_at=self._cluster.now())

    def forget(self, submission: Submission) -> None:
        """Nothing will come of it; its directory goes with the run's."""
        self.submissions.pop(submission.name, None)

    def fault(self, elements: Iterable[Element], error: Exception) -> None:
        """Fail the elements at which the executor itself has failed, and no others.

        Slurm is told to end them, since they may still run.
        """
        _LOG.error("the Slurm executor has failed at a job", exc_info=error)
        for element in elements:
            if not element.done:
                self.let_go(element, report.fault(element.entry.job, error))

    def wake(self) -> None:
        """Have all loops look at what there is: one of them has begun anew."""
        for event in (self.queued, self.suspected, self.ended, self.cancelling, self.look_now):
            event.set()

    def finish_unstarted(self, element: Element) -> None:
        """It was cancelled before Slurm had it."""
        if not element.done:
            error = messages.cancelled(element.entry.job, started=False)
            self.finish(element, Outcome(Status.CANCELLED, error=error))

    def let_go(self, element: Element, outcome: Outcome) -> None:
        """It's over for its user, though Slurm may still have it: it will be told to end it."""
        if not element.done:
            element.disowned = element.submission is not None
            self.finish(element, outcome)
            self.cancel(element)

    def finish(self, element: Element, outcome: Outcome) -> None:
        """It's over."""
        element.done = True
        element.entry.place = None
        self.suspects.discard(element)
        submission = element.submission
        if submission is not None:
            self.cancel_twin(element)
            submission.n_left -= 1
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
