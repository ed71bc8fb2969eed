"""What a job's error says: what happened, to which job, its last words, and what to do next."""

from __future__ import annotations

import contextlib
import functools
import os
import signal as signals
from typing import TYPE_CHECKING, Any

from . import _payload
from ._errors import (
    JobCancelled,
    JobCrashed,
    JobFailed,
    JobTimeout,
    OutOfMemory,
    PayloadError,
    RemoteTraceback,
    set_cause,
)
from ._results import Outcome, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._jobs import Job

_LAST_LINES = 10


def last_lines(*streams: str) -> str:
    """The end of each of a job's streams, as the end of a message: empty if it was silent."""
    ends = [stream.rstrip().splitlines()[-_LAST_LINES:] for stream in streams]
    lines = [line for end in ends for line in end]
    return (
        "\nIts last output:\n" + "\n".join(f"    {line[:500]}" for line in lines) if lines else ""
    )


def name(job: Job[Any]) -> str:
    """A job in words."""
    task: Any = job.task
    if isinstance(task, functools.partial):
        task = task.func
    if not isinstance(task, str | os.PathLike):
        task = getattr(task, "__qualname__", type(task).__qualname__)
    return f"job {job.id!r} ({task})"


def raised(job: Job[Any], error: BaseException, traceback: str) -> JobFailed:
    """The task of `job` raised `error`; `traceback` is what its process had to say of it."""
    failed = JobFailed(f"{name(job)} raised {type(error).__name__}: {_words(error)}", job=job)
    set_cause(error, RemoteTraceback(traceback))
    failed.__cause__ = error
    return failed


def not_started(job: Job[Any], error: Exception) -> JobFailed:
    """An attempt at `job` could not even be begun."""
    failed = JobFailed(
        f"{name(job)} could not be started: {type(error).__name__}: {_words(error)}", job=job
    )
    failed.__cause__ = error
    return failed


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its __str__ fails)"


def exited(job: Job[Any], exit_code: int, *streams: str, hint: str = "") -> JobFailed:
    """The script of `job` exited with a code other than 0; `hint` ends the message."""
    message = f"{name(job)} exited with code {exit_code}{last_lines(*streams)}{hint}"
    return JobFailed(message, job=job, exit_code=exit_code)


def crashed(
    job: Job[Any], *streams: str, exit_code: int | None = None, signal: int | None = None
) -> JobCrashed:
    """The process of `job` died under it."""
    how = f"was killed by {signal_name(signal)}" if signal else f"exited with code {exit_code}"
    message = f"the process of {name(job)} {how} in the middle of it{last_lines(*streams)}"
    return JobCrashed(message, job=job, exit_code=exit_code, signal=signal)


def out_of_memory(job: Job[Any], *streams: str, signal: int) -> OutOfMemory:
    """The kernel killed the process of `job` for want of memory."""
    message = (
        f"the process of {name(job)} was killed by {signal_name(signal)} when this machine ran out "
        f"of memory: run fewer at a time (n_parallel), or let it use less{last_lines(*streams)}"
    )
    return OutOfMemory(message, job=job, signal=signal)


def timed_out(job: Job[Any], timeout: float | None, *streams: str) -> JobTimeout:
    """An attempt at `job` was ended for running longer than it may."""
    message = f"{name(job)} ran longer than its timeout of {timeout:g} s and was ended"
    return JobTimeout(message + last_lines(*streams), job=job)


def cancelled(job: Job[Any], *, started: bool) -> JobCancelled:
    """`job` was cancelled."""
    when = "while it ran" if started else "before it ran"
    return JobCancelled(f"{name(job)} was cancelled {when}", job=job)


def unreadable(job: Job[Any], part: str, reason: str, traceback: str = "") -> PayloadError:
    """A part of the call of `job`, or of what came of it, can't be pickled or unpickled."""
    error = PayloadError(
        f"{part} of {name(job)} can't be sent between processes: {reason}", job=job, part=part
    )
    if traceback:
        error.__cause__ = RemoteTraceback(traceback)
    return error


def from_reply(
    job: Job[Any], kind: bytes, body: bytes | memoryview, files: Sequence[str] = ()
) -> Outcome:
    """What a call's reply, as `_payload.run` gives it, makes of its job. Removes `files`."""
    part = "the exception" if kind == _payload.RAISED else "the return value"
    try:
        answer = _payload.loads(body, files)
        if kind == _payload.RAISED:
            return Outcome(Status.FAILED, error=raised(job, *answer))
    except (Exception, SystemExit) as error:  # reading may import modules, and those may exit
        reason = f"{type(error).__name__}: {_words(error)} (while it was read back)"
        return Outcome(Status.FAILED, error=unreadable(job, part, reason))
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                os.unlink(path)
    if kind == _payload.VALUE:
        return Outcome(Status.SUCCEEDED, answer)
    return Outcome(Status.FAILED, error=unreadable(job, *answer))


def signal_name(number: int) -> str:
    """A signal in words: `SIGKILL (9)`."""
    try:
        return f"{signals.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"
