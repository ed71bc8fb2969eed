"""When to look at the cluster: often while something happens, seldom while nothing does.

A look makes slurmctld send all the cluster's jobs, whoever asks for how few. So it may take a
fiftieth of its time at most, and looks, submissions and cancels share what RPCs a minute may cost.
"""

from __future__ import annotations

from typing import NamedTuple

URGENT, BUSY, QUIET = 0.3, 2.0, 15.0
"""Seconds between looks: somebody waits for Slurm's word; jobs start and end; nothing happens."""

_LONGEST = 60.0

LOOK = 2
"""RPCs that a look costs: squeue asks for the jobs and for the partitions."""

_FLOOR = 2.0
"""Seconds after which a look is taken whatever submissions have spent: an array costs one RPC, so
100 of them overdraw a bucket of 30 by more than a minute. One look in 2 s is one RPC a second."""


class Mood(NamedTuple):
    """What there is to look for.

    Attributes:
        urgent_since: When somebody began to wait for Slurm's word; None if nobody does.
        changed_at: When something last happened.
        duration: Seconds that the last look took.
        n_failed: How many looks in a row have failed.
    """

    urgent_since: float | None
    changed_at: float
    duration: float = 0.0
    n_failed: int = 0


def next_look(mood: Mood, last: float, now: float) -> float:
    """When to look next.

    Args:
        mood: What there is to look for.
        last: When the last look began.
        now: The present.
    """
    if mood.n_failed:
        pause = min(0.5 * BUSY * 2.0**mood.n_failed, QUIET)
    elif mood.urgent_since is not None:
        # It gets less urgent with time: a job may hang in its end for as long as KillWait and more.
        pause = min(URGENT + (now - mood.urgent_since) / 10, BUSY)
    else:
        pause = min(BUSY + (now - mood.changed_at) / 10, QUIET)
    return last + max(pause, min(50 * mood.duration, _LONGEST))


class Budget:
    """RPCs that may be spent: a bucket, as slurmctld keeps one for each user.

    Submissions and cancels never wait for it, and may overdraw it; looks wait, but only for so long.

    Args:
        a_minute: How many flow in.
        burst: How many it holds.
    """

    def __init__(self, a_minute: float = 60.0, burst: float = 30.0) -> None:
        self._rate = a_minute / 60
        self._burst = burst
        self._left = burst
        self._at = 0.0

    def spend(self, amount: float, now: float) -> None:
        """Takes out what was used, also more than there is: it's missing to those who come later."""
        self._left = self._level(now) - amount
        self._at = now

    def ready(self, amount: float, now: float) -> float:
        """When there will be so much."""
        lacking = amount - self._level(now)
        return now if lacking <= 0 else now + lacking / self._rate

    def look_at(self, last: float, now: float) -> float:
        """Return when a look may be paid for.

        Args:
            last: When the last look began.
            now: The present.
        """
        return min(self.ready(LOOK, now), max(last + _FLOOR, now))

    def _level(self, now: float) -> float:
        return min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
