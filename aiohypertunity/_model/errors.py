"""The exceptions of this package, under one root.

    HypertunityError
    ├── JobError                 concerns one job, which is its .job
    │   ├── JobFailed            the task raised, or the script exited non-zero
    │   ├── JobCrashed           the process died
    │   │   ├── OutOfMemory      killed for the memory it used
    │   │   └── NodeFailed       Slurm lost the node
    │   ├── JobTimeout           ran longer than its timeout (also a TimeoutError)
    │   ├── JobCancelled
    │   ├── ResultLost           every sign says success, but there is no readable result
    │   └── PayloadError         the call, result or exception cannot be pickled
    ├── CollectTimeout           also a TimeoutError
    ├── NotEnoughJobs            asked for more results than can come
    ├── SubmitError              sbatch refused a submission
    └── TransportError           SSH or the local shell failed

The error of a job is a value: it is in `Result.error`, and only reading `Result.data` raises it.
Misuse (an argument of a wrong type, an impossible request) raises a plain `TypeError`, `ValueError`
or `RuntimeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .jobs import Job


class HypertunityError(Exception):
    """Base class of all exceptions that this package defines."""

    def __copy__(self) -> HypertunityError:
        cause = self.__cause__
        root = None if cause is None else cause.__cause__
        return _rebuild(type(self), self.args, self.__dict__, cause, root)

    def __reduce__(self) -> tuple[object, ...]:
        # The default drops the cause, and the cause of a JobFailed is what the user's task raised; the
        # cause of that, which the default drops as well, is its traceback. By cloudpickle: the class of
        # what was raised may be one that can't be imported.
        import pickle

        import cloudpickle

        cause = self.__cause__
        root = None if cause is None else cause.__cause__
        causes = cloudpickle.dumps((cause, root))
        return _unpickle, (type(self), self.args, self.__dict__, pickle.loads, causes)


def _unpickle(
    kind: type[HypertunityError],
    args: tuple[object, ...],
    state: dict[str, object],
    loads: Callable[[bytes], tuple[BaseException | None, BaseException | None]],
    causes: bytes,
) -> HypertunityError:
    return _rebuild(kind, args, state, *loads(causes))


def _rebuild(
    kind: type[HypertunityError],
    args: tuple[object, ...],
    state: dict[str, object],
    cause: BaseException | None,
    root: BaseException | None,
) -> HypertunityError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    error.__cause__ = cause
    if cause is not None:
        set_cause(cause, root)
    return error


def set_cause(error: BaseException, cause: BaseException | None) -> None:
    """Set `error.__cause__`, also of an exception that is a frozen dataclass."""
    descriptor: Any = vars(BaseException)["__cause__"]
    descriptor.__set__(error, cause)


class JobError(HypertunityError):
    """Base class of the errors of one job.

    Attributes:
        job: The job that the error concerns.
    """

    def __init__(self, message: str, *, job: Job[Any] | None = None) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(JobError):
    """A failure of the task: it raised an exception, or the script exited with a code other than 0.

    For a callable, `__cause__` is the exception that it raised; the cause of that is the remote
    traceback.

    Attributes:
        exit_code: The exit code of a script; None for a callable.
    """

    def __init__(
        self, message: str, *, job: Job[Any] | None = None, exit_code: int | None = None
    ) -> None:
        super().__init__(message, job=job)
        self.exit_code = exit_code


class JobCrashed(JobError):
    """A death of the job's process: by a signal, or by an exit in the middle of the job.

    Attributes:
        exit_code: The exit code of the process if it exited; otherwise None.
        signal: The number of the signal that killed it; otherwise None.
    """

    def __init__(
        self,
        message: str,
        *,
        job: Job[Any] | None = None,
        exit_code: int | None = None,
        signal: int | None = None,
    ) -> None:
        super().__init__(message, job=job)
        self.exit_code = exit_code
        self.signal = signal


class OutOfMemory(JobCrashed):
    """A job that the kernel or Slurm killed because of the memory it used."""


class NodeFailed(JobCrashed):
    """A job whose node Slurm lost."""


class JobTimeout(JobError, TimeoutError):
    """A job that ran longer than its timeout and was ended."""


class JobCancelled(JobError):
    """A job that was cancelled, by the program or from outside."""


class ResultLost(JobError):
    """A job that succeeded by every sign, but left no readable result."""


class PayloadError(JobError):
    """A call, return value or exception that cannot be pickled or unpickled.

    Attributes:
        part: The name of the part: "argument 2", "the return value", ...
    """

    def __init__(self, message: str, *, job: Job[Any] | None = None, part: str = "") -> None:
        super().__init__(message, job=job)
        self.part = part


class CollectTimeout(HypertunityError, TimeoutError):
    """The end of a `timeout` or `deadline` of `collect`. No result is lost: collect again.

    Attributes:
        n_collected: The number of results that this collector delivered before.
        pending: The jobs for which it still waits.
    """

    def __init__(
        self, message: str, *, n_collected: int = 0, pending: Sequence[Job[Any]] = ()
    ) -> None:
        super().__init__(message)
        self.n_collected = n_collected
        self.pending = tuple(pending)


class NotEnoughJobs(HypertunityError):
    """A `collect` of more results than the remaining jobs can give.

    Attributes:
        n_collected: The number of results that this collector delivered before.
    """

    def __init__(self, message: str, *, n_collected: int = 0) -> None:
        super().__init__(message)
        self.n_collected = n_collected


class SubmitError(HypertunityError):
    """A submission that `sbatch` refused, with its message."""


class TransportError(HypertunityError):
    """A command that did not run, or a file that did not arrive, over SSH or the local shell."""


class RemoteTraceback(Exception):
    """The traceback of an exception, as text, from the process in which it was raised.

    A `RemoteTraceback` is the cause of that exception, so that a printed traceback shows both ends.
    """

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"
