"""Events of a scheduler, the typed items of `Scheduler.events()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .errors import HypertunityError
    from .jobs import Job
    from .results import Result


@dataclass(frozen=True, slots=True)
class Queued:
    """The dispatch of a job.

    Attributes:
        job: The job.
        at: The time, in seconds since the epoch, as in every event.
    """

    job: Job[Any]
    at: float


@dataclass(frozen=True, slots=True)
class Started:
    """The start of an attempt at a job.

    Attributes:
        job: The job.
        at: The time, in seconds since the epoch.
        attempt: The number of the attempt, from 1.
    """

    job: Job[Any]
    at: float
    attempt: int


@dataclass(frozen=True, slots=True)
class Retried:
    """The end of an attempt that failed and is followed by another one.

    Attributes:
        job: The job.
        at: The time, in seconds since the epoch.
        attempt: The number of the attempt that ended.
        error: The error with which it ended.
    """

    job: Job[Any]
    at: float
    attempt: int
    error: HypertunityError


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a job that succeeded, failed, crashed or timed out.

    Attributes:
        job: The job.
        at: The time, in seconds since the epoch.
        result: The result of the job.
    """

    job: Job[Any]
    at: float
    result: Result[Any]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The end of a job that was cancelled.

    Attributes:
        job: The job.
        at: The time, in seconds since the epoch.
        result: The result of the job.
    """

    job: Job[Any]
    at: float
    result: Result[Any]


@dataclass(frozen=True, slots=True)
class Held:
    """A hold on a Slurm job, set by a user or an administrator. The job waits until it is released.

    Attributes:
        job: The job.
        at: The time, in seconds since the epoch.
        reason: Slurm's reason, such as `JobHeldUser`.
    """

    job: Job[Any]
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The loss of the connection to a cluster. Its jobs go on, and the scheduler connects again.

    A second event follows if the host then shows a key that is not trusted.

    Attributes:
        host: The name of the login node.
        at: The time, in seconds since the epoch.
        reason: A description of the failure.
    """

    host: str
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A connection to a cluster that is established again.

    Attributes:
        host: The name of the login node.
        at: The time, in seconds since the epoch.
    """

    host: str
    at: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """A gap in the events: the reader was too slow.

    Attributes:
        n_events: The number of events that were dropped at this place.
        at: The time, in seconds since the epoch.
    """

    n_events: int
    at: float


Event: TypeAlias = (
    Queued | Started | Retried | Finished | Cancelled | Held | LinkDown | LinkUp | Dropped
)
"""Any event of a scheduler."""
