"""One attempt at a job, with the evidence on it; and the array it's part of."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ..._model.jobs import ScriptRef
from ..._wire import spool
from . import report, shell, text
from .verdict import Facts

if TYPE_CHECKING:
    from ..._rules.ledger import Entry
    from .staging import Pinned


class Element:
    """One attempt at an entry, and the evidence on it."""

    __slots__ = (
        "account",
        "account_asked",
        "array",
        "attempts_before",
        "bad_result",
        "bad_tries",
        "cancelled_at",
        "claimed_at",
        "claims",
        "disowned",
        "done",
        "end",
        "end_at",
        "entry",
        "expired",
        "fetched",
        "group",
        "host",
        "index",
        "missing_since",
        "n_launches_failed",
        "n_launches_tried",
        "n_missing",
        "number",
        "pinned",
        "queued_at",
        "reading",
        "reason",
        "result",
        "seen",
        "seen_at",
        "siblings",
        "started_at",
        "starts",
        "state_since",
        "stopped",
        "stopping",
        "submission",
        "waiting_since",
    )  # fmt: skip

    def __init__(self, entry: Entry, group: tuple[bool, tuple[str, ...]], now: float) -> None:
        self.entry = entry
        self.group = group
        self.attempts_before = entry.attempt
        self.queued_at = now
        # Since when it has waited for its turn; None while it runs.
        self.waiting_since: float | None = now
        self.number = -1
        self.submission: Submission | None = None
        self.index = -1
        self.pinned: Pinned | None = None
        # The one that claimed it, should it have been submitted twice.
        self.array: str | None = None
        self.claims: set[int] = set()
        self.starts: set[int] = set()
        self.claimed_at = -1.0
        self.started_at: float | None = None
        self.end: shell.Sign | None = None
        self.end_at = 0.0
        self.result: int | None = None
        self.bad_result: str | None = None
        self.bad_tries = 0
        self.seen: text.Seen | None = None
        self.seen_at = -1.0
        self.state_since = -1.0
        self.missing_since: float | None = None
        self.n_missing = 0
        self.siblings = False
        # Looks in a row that say so; submissions that ended so.
        self.n_launches_failed = 0
        self.n_launches_tried = 0
        self.account: text.Accounted | None = None
        self.account_asked = False
        self.cancelled_at: float | None = None
        self.stopping = False
        self.stopped = False
        self.expired = False
        self.reading = False
        self.done = False
        # Over, though nothing says that Slurm has ended it.
        self.disowned = False
        self.fetched: dict[str, str] = {}
        self.reason: str | None = None
        self.host = ""

    @property
    def is_script(self) -> bool:
        return isinstance(self.entry.job.target, ScriptRef)

    @property
    def key(self) -> tuple[str, int] | None:
        """The array and the index under which Slurm knows it; None before it does."""
        if self.submission is None or self.submission.array is None:
            return None
        return self.array or self.submission.array, self.index

    @property
    def slurm_id(self) -> str | None:
        key = self.key
        return None if key is None else text.element_id(*key)

    def facts(self, *, accounting: bool) -> Facts:
        """The evidence, less what belongs to a start before the last."""
        last = max(self.claims, default=-1)
        end = self.end if self.end is not None and self.end.restart >= last else None
        fresh = self.seen is not None and self.seen_at > self.claimed_at
        return Facts(
            is_script=self.is_script,
            result=self.result is not None,
            bad_result=self.bad_result,
            n_claims=len(self.claims),
            end=end,
            end_at=self.end_at,
            state=self.seen.state if self.seen is not None and fresh else "",
            state_at=self.seen_at if fresh else -1.0,
            state_since=self.state_since,
            missing_since=self.missing_since,
            n_missing=self.n_missing,
            siblings=self.siblings,
            account=self.account,
            account_open=accounting and not self.account_asked,
            cancelled_at=self.cancelled_at,
            stopping=self.stopping or self.expired,
            launch_failed=self.n_launches_failed if fresh else 0,
            forgotten=self.submission is not None and self.submission.forgotten,
            restarted=self._restarted(),
        )

    def _restarted(self) -> bool | None:
        """Return whether slurmctld was started anew, as far as it was asked since it lacks this one."""
        submission = self.submission
        if submission is None or submission.restarted:
            return None if submission is None else True
        fresh = self.missing_since is None or submission.asked_at >= self.missing_since
        return submission.restarted if fresh else None

    def ending(self, log: bytes | None = None, end: bytes | None = None) -> report.Ending:
        """How it ended, for its error.

        Args:
            log: The last of its output.
            end: Its shell's last word.
        """
        words = (end or b"").decode(errors="replace").split()
        elapsed = None
        if len(words) == 3:
            with contextlib.suppress(ValueError):
                elapsed = float(words[2]) - float(words[1])
        node = words[0] if words and words[0] != "-" else self.host
        return report.Ending(
            slurm_id=self.slurm_id,
            node=node or (self.account.node if self.account else ""),
            state=self.seen.state if self.seen is not None else "",
            reason=self.seen.reason if self.seen is not None else "",
            end=self.end,
            elapsed=elapsed,
            account=self.account,
            log=(log or b"").decode(errors="replace"),
            timeout=self.entry.timeout,
            lost=self.bad_result or self._unwritten() or "none was found",
            started=bool(self.claims),
            is_script=self.is_script,
            options=self.group[1],
        )

    def _unwritten(self) -> str | None:
        """Return why its node could not write its result, by the exit code; None if that says nothing."""
        if self.end is None or self.submission is None or self.is_script:
            return None
        directory = self.submission.directory
        if self.end.code == spool.SPOOL_FULL:
            return f"the disk of {directory} is full: free some space, or name another disk by Slurm(workdir=...)"
        if self.end.code == spool.SPOOL_FAILED:
            return f"it could not be written to {directory}"
        return None

    def saw(self, seen: text.Seen, at: float) -> None:
        """A squeue that began at `at` lists it."""
        if self.seen is None or self.seen.state != seen.state or self.seen_at <= self.claimed_at:
            self.state_since = at
        self.n_launches_failed = self.n_launches_failed + 1 if text.launch_failed(seen) else 0
        self.seen, self.seen_at = seen, at
        self.missing_since, self.n_missing, self.siblings = None, 0, False
        self.host = seen.node or self.host

    def missed(self, at: float, *, siblings: bool) -> None:
        """A squeue that began at `at` doesn't list it."""
        if self.missing_since is None:
            self.missing_since = at
        self.n_missing += 1
        self.siblings = self.siblings or siblings


class Submission:
    """An array: its directory, its elements, its id once it has one."""

    def __init__(self, number: int, run: str, directory: str, elements: list[Element]) -> None:
        self.name = f"s{number}"
        self.token = f"{run}.{number}"
        self.directory = f"{directory}/{self.name}"
        self.elements = elements
        self.n_left = len(elements)
        self.array: str | None = None
        self.submitted_at = 0.0
        self.epoch = 0.0
        # The start of slurmctld that was known before sbatch ran.
        self.boot = ""
        # True once slurmctld has proved to have lost it: its id may be somebody else's.
        self.forgotten = False
        # Whether slurmctld was started anew since; None while that is unknown.
        self.restarted: bool | None = None
        self.asked_at = -1.0
        self.names: frozenset[str] = frozenset()
        self.garbage: list[str] = []
        self.kept = False
        # True if elements of it were submitted again: it is kept until the run ends.
        self.fenced = False
        for index, element in enumerate(elements):
            element.submission = self
            element.index = index
