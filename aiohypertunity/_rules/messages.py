"""What a job's error says: what happened, to which job, its last words, and what to do next."""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import os
import re
import signal as signals
from typing import TYPE_CHECKING, Any

from .._model.errors import (
    JobCancelled,
    JobCrashed,
    JobFailed,
    JobTimeout,
    OutOfMemory,
    PayloadError,
    RemoteTraceback,
    set_cause,
)
from .._model.results import Outcome, Status
from .._wire import payloads
from .._wire.payloads import described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._model.jobs import Job


class NotNow(Exception):
    """A result can't be loaded here and now; its files are still there."""


_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}

_LAST_LINES = 10
_LAST_FRAMES = 5
_OUR_FRAME = re.compile(
    rf'  File "({re.escape(os.path.dirname(os.path.dirname(__file__)))}/|<string>)'
)


def last_lines(*streams: str) -> str:
    """The end of each of a job's streams, as the end of a message: empty if it was silent."""
    ends = [_end(stream.rstrip().splitlines()) for stream in streams]
    lines = [line for end in ends for line in end]
    return (
        "\nIts last output:\n" + "\n".join(f"    {line[:500]}" for line in lines) if lines else ""
    )


def _end(lines: list[str]) -> list[str]:
    """The last lines, and of what Python says when it crashes only where in the job it was."""
    fatal = [number for number, line in enumerate(lines) if line.startswith("Fatal Python error: ")]
    if not fatal:
        return lines[-_LAST_LINES:]
    own, (error, *dump) = lines[: fatal[-1]], lines[fatal[-1] :]
    current = [number for number, line in enumerate(dump) if line.startswith("Current thread ")]
    frames = dump[current[-1] + 1 :] if current else []
    theirs = [line for line in frames if line.startswith("  File ") and not _OUR_FRAME.match(line)]
    return [*own[-_LAST_LINES:], error, *theirs[:_LAST_FRAMES]]


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
    return _because(JobFailed(f"{name(job)} raised {described(error)}", job=job), error, traceback)


def not_imported(job: Job[Any], error: BaseException, traceback: str, *streams: str) -> JobFailed:
    """The script or module of `job` raised `error` when it was imported."""
    reference: Any = job.target
    file = os.path.basename(reference.path) if reference.path else reference.module
    if isinstance(error, SystemExit):
        code = "" if error.code is None else f" with {error.code!r}"
        message = (
            f"{file} exited{code} while it was imported for {name(job)}: does it lack "
            f"`if __name__ == '__main__':`?{last_lines(*streams)}"
        )
    else:
        message = f"importing {file} for {name(job)} raised {described(error)}"
    return _because(JobFailed(message, job=job), error, traceback)


def _because(failed: JobFailed, error: BaseException, traceback: str) -> JobFailed:
    set_cause(error, RemoteTraceback(traceback.rstrip()))
    failed.__cause__ = error
    return failed


def not_started(job: Job[Any], error: Exception) -> JobFailed:
    """An attempt at `job` could not even be begun."""
    failed = JobFailed(f"{name(job)} could not be started: {described(error)}", job=job)
    failed.__cause__ = error
    return failed


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


def garbled(job: Job[Any], *streams: str, signal: int | None = None) -> JobCrashed:
    """While `job` ran its process sent something that was no answer of the worker's."""
    message = (
        f"the process of {name(job)} wrote into the socket of its worker, or shut it down, and was ended: "
        f"leave alone the descriptors that the job did not open{last_lines(*streams)}"
    )
    return JobCrashed(message, job=job, signal=signal)


def out_of_memory(job: Job[Any], *streams: str, signal: int) -> OutOfMemory:
    """The kernel killed the process of `job` for want of memory."""
    message = (
        f"the process of {name(job)} was killed by {signal_name(signal)} when this machine ran out "
        f"of memory: run fewer at a time (n_parallel), or let it use less{last_lines(*streams)}"
    )
    return OutOfMemory(message, job=job, signal=signal)


def of_inputs(error: BaseException, which: str) -> BaseException:
    """The error of a job of `map`, and which of its inputs were in that job."""
    error = copy.copy(error)
    error.args = (f"{which} of map: {error}",)
    return error


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
        error.__cause__ = RemoteTraceback(traceback.rstrip())
    return error


def from_reply(
    job: Job[Any],
    kind: bytes,
    body: bytes | memoryview,
    files: Sequence[str] = (),
    *streams: str,
    loads: Callable[[bytes | memoryview, Sequence[str]], Any] = payloads.loads,
) -> Outcome:
    """Return what a call's reply, as `payloads.run` gives it, makes of its job. Remove `files`.

    Raises:
        NotNow: It can't be loaded now: `loads` refuses it, or there is no file descriptor left.
    """
    try:
        answer = loads(body, files)
        if type(answer) is payloads.FailedChunk:
            failed = from_reply(job, answer.kind, answer.body, loads=loads)
            outcome = Outcome(Status.FAILED, answer, failed.error)
        elif kind == payloads.VALUE:
            outcome = Outcome(Status.SUCCEEDED, answer)
        elif kind == payloads.RAISED:
            error = _raised_there(job, streams, *answer, loads=loads)
            outcome = Outcome(Status.FAILED, error=error)
        else:
            outcome = Outcome(Status.FAILED, error=unreadable(job, *answer))
    except NotNow:
        raise
    except BaseException as error:  # loading runs code of the user
        retry_if_no_descriptor(error)
        reason = f"{described(error)} (while it was read back)"
        outcome = Outcome(Status.FAILED, error=unreadable(job, "the return value", reason))
    for path in files:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return outcome


def retry_if_no_descriptor(error: BaseException) -> None:
    """Raise `NotNow` if an error says that there was no file descriptor left."""
    if isinstance(error, OSError) and error.errno in _NO_DESCRIPTOR:
        raise NotNow(described(error)) from error


def _raised_there(
    job: Job[Any],
    streams: Sequence[str],
    blob: bytes,
    said: str,
    traceback: str,
    importing: bool,
    *,
    loads: Callable[[bytes | memoryview, Sequence[str]], Any],
) -> JobFailed | PayloadError:
    try:
        error = loads(blob, ())
        if importing:
            return not_imported(job, error, traceback, *streams)
        return raised(job, error, traceback)
    except NotNow:
        raise
    except BaseException as reason:  # loading runs code of the user
        retry_if_no_descriptor(reason)
        words = f"{described(reason)} (while it was read back); it was {said}"
        return unreadable(job, "the exception", words, traceback)


def signal_name(number: int) -> str:
    """A signal in words: `SIGKILL (9)`."""
    try:
        return f"{signals.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"
