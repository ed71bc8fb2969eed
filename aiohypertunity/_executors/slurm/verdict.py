"""RULES: what became of an element, from evidence.

In this order: a result of its own hand, the word its batch shell left, what squeue says, what the
accounting says. Absence alone proves nothing, a failed query is no information, and a state that
isn't known to be an end isn't one. Times are seconds on one clock, whichever.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from ..._wire.spool import SPOOL_FAILED, SPOOL_FULL
from .text import ENDED, WAITING, Accounted

if TYPE_CHECKING:
    from .shell import Sign

SETTLE = 0.3
"""How long a name may lag behind one that was made after it, in one listing."""

EXIT_GRACE = 1.5
"""How long to wait for the shell's word after Slurm has said how a job ended."""

REQUEUE_GRACE = 6.0
"""How long a job that lost its node or its place may take to be queued again."""

RESULT_GRACE = 10.0
"""How long a file may take to be seen across a network, after Slurm has said that all went well."""

CONTROLLER_GRACE = 60.0
"""How long to wait for slurmctld to say whether it was started anew."""

WORD_GRACE = 10.0
"""How long to wait for Slurm's word on a job that its shell saw killed."""


class Fate(enum.Enum):
    """What became of an element, or what is to be done to know."""

    WAIT = "wait"
    READ = "there is a result to read"
    EXITED = "its process exited by itself"
    CRASHED = "its process was killed"
    OUR_LIMIT = "it ran longer than its timeout"
    SLURM_LIMIT = "it ran longer than its time limit"
    MEMORY = "it was killed for the memory it used"
    NODE = "Slurm lost its node"
    PREEMPTED = "it had to make room, and wasn't queued again"
    CANCELLED = "we cancelled it"
    CANCELLED_OUTSIDE = "somebody cancelled it"
    FORGOTTEN = "slurmctld lost its state, and with it this one"
    UNLAUNCHED = "Slurm could not launch it, and holds it"
    NEVER = "Slurm forgot it before it started"
    LOST = "it left no readable result"


class Facts(NamedTuple):
    """All that is known of an element.

    Attributes:
        is_script: Whether it's a script, whose result is read once it's over.
        result: Whether a result is there, and isn't known to be bad.
        bad_result: What is wrong with the one that was read.
        n_claims: How many times it was started.
        end: The last word of its shell, if it's of the last start.
        end_at: When that was seen.
        state: What squeue last said of it since it last started; "" if nothing.
        state_at: When squeue was asked.
        state_since: When squeue was asked that first said so.
        missing_since: When a squeue that succeeded first didn't know it; None if the last one did.
        n_missing: How many in a row.
        siblings: Whether any of those knew others of its array.
        account: What the accounting says.
        account_open: Whether the accounting may still tell something.
        cancelled_at: When an scancel of ours for it was accepted.
        stopping: Whether we want it to end, accepted or not.
        launch_failed: How many squeues in a row said that it could not be launched.
        forgotten: Whether slurmctld has proved to have lost it.
        restarted: Whether slurmctld was started anew since it was submitted; None if unknown.
    """

    is_script: bool
    result: bool = False
    bad_result: str | None = None
    n_claims: int = 0
    end: Sign | None = None
    end_at: float = 0.0
    state: str = ""
    state_at: float = -1.0
    state_since: float = -1.0
    missing_since: float | None = None
    n_missing: int = 0
    siblings: bool = False
    account: Accounted | None = None
    account_open: bool = False
    cancelled_at: float | None = None
    stopping: bool = False
    launch_failed: int = 0
    forgotten: bool = False
    restarted: bool | None = False

    @property
    def ours(self) -> bool:
        """Whether it's we who cancelled it: Slurm may do it long before scancel says so."""
        return self.stopping or self.cancelled_at is not None


def judge(facts: Facts, now: float) -> Fate:
    """What became of an element."""
    if facts.result:
        return Fate.READ
    if facts.bad_result is not None:
        return Fate.LOST
    if facts.end is not None:
        return _by_end(facts, facts.end, now)
    if facts.missing_since is not None:
        return _by_absence(facts, facts.missing_since, now)
    if facts.launch_failed >= 2 and not facts.ours:
        return Fate.UNLAUNCHED
    if facts.state in ENDED:
        return _by_state(facts, facts.state, facts.state_since, now)
    return Fate.WAIT


def needs_word(facts: Facts) -> bool:
    """Whether it's for Slurm to say how this goes on, and soon."""
    return not facts.result and (
        facts.end is not None
        or facts.missing_since is not None
        or facts.ours
        or facts.launch_failed > 0
        or facts.state in ENDED
    )


