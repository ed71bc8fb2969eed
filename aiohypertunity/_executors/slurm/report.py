"""A verdict as an outcome: the error says what happened, in Slurm's words too, and what to do next."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..._model.errors import (
    JobCancelled,
    JobCrashed,
    JobError,
    JobFailed,
    JobTimeout,
    NodeFailed,
    OutOfMemory,
    RemoteTraceback,
    ResultLost,
    SubmitError,
    TransportError,
)
from ..._model.results import Outcome, Status
from ..._model.sbatch_options import sbatch_options, seconds
from ..._rules import messages
from ..._wire.payloads import described
from .text import ENDED
from .verdict import Fate

if TYPE_CHECKING:
    from ..._model.jobs import Job
    from .shell import Sign
    from .text import Accounted


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of an element's end.

    Attributes:
        slurm_id: Slurm's id of it, as squeue prints it.
        node: Where it ran, or "".
        state: Slurm's last word on it, or "".
        reason: Why it's in that state, in Slurm's words, or "".
        end: Its shell's last word.
        elapsed: Seconds that it ran, by its shell.
        account: What the accounting says.
        log: The end of what it wrote.
        timeout: Seconds that it might run by our count.
        lost: Why there's no readable result.
        started: Whether it ever began to run.
        is_script: Whether it's a script.
        options: What sbatch was given for it; if empty, what the job itself asks for is taken.
    """

    slurm_id: str | None = None
    node: str = ""
    state: str = ""
    reason: str = ""
    end: Sign | None = None
    elapsed: float | None = None
    account: Accounted | None = None
    log: str = ""
    timeout: float | None = None
    lost: str = "none was there"
    started: bool = False
    is_script: bool = False
    options: tuple[str, ...] = ()

    @property
    def code(self) -> int | None:
        """What its process exited with, as a shell has it."""
        if self.end is not None:
            return self.end.code
        if self.account is not None and self.account.exit_code:
            return self.account.exit_code
        return None

    @property
    def signal(self) -> int | None:
        """The signal that killed it."""
        if self.end is not None:
            return self.end.code - 128 if self.end.code > 128 else None
        return self.account.signal or None if self.account is not None else None


def report(job: Job[Any], fate: Fate, ending: Ending) -> Outcome:
    """The outcome of a job that met this fate; for any but `WAIT` and `READ`."""
    if fate is Fate.CANCELLED_OUTSIDE and _reached_limit(job, ending):
        # Nobody was left to ask, but the clock tells.
        fate = Fate.SLURM_LIMIT
    status, error = _ERRORS[fate](job, ending)
    # 128 and more is how a shell says it of a signal.
    code = ending.code if ending.signal is None else None
    return Outcome(
        status,
        error=error,
        exit_code=code,
        signal=ending.signal,
        host=ending.node or None,
        slurm_id=ending.slurm_id,
        stdout=ending.log,
        max_rss=ending.account.max_rss if ending.account else None,
    )


def refused(error: SubmitError | TransportError) -> Outcome:
    """The outcome of a job that can't be brought to Slurm."""
    return Outcome(Status.FAILED, error=error)


def fault(job: Job[Any], error: Exception) -> Outcome:
    """Return the outcome of a job at which the executor itself failed."""
    said = described(error)
    failed = TransportError(
        f"the Slurm executor failed at {messages.name(job)}: {said}: "
        "this is a defect of aiohypertunity, please report it with this traceback"
    )
    text = "".join(traceback.format_exception(error)).rstrip()
    failed.__cause__ = RemoteTraceback(text)
    return refused(failed)


def waited_too_long(
    job: Job[Any], reason: str, slurm_id: str | None, *, started: bool = False
) -> Outcome:
    """The outcome of a job whose turn didn't come within its `queue_timeout`."""
    begun = "was queued again after it had started" if started else "never started"
    limit = getattr(job, "queue_timeout", None) or 0.0
    why = f" (Slurm says: {reason})" if reason else ""
    message = (
        f"{messages.name(job)} waited for its turn longer than its queue_timeout of {limit:g} s, "
        f"{begun}, and was taken out of the queue{why}"
    )
    return Outcome(Status.TIMED_OUT, error=JobTimeout(message, job=job), slurm_id=slurm_id)


def _reached_limit(job: Job[Any], ending: Ending) -> bool:
    limit = seconds(_asked(job, ending, "time"))
    return limit is not None and ending.elapsed is not None and ending.elapsed >= limit - 1


def _asked(job: Job[Any], ending: Ending, name: str) -> str:
    """What was asked of sbatch by this option, or ""."""
    meta = job.meta or {}
    own = sbatch_options({}, meta.get("options", {}), meta.get("resources", {}))
    given = (option.partition("=") for option in ending.options or own)
    return next((value for option, _, value in given if option == f"--{name}"), "")


def _where(job: Job[Any], ending: Ending) -> str:
    node = f" on {ending.node}" if ending.node else ""
    return f"{messages.name(job)} (Slurm job {ending.slurm_id}{node})"


def _words(ending: Ending) -> str:
    state = ending.account.state if ending.account else ending.state
    # What it said before the end is no news.
    said = f"; Slurm says {state}" if state in ENDED else ""
    if said and ending.reason:
        said += f" ({ending.reason})"
    return said + messages.last_lines(ending.log)


