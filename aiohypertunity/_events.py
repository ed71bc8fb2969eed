"""What happens in a scheduler, as typed values for `Scheduler.events()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from ._errors import HypertunityError
    from ._jobs import Job
    from ._results import Result


@dataclass(frozen=True, slots=True)
class Queued:
    """A job was dispatched.

    Attributes:
        at: When, in seconds since the epoch (as in every event).
    """

    job: Job[Any]
    at: float


@dataclass(frozen=True, slots=True)
class Started:
    """A job began to run.

    Attributes:
        attempt: 1 for the first time.
    """

    job: Job[Any]
    at: float
    attempt: int


@dataclass(frozen=True, slots=True)
class Retried:
    """An attempt ended badly, and the job waits for another.

    Attributes:
        attempt: The attempt that ended.
        error: How it ended.
    """

    job: Job[Any]
    at: float
    attempt: int
    error: HypertunityError


@dataclass(frozen=True, slots=True)
class Finished:
    """A job is over: succeeded, failed, crashed or timed out."""

    job: Job[Any]
    at: float
    result: Result[Any]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A job was cancelled and is gone."""

    job: Job[Any]
    at: float
    result: Result[Any]


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection to a cluster is lost; its jobs go on, and so do we once it's back.

    It comes once more, with another reason, if the host then shows a key that isn't trusted.

    Attributes:
        reason: What was seen of it.
    """

    host: str
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The connection to a cluster stands again."""

    host: str
    at: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """The reader of the events was too slow.

    Attributes:
        n_events: How many events were dropped at this place.
    """

    n_events: int
    at: float


Event: TypeAlias = Queued | Started | Retried | Finished | Cancelled | LinkDown | LinkUp | Dropped
