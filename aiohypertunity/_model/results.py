"""Results of jobs: `Result`, its `Status`, and `Outcome`, an executor's report of one attempt.

Times are seconds since the epoch, as `time.time()` gives them.
"""

from __future__ import annotations

import copy
import enum
from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .errors import JobError, SubmitError, TransportError
    from .jobs import Job

T = TypeVar("T")


class Status(enum.Enum):
    """The state of a job: pending, running, cancelling, or one of five final states."""

    PENDING = "pending"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"

    is_final: bool
    """True for the states in which a job has finished."""

    __hash__ = object.__hash__  # as right as an enum's own, and no call of a Python function


for _status in Status:
    _status.is_final = _status not in {Status.PENDING, Status.RUNNING, Status.CANCELLING}


class Outcome:
    """An executor's report of one attempt at a job. Facts that are not known are None.

    Attributes:
        status: The final status of the attempt.
        data: The return value of the task, if the attempt succeeded.
        error: The reason why there is no data, if it did not.
    """

    __slots__ = (
        "data", "error", "exit_code", "finished_at", "host", "log_path", "max_rss", "pid",
        "signal", "slurm_id", "started_at", "status", "stderr", "stdout",
    )  # fmt: skip

    def __init__(
        self,
        status: Status,
        data: object = None,
        error: JobError | SubmitError | TransportError | None = None,
        *,
        started_at: float | None = None,
        finished_at: float | None = None,
        exit_code: int | None = None,
        signal: int | None = None,
        host: str | None = None,
        pid: int | None = None,
        slurm_id: str | None = None,
        stdout: str = "",
        stderr: str = "",
        log_path: Path | None = None,
        max_rss: int | None = None,
    ) -> None:
        self.status = status
        self.data = data
        self.error = error
        self.started_at = started_at
        self.finished_at = finished_at
        self.exit_code = exit_code
        self.signal = signal
        self.host = host
        self.pid = pid
        self.slurm_id = slurm_id
        self.stdout = stdout
        self.stderr = stderr
        self.log_path = log_path
        self.max_rss = max_rss


class _Fields:
    """The dataclass fields of a result, without `data` if the job failed.

    `dataclasses.asdict` reads every field, and reading `data` of a failed result raises.
    """

    def __init__(self, fields: Mapping[str, Field[Any]]) -> None:
        self._all = fields
        self._failed = {name: field for name, field in fields.items() if name != "data"}

    def __get__(
        self, result: Result[Any] | None, owner: type[Result[Any]]
    ) -> Mapping[str, Field[Any]]:
        return self._all if result is None or result.error is None else self._failed


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Result(Generic[T]):
    """The result of a job of any kind. Frozen.

    Attributes:
        id: The id of the job.
        job: The job.
        data: The return value of the task. Reading it raises `error` if the job did not succeed.
        error: The reason why the job has no data; None if it succeeded.
        status: A final `Status`.
        attempts: The number of times the job was started: more than 1 after retries or a requeue
            by Slurm, 0 if it was never started.
        queued_at: The time of dispatch, in seconds since the epoch.
        started_at: The time at which the last attempt started, in seconds since the epoch; None if
            no attempt did.
        finished_at: The time at which the last attempt ended, in seconds since the epoch.
        exit_code: The exit code of the job's process, for scripts, Slurm jobs, and workers that
            exited while they ran the job; otherwise None.
        signal: The number of the signal that killed the process; otherwise None.
        host: The name of the machine on which the job ran.
        pid: The id of its process on that machine.
        slurm_id: Slurm's id of the job, as `squeue` prints it; None for a local job.
        stdout: The last 64 KiB of standard output; for a Slurm job, of its log.
        stderr: The last 64 KiB of standard error; empty for a Slurm job.
        log_path: The path at which the whole output is kept; None if it is not kept.
        max_rss: The peak memory of the job in bytes, if Slurm's accounting reports it; otherwise
            None.
    """

    id: int | str
    job: Job[T]
    data: T
    error: JobError | SubmitError | TransportError | None
    status: Status
    attempts: int
    queued_at: float
    started_at: float | None
    finished_at: float
    exit_code: int | None
    signal: int | None
    host: str | None
    pid: int | None
    slurm_id: str | None
    stdout: str
    stderr: str
    log_path: Path | None
    max_rss: int | None

    def __init__(self, *, data: T | None = None, **fields: Any) -> None:
        wrong = fields.keys() ^ (type(self).__dataclass_fields__.keys() - {"data"})
        if wrong:
            raise TypeError(f"these fields are missing or unknown: {', '.join(sorted(wrong))}")
        self.__dict__.update(fields, _data=data)

    @classmethod
    def of(
        cls, job: Job[T], outcome: Outcome, *, attempts: int, queued_at: float, finished_at: float
    ) -> Result[T]:
        """Return the result of a job whose last attempt ended in `outcome`."""
        result = cls.__new__(cls)
        # One update instead of eighteen object.__setattr__: this is on the path of every job.
        result.__dict__.update(
            id=job.id,
            job=job,
            _data=outcome.data,
            error=outcome.error,
            status=outcome.status,
            attempts=attempts,
            queued_at=queued_at,
            started_at=outcome.started_at,
            finished_at=finished_at,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            host=outcome.host,
            pid=outcome.pid,
            slurm_id=outcome.slurm_id,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            log_path=outcome.log_path,
            max_rss=outcome.max_rss,
        )
        return result

    @property
    def ok(self) -> bool:
        """True if the job succeeded."""
        return self.error is None

    def __repr__(self) -> str:
        what = f"data={self._short_data()}" if self.error is None else f"error={self.error!r}"
        return f"Result(id={self.id!r}, status={self.status.name}, {what})"

    def _short_data(self) -> str:
        text = repr(self.data)
        return text if len(text) <= 200 else f"{text[:200]}..."


def _data(result: Result[Any]) -> object:
    """Return the return value of the task.

    Raises:
        JobError: The job did not succeed. A new copy each time, so that no traceback grows.
    """
    if result.error is not None:
        raise copy.copy(result.error) from result.error.__cause__
    return result.__dict__["_data"]


# Set after the class is made: inside it, the dataclass would take them for a default and a field.
Result.data = cast("Any", property(_data))  # type: ignore[misc]  # no variable, a property
Result.__dataclass_fields__ = cast("Any", _Fields(Result.__dataclass_fields__))