def _exited(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    if not ending.is_script:
        return _crashed(job, ending)
    message = f"{_where(job, ending)} exited with code {ending.code}{_words(ending)}"
    return Status.FAILED, JobFailed(message, job=job, exit_code=ending.code)


def _crashed(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    signal = ending.signal
    if signal:
        how = f"was killed by {messages.signal_name(signal)}"
    elif ending.code is not None:
        how = f"exited with code {ending.code}"
    elif ending.started:
        how = "was killed together with its batch shell, which left no word of it"
    else:
        how = "couldn't be started (does its node see the spool directory?)"
    message = f"the process of {_where(job, ending)} {how}{_words(ending)}"
    return Status.CRASHED, JobCrashed(message, job=job, exit_code=ending.code, signal=signal)


def _our_limit(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    message = f"{_where(job, ending)} ran longer than its timeout of {ending.timeout or 0:g} s and was ended"
    return Status.TIMED_OUT, JobTimeout(message + messages.last_lines(ending.log), job=job)


def _slurm_limit(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    asked = _asked(job, ending, "time")
    limit = f"its time limit ({asked})" if asked else "the time limit of its partition"
    message = (
        f"{_where(job, ending)} ran longer than {limit}, and Slurm ended it: ask for more by "
        f"meta={{'resources': {{'time': ...}}}}{_words(ending)}"
    )
    return Status.TIMED_OUT, JobTimeout(message, job=job)


def _memory(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    asked = _asked(job, ending, "mem")
    had = f"the {asked} that it asked for" if asked else "what a job gets that asks for none"
    used = ending.account.max_rss if ending.account else None
    most = f" (it was seen to use {used / (1 << 20):.0f} MiB)" if used else ""
    message = (
        f"{_where(job, ending)} was killed for using more memory than {had}{most}: ask for more by "
        f"meta={{'resources': {{'memory': ...}}}}{_words(ending)}"
    )
    error = OutOfMemory(message, job=job, exit_code=ending.code, signal=ending.signal)
    return Status.CRASHED, error


def _node(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    message = f"Slurm lost the node of {_where(job, ending)}: retries=1 would run it again{_words(ending)}"
    return Status.CRASHED, NodeFailed(message, job=job)


def _forgotten(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    message = (
        f"slurmctld lost its state, and with it {_where(job, ending)}, which had started and was "
        f"stopped: retries=1 would run it again{messages.last_lines(ending.log)}"
    )
    return Status.CRASHED, NodeFailed(message, job=job)


def _unlaunched(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    message = (
        f"Slurm could not launch {_where(job, ending)}, and says: {ending.reason}. Its node or its "
        f"prolog may be at fault: retries=1 would submit it again{messages.last_lines(ending.log)}"
    )
    return Status.CRASHED, NodeFailed(message, job=job)


def _preempted(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    message = (
        f"{_where(job, ending)} had to make room for another and wasn't queued again: retries=1 would "
        f"run it again{_words(ending)}"
    )
    return Status.CRASHED, JobCrashed(message, job=job)


def _cancelled(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    return Status.CANCELLED, messages.cancelled(job, started=ending.started)


def _cancelled_outside(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    if _asked(job, ending, "dependency") and "Dependency" in ending.reason and not ending.started:
        return _unmet(job, ending)
    when = "while it ran" if ending.started else "before it ran"
    message = (
        f"{_where(job, ending)} was cancelled {when}, and not by this scheduler{_words(ending)}"
    )
    return Status.CANCELLED, JobCancelled(message, job=job)


def _unmet(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    what = f"its dependency ({_asked(job, ending, 'dependency')}) can never be met"
    if ending.reason != "DependencyNeverSatisfied":
        # It was last seen waiting for another.
        what = f"somebody did it, or {what}"
    message = f"{_where(job, ending)} was cancelled before it ran: {what}{_words(ending)}"
    return Status.CANCELLED, JobCancelled(message, job=job)


def _never(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    if _asked(job, ending, "dependency") and "Dependency" in ending.reason:
        return _unmet(job, ending)
    message = (
        f"{_where(job, ending)} never started, and Slurm doesn't know it any more: it was cancelled "
        "by somebody, or slurmctld lost its state. Dispatch it again"
    )
    return Status.CANCELLED, JobCancelled(message, job=job)


def _lost(job: Job[Any], ending: Ending) -> tuple[Status, JobError]:
    message = (
        f"{_where(job, ending)} ended, but left no readable result: {ending.lost}{_words(ending)}"
    )
    return Status.FAILED, ResultLost(message, job=job)


_ERRORS = {
    Fate.EXITED: _exited,
    Fate.CRASHED: _crashed,
    Fate.OUR_LIMIT: _our_limit,
    Fate.SLURM_LIMIT: _slurm_limit,
    Fate.MEMORY: _memory,
    Fate.NODE: _node,
    Fate.PREEMPTED: _preempted,
    Fate.CANCELLED: _cancelled,
    Fate.CANCELLED_OUTSIDE: _cancelled_outside,
    Fate.FORGOTTEN: _forgotten,
    Fate.UNLAUNCHED: _unlaunched,
    Fate.NEVER: _never,
    Fate.LOST: _lost,
}