def _by_end(facts: Facts, end: Sign, now: float) -> Fate:
    """The child is gone, and its shell has left word."""
    if end.why == "TIME":
        return Fate.OUR_LIMIT
    if end.why == "OOM":
        return Fate.MEMORY
    by_itself = end.why == "0" and end.code < 128
    if by_itself and end.code == 0 and facts.is_script:
        return Fate.READ
    if now < facts.end_at + SETTLE and not facts.is_script:
        return Fate.WAIT
    if end.code in {SPOOL_FAILED, SPOOL_FULL} and not facts.is_script:
        return Fate.LOST
    if facts.ours:
        return Fate.CANCELLED
    if by_itself:
        return Fate.EXITED
    if end.why == "KILL":
        return Fate.CRASHED
    return _signalled(facts, end, now)


def _signalled(facts: Facts, end: Sign, now: float) -> Fate:
    """It, or its shell, was sent a signal, whatever it made of it: only Slurm knows what for."""
    patient = now < facts.end_at + WORD_GRACE
    if facts.forgotten:
        # Where slurmd, which knows it no longer as Slurm's, has ended it.
        return Fate.FORGOTTEN
    if facts.missing_since is not None and facts.missing_since >= facts.end_at:
        if facts.account_open:
            return Fate.WAIT
        if facts.account is not None and facts.account.state in ENDED:
            return _by_word(facts, end, facts.account.state)
        if facts.state in ENDED and facts.state_at >= facts.end_at:
            return _by_word(facts, end, facts.state)
        if facts.restarted is None and now < facts.missing_since + CONTROLLER_GRACE:
            return Fate.WAIT
        return Fate.CRASHED if end.why == "0" else Fate.CANCELLED_OUTSIDE
    if facts.state_at >= facts.end_at:
        if facts.state in {"PREEMPTED", "NODE_FAIL"}:
            return _by_state(facts, facts.state, facts.state_since, now)
        if end.why == "TERM" and facts.state in {"COMPLETED", "FAILED"}:
            # So it looks for a moment also while it's being requeued.
            settled = now >= facts.state_since + REQUEUE_GRACE
            return _by_word(facts, end, facts.state) if settled else Fate.WAIT
        if facts.state in ENDED:
            return _by_word(facts, end, facts.state)
        if facts.state in WAITING:
            return Fate.UNLAUNCHED if facts.launch_failed >= 2 else Fate.WAIT
    if end.why == "0" and not patient:
        return Fate.CRASHED
    # A requeue looks like this too, until Slurm has spoken.
    return Fate.WAIT


def _by_word(facts: Facts, end: Sign, state: str) -> Fate:
    """Slurm has said how it ended; if that's no more than its exit code tells, the code tells."""
    if state in _FATES:
        return _FATES[state]
    if end.code == 0 and facts.is_script:
        return Fate.READ
    return Fate.EXITED if end.code < 128 else Fate.CRASHED


_FATES = {
    "TIMEOUT": Fate.SLURM_LIMIT,
    "DEADLINE": Fate.SLURM_LIMIT,
    "OUT_OF_MEMORY": Fate.MEMORY,
    "CANCELLED": Fate.CANCELLED_OUTSIDE,
    "REVOKED": Fate.CANCELLED_OUTSIDE,
    "NODE_FAIL": Fate.NODE,
    "BOOT_FAIL": Fate.NODE,
    "RECONFIG_FAIL": Fate.NODE,
    "PREEMPTED": Fate.PREEMPTED,
}


def _by_state(facts: Facts, state: str, since: float, now: float) -> Fate:
    """Slurm says that it's over, and its shell says nothing (yet)."""
    fate = _FATES.get(state, Fate.LOST if state == "COMPLETED" else Fate.CRASHED)
    if fate in {Fate.NODE, Fate.PREEMPTED}:
        grace = REQUEUE_GRACE
    else:
        grace = RESULT_GRACE if fate is Fate.LOST else EXIT_GRACE
    if facts.ours and fate is not Fate.LOST:
        fate, grace = Fate.CANCELLED, SETTLE
    return fate if now >= since + grace else Fate.WAIT


def _by_absence(facts: Facts, since: float, now: float) -> Fate:
    """Slurm doesn't know it any more, and its shell says nothing (yet)."""
    accepted = facts.cancelled_at is not None and since >= facts.cancelled_at
    if accepted or (facts.ours and facts.n_missing >= 2):
        return Fate.CANCELLED if now >= since + SETTLE else Fate.WAIT
    if facts.state in ENDED:
        return _by_state(facts, facts.state, facts.state_since, now)
    if facts.forgotten:
        return Fate.FORGOTTEN if now >= since + EXIT_GRACE else Fate.WAIT
    if facts.account_open:
        return Fate.WAIT
    if facts.account is not None and facts.account.state in ENDED:
        return _by_state(facts, facts.account.state, since, now)
    if now < since + RESULT_GRACE:
        return Fate.WAIT
    if facts.restarted is None and now < since + CONTROLLER_GRACE:
        return Fate.WAIT
    if facts.n_claims:
        # A start without an end is no end while slurmctld may have forgotten it.
        return Fate.LOST if facts.restarted is False else Fate.FORGOTTEN
    # squeue forgets at once who is cancelled while pending, and nobody else.
    return Fate.CANCELLED_OUTSIDE if facts.siblings and facts.n_missing >= 2 else Fate.NEVER
