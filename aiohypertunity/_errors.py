"""Every error of this package, under one root.

    HypertunityError
    ├── JobError                 one job's; carries .job
    │   ├── JobFailed            raised, or exited non-zero; the original exception is its cause
    │   ├── JobCrashed           its process died: signal or exit code, last lines of output
    │   │   ├── OutOfMemory      killed for memory, with what was asked and used where known
    │   │   └── NodeFailed       Slurm lost the node
    │   ├── JobTimeout           ran longer than its timeout (also a TimeoutError)
    │   ├── JobCancelled
    │   ├── ResultLost           ended well by every sign, but left no readable result
    │   └── PayloadError         the call, or what it returned, can't be pickled; names the part
    ├── CollectTimeout           also a TimeoutError
    ├── NotEnoughJobs            asked for more results than can come
    ├── SubmitError              sbatch said no; carries its words
    └── TransportError           SSH or the local shell

A job's error is a value: it arrives in `Result.error` and is raised only by `Result.data`.
Misuse (a wrong type, an impossible request) is a plain `TypeError`, `ValueError` or `RuntimeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._jobs import Job


class HypertunityError(Exception):
    """The root: `except HypertunityError` catches whatever this package raises of its own."""

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
    """`error.__cause__ = cause`, also for an exception that is a frozen dataclass."""
    descriptor: Any = vars(BaseException)["__cause__"]
    descriptor.__set__(error, cause)


class JobError(HypertunityError):
    """Something happened to one job.

    Attributes:
        job: The job it happened to.
    """

    def __init__(self, message: str, *, job: Job[Any] | None = None) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(JobError):
    """The task raised, or the script exited non-zero.

    For a callable `__cause__` is the exception it raised, whose own cause is the remote traceback.

    Attributes:
        exit_code: A script's exit code; None for a callable.
    """

    def __init__(
        self, message: str, *, job: Job[Any] | None = None, exit_code: int | None = None
    ) -> None:
        super().__init__(message, job=job)
        self.exit_code = exit_code


class JobCrashed(JobError):
    """The job's process died under it.

    Attributes:
        exit_code: What it exited with, where it exited; else None.
        signal: The number of the signal that killed it, where one did; else None.
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
    """The kernel or Slurm killed the job for the memory it used."""


class NodeFailed(JobCrashed):
    """Slurm lost the node on which the job ran."""


class JobTimeout(JobError, TimeoutError):
    """The job ran longer than its timeout, and was ended."""


class JobCancelled(JobError):
    """The job was cancelled, by us or from outside."""


class ResultLost(JobError):
    """By every sign the job ended well, but no readable result of it was found."""


class PayloadError(JobError):
    """The call, what it returned or what it raised can't be pickled or unpickled.

    Attributes:
        part: Which part of it, in words: "argument 2", "the return value", ...
    """

    def __init__(self, message: str, *, job: Job[Any] | None = None, part: str = "") -> None:
        super().__init__(message, job=job)
        self.part = part


class CollectTimeout(HypertunityError, TimeoutError):
    """`collect` waited as long as it was told to. Nothing is lost: collect again.

    Attributes:
        n_collected: How many results this collector delivered before.
        pending: The jobs that it still waits for.
    """

    def __init__(
        self, message: str, *, n_collected: int = 0, pending: Sequence[Job[Any]] = ()
    ) -> None:
        super().__init__(message)
        self.n_collected = n_collected
        self.pending = tuple(pending)


class NotEnoughJobs(HypertunityError):
    """`collect` was asked for more results than there are jobs left to give one.

    Attributes:
        n_collected: How many results this collector delivered before.
    """

    def __init__(self, message: str, *, n_collected: int = 0) -> None:
        super().__init__(message)
        self.n_collected = n_collected


class SubmitError(HypertunityError):
    """`sbatch` refused a submission; the message carries its words."""


class TransportError(HypertunityError):
    """A command could not be run, or a file not be moved, over SSH or the local shell."""


class RemoteTraceback(Exception):
    """The traceback of an exception, as text, from the process in which it was raised.

    It is the cause of that exception, so that a printed traceback shows both ends.
    """

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"
