"""The rules: who waits, who runs, who is done; what may start now; who gets which result.

Plain state, changed by plain functions that take facts and return what to do. No `await`, no
clock, no file: what is decided here can be tested from a table.

*Starting.* Local jobs take CPUs (one slot of `n_parallel` each, or as many as they ask for) and
whatever else the scheduler was given to hand out, a GPU's index say. Jobs that need the same form a queue; queues
are served in the order of dispatch. A job that can't start reserves what it lacks, so that those
behind it can't starve it, while those that don't touch what it lacks may pass.

*Getting.* A finished job's result lies in a `Pool` until a collector takes it: the scheduler's own, or
the one of a batch that was claimed.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
import operator
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .._model.errors import NotEnoughJobs
from .._model.jobs import SLURM_ONLY, did_you_mean
from .._model.results import Result, Status

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from .._model.jobs import Job
    from .._model.results import Outcome


class Needs(NamedTuple):
    """What a local job occupies while it runs.

    Attributes:
        cpus: Slots of `n_parallel`.
        others: Pairs of a resource's name and how many of it.
    """

    cpus: int = 1
    others: tuple[tuple[str, int], ...] = ()


class Grant(NamedTuple):
    """What a running local job was given.

    Attributes:
        cpus: Slots of `n_parallel`.
        others: Pairs of a resource's name and the indices of it that were handed out.
    """

    cpus: int = 1
    others: tuple[tuple[str, tuple[int | str, ...]], ...] = ()


class Entry:
    """One dispatched job, from dispatch to delivery. Executors read it; only its owner changes it.

    Attributes:
        job: The job.
        call: The packed call of a callable; None for a script.
        executor: Which executor runs it.
        needs: What it occupies; None if something other than this machine bounds it.
        pool: Where its result goes; None once it has been taken.
        seq: Its place in the order of dispatch.
        timeout: Seconds that one attempt may run, or None.
        attempt: How many attempts were started (that a cluster started again counts).
        grant: What it holds at present, or None.
        log_path: Where the whole output is kept, if it is.
        place: The executor's own note.
    """

    __slots__ = (
        "attempt", "call", "executor", "grant", "job", "log_path", "needs", "node", "pending_reason",
        "place", "pool", "queued_at", "result", "retries_left", "seq", "slurm_id", "started_at",
        "status", "stop_status", "timeout", "timer", "waiters",
    )  # fmt: skip

    def __init__(
        self,
        job: Job[Any],
        call: Any,
        executor: Executor,
        needs: Needs | None,
        pool: Pool,
        *,
        timeout: float | None = None,
        retries: int = 0,
        queued_at: float = 0.0,
    ) -> None:
        self.job = job
        self.call = call
        self.executor = executor
        self.needs = needs
        self.pool: Pool | None = pool
        self.timeout = timeout
        self.retries_left = retries
        self.queued_at = queued_at
        self.seq = -1
        self.attempt = 0
        self.status = Status.PENDING
        self.stop_status: Status | None = None
        self.started_at: float | None = None
        self.slurm_id: str | None = None
        self.pending_reason: str | None = None
        self.log_path: Path | None = None
        self.node: str | None = None
        self.grant: Grant | None = None
        self.result: Result[Any] | None = None
        self.place: Any = None
        self.timer: Any = None
        self.waiters: list[asyncio.Future[None]] | None = None


class Executor(Protocol):
    """Runs entries, and reports to its `Owner`. None of these may block."""

    def start(self, entry: Entry) -> None:
        """Runs an attempt at it, as soon as may be."""

    def stop(self, entry: Entry) -> None:
        """Ends an attempt that was given to `start`; it is reported finished once it's gone."""

    def check_stop(self, entry: Entry) -> None:
        """Raises RuntimeError if an attempt at it can't be ended."""

    async def aclose(self) -> None:
        """Lets go of all it holds. Whatever is still running is ended."""


class Owner(Protocol):
    """To whom an executor reports; all of it on the loop's thread."""

    def started(
        self,
        entry: Entry,
        at: float,
        *,
        slurm_id: str | None = None,
        node: str | None = None,
        attempt: int | None = None,
    ) -> None:
        """The attempt began to run.

        Args:
            entry: Which.
            at: When, in seconds since the epoch.
            slurm_id: Slurm's id of it.
            node: The machine it runs on, where that isn't this one.
            attempt: Which attempt this is, where the executor knows of ones it didn't start.
        """

    def pending(self, entry: Entry, reason: str | None, *, slurm_id: str | None = None) -> None:
        """The attempt waits (again), and why, in the cluster's words."""

    def finished(self, entry: Entry, outcome: Outcome) -> None:
        """The attempt is over, and nothing of it runs any more."""

    def ahead(self, entry: Entry, fits: Callable[[Entry], bool]) -> Entry | None:
        """The next waiting entry, if it may run in `entry`'s place after it.

        The executor keeps it at hand, not started, until `handed_over` or `given_back`.
        """

    def handed_over(self, done: Entry, successor: Entry) -> None:
        """What `done` held is now held by an entry that was taken `ahead`."""

    def given_back(self, entries: list[Entry]) -> None:
        """Entries that were taken `ahead` and not started wait again, in their old places."""


class Line:
    """Entries in the order of dispatch, any of which can be taken out at any time.

    A dict of the entries, and a heap of their numbers. The number of an entry that was taken out stays in the heap
    until it comes to the top, or until most of the heap is such numbers.
    """

    __slots__ = ("_entries", "_numbers")

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._numbers: list[int] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over a copy, in the order of dispatch."""
        return iter([self._entries[number] for number in sorted(self._entries)])

    @property
    def first(self) -> Entry:
        """The entry that was dispatched first. There must be one."""
        while self._numbers[0] not in self._entries:
            heapq.heappop(self._numbers)
        return self._entries[self._numbers[0]]

    def add(self, *entries: Entry) -> None:
        """Add entries, each at its place in the order."""
        for entry in entries:
            self._entries[entry.seq] = entry
            heapq.heappush(self._numbers, entry.seq)

    def discard(self, *entries: Entry) -> None:
        """Take out those of some entries that are there."""
        pop = self._entries.pop
        for entry in entries:
            pop(entry.seq, None)
        if len(self._numbers) > 2 * len(self._entries) + _SPARE:
            self._numbers = sorted(self._entries)


_SPARE = 64
"""Numbers of entries that are gone for which a heap is not worth being made anew."""


class Ledger:
    """What waits and what is free on this machine.

    Args:
        n_cpus: Slots for local jobs.
        others: Indices to hand out, by the name of the resource.
    """

    def __init__(self, n_cpus: int, others: Mapping[str, Sequence[int | str]]) -> None:
        self.n_cpus = n_cpus
        self.free_cpus = n_cpus
        self._all = {name: list(indices) for name, indices in others.items()}
        self._free = {name: list(indices) for name, indices in others.items()}
        self._queues: dict[Needs, Line] = {}

    def needs(self, resources: Mapping[str, int]) -> Needs:
        """What a job that asks for `resources` will occupy.

        Raises:
            ValueError: There isn't as much, and never will be. The message lacks its subject, the job.
        """
        if not resources:
            return _ONE_CPU
        amounts = dict(resources)
        cpus = amounts.pop("cpu", 1)
        if cpus > self.n_cpus:
            raise ValueError(
                f"asks for {cpus} cpu, and this scheduler has {self.n_cpus}: raise n_parallel"
            )
        for name, amount in amounts.items():
            if amount > len(self._all.get(name, ())):
                raise ValueError(
                    f"asks for {amount} {name}, and this scheduler has {self._lack(name)}"
                )
        return Needs(cpus, tuple(sorted((n, a) for n, a in amounts.items() if a)))

    def _lack(self, name: str) -> str:
        """What there is where there's too little of a resource, and what would help."""
        if name in self._all:
            return f"{len(self._all[name])}: give it more in resources={{{name!r}: [...]}}"
        advice = f": give it resources={{{name!r}: [...]}}"
        if name in SLURM_ONLY:
            advice = f": {name} is for a SlurmJob"
        elif name != "gpu":
            advice = did_you_mean(name, ("cpu", "gpu", *self._all), 0.8) or advice
        return f"only {', '.join(('cpu', *self._all))}{advice}"

    def wait(self, entry: Entry) -> None:
        """Add an entry to its queue, at its place in the order of dispatch."""
        assert entry.needs is not None
        queue = self._queues.get(entry.needs)
        if queue is None:
            queue = self._queues[entry.needs] = Line()
        queue.add(entry)

    def discard(self, entries: Iterable[Entry]) -> None:
        """Take those of some entries out of their queues that wait there."""
        for needs, alike in itertools.groupby(entries, operator.attrgetter("needs")):
            queue = self._queues.get(needs)
            if queue is not None:
                self._take_out(queue, *alike)

    def _take_out(self, queue: Line, *entries: Entry) -> None:
        queue.discard(*entries)
        if not queue:
            assert entries[0].needs is not None
            del self._queues[entries[0].needs]

    def start(self) -> Entry | None:
        """Takes the next entry that may start now, and gives it what it needs."""
        if self.free_cpus <= 0 or not self._queues:
            return None
        lacking: set[str] = set()
        for queue in self._by_age():
            entry = queue.first
            needs = entry.needs
            assert needs is not None
            if needs.cpus > self.free_cpus:
                return None
            lacks = {name for name, n in needs.others if len(self._free[name]) < n}
            if not lacks and lacking.isdisjoint(name for name, _ in needs.others):
                self._take_out(queue, entry)
                entry.grant = self._grant(needs)
                return entry
            lacking |= lacks
        return None

    def ahead(self, needs: Needs | None, fits: Callable[[Entry], bool]) -> Entry | None:
        """Takes the oldest entry of all, if it needs just `needs` and `fits`. It gets no grant."""
        queue = next(iter(self._by_age()), None)
        if queue is None:
            return None
        oldest = queue.first
        if oldest.needs != needs or not fits(oldest):
            return None
        self._take_out(queue, oldest)
        return oldest

    def release(self, entry: Entry) -> None:
        """Takes back what an entry holds."""
        grant = entry.grant
        if grant is not None:
            entry.grant = None
            self.free_cpus += grant.cpus
            for name, indices in grant.others:
                free = {*self._free[name], *indices}
                self._free[name] = [index for index in self._all[name] if index in free]

    def _grant(self, needs: Needs) -> Grant:
        self.free_cpus -= needs.cpus
        if needs is _ONE_CPU:
            return _ONE_CPU_GRANTED
        if not needs.others:
            return Grant(needs.cpus)
        handed_out = []
        for name, n in needs.others:
            handed_out.append((name, tuple(self._free[name][:n])))
            del self._free[name][:n]
        return Grant(needs.cpus, tuple(handed_out))

    def _by_age(self) -> Iterable[Line]:
        """The queues, the one whose head was dispatched first in front."""
        if len(self._queues) < 2:
            return self._queues.values()
        return sorted(self._queues.values(), key=lambda queue: queue.first.seq)


_ONE_CPU = Needs()
_ONE_CPU_GRANTED = Grant()


class Wants(enum.Enum):
    """When a waiter is woken: by any result, by the next one in the order of dispatch, by each change."""

    ANY = enum.auto()
    NEXT = enum.auto()
    CHANGE = enum.auto()

    __hash__ = object.__hash__  # as right as an enum's own, and no call of a Python function


class Waiter:
    """Waits for something to happen in a pool.

    Args:
        wake: Called once, when it has happened.
        wants: For what it waits.
    """

    __slots__ = ("is_woken", "wake", "wants")

    def __init__(self, wake: Callable[[], None], wants: Wants) -> None:
        self.wake = wake
        self.wants = wants
        self.is_woken = False


_WOKEN_AT_ONCE = 32
"""Waiters that have been woken and not looked yet, at most: what they then do is done in one turn of the loop."""


class Pool:
    """Results on their way to whoever collects them.

    *Waking.* A result wakes one waiter that can take it, and each waiter that wants to see every change. A waiter
    calls `wait`; once it has been woken and has looked at the pool, or when it gives up, it calls `leave`,
    which wakes the next one if there is something left for it. So a woken waiter that is cancelled, or finds that
    somebody else was quicker, passes the wake on, and as long as there is a result for a waiter, one of those that can
    take it has been woken and has not left. What concerns all waiters wakes them in the same way, a few at a time.
    """

    __slots__ = ("_called", "_members", "_n_woken", "_ready", "_waiting")

    def __init__(self) -> None:
        self._members = Line()
        # OrderedDict: the first of a plain dict is slow to find once many before it are deleted.
        self._ready: OrderedDict[int, Entry] = OrderedDict()
        self._waiting: dict[Wants, OrderedDict[Waiter, None]] = {}
        self._called: OrderedDict[Waiter, None] = OrderedDict()
        self._n_woken = {Wants.ANY: 0, Wants.NEXT: 0, Wants.CHANGE: 0}

    def __len__(self) -> int:
        """How many results are still to be taken, finished or not."""
        return len(self._members)

    @property
    def n_ready(self) -> int:
        """How many results can be taken now."""
        return len(self._ready)

    def unfinished(self) -> list[Entry]:
        """The entries that will put a result here, in the order of dispatch."""
        return [entry for entry in self._members if entry.result is None]

    def add(self, entry: Entry) -> None:
        """Expects an entry's result here."""
        entry.pool = self
        self._members.add(entry)
        if entry.result is not None:
            self.ready(entry)

    def ready(self, entry: Entry) -> None:
        """Notes that an entry has its result, and wakes who waits for it."""
        self._ready[entry.seq] = entry
        if self._waiting:
            self._changed()

    def take(self, *, ordered: bool = False) -> Entry | None:
        """Takes the first finished entry; if `ordered`, only if nothing dispatched before is left."""
        if not self._ready:
            return None
        entry = self._members.first if ordered else next(iter(self._ready.values()))
        if entry.result is None:
            return None
        self.remove(entry)
        return entry

    def restore(self, entries: Iterable[Entry]) -> None:
        """Has results again that were taken and not delivered: before all that are ready since."""
        returned = list(entries)
        for entry in reversed(returned):
            entry.pool = self
            self._members.add(entry)
            self._ready[entry.seq] = entry
            self._ready.move_to_end(entry.seq, last=False)
        if returned:
            self._changed()

    def remove(self, *entries: Entry) -> None:
        """Expects the results of these entries no more."""
        self._members.discard(*entries)
        for entry in entries:
            self._ready.pop(entry.seq, None)
            entry.pool = None
        if not self._waiting:
            return
        if self._members:
            self._wake()  # the next one in the order may have its result already
        else:
            self.wake_all()

    def claim(self, entries: Iterable[Entry]) -> None:
        """Moves entries whose result nobody has taken yet from their pools to this one."""
        found = [e for e in entries if e.pool is not None and e.pool is not self]
        others = {entry.pool for entry in found if entry.pool is not None}
        for pool in others:
            moved = [entry for entry in found if entry.pool is pool]
            pool.remove(*moved)
            self._members.add(*moved)
            for entry in moved:
                entry.pool = self
                if entry.result is not None:
                    self.ready(entry)
            pool.wake_all()

    def wait(self, waiter: Waiter) -> None:
        """Lets a waiter wait, behind those that do."""
        self._waiting.setdefault(waiter.wants, OrderedDict())[waiter] = None

    def leave(self, waiter: Waiter) -> None:
        """Notes that a waiter has looked, or will not. Wakes the next one if there is something for it."""
        if waiter.is_woken:
            self._n_woken[waiter.wants] -= 1
        elif waiter in self._called:
            del self._called[waiter]
        else:
            self._take_out(waiter)
        self._wake()

    def wake_all(self) -> None:
        """Wakes every waiter, to look at the pool again."""
        for waiting in self._waiting.values():
            self._called.update(waiting)
        self._waiting.clear()
        self._wake()

    def _changed(self) -> None:
        """Wakes those for whom there is something new."""
        watching = self._waiting.pop(Wants.CHANGE, None)
        if watching is not None:
            self._called.update(watching)
        self._wake()

    def _wake(self) -> None:
        while (self._called or self._waiting) and sum(self._n_woken.values()) < _WOKEN_AT_ONCE:
            waiter = self._next_waiter()
            if waiter is None:
                return
            waiter.is_woken = True
            self._n_woken[waiter.wants] += 1
            waiter.wake()

    def _next_waiter(self) -> Waiter | None:
        """Takes out the waiter that is to be woken now, if there is one."""
        if self._called:
            return self._called.popitem(last=False)[0]
        wants = self._wanted()
        if wants is None:
            return None
        waiter = next(iter(self._waiting[wants]))
        self._take_out(waiter)
        return waiter

    def _wanted(self) -> Wants | None:
        """What kind of waiter there is a result for that no woken one will take."""
        if Wants.ANY in self._waiting and len(self._ready) > self._n_woken[Wants.ANY]:
            return Wants.ANY
        if Wants.NEXT in self._waiting and self._ready and not self._n_woken[Wants.NEXT]:
            return Wants.NEXT if self._members.first.result is not None else None
        return None

    def _take_out(self, waiter: Waiter) -> None:
        waiting = self._waiting[waiter.wants]
        del waiting[waiter]
        if not waiting:
            del self._waiting[waiter.wants]


class Demand:
    """What one `collect` was asked for, and when it has had it.

    Args:
        n_results: As in `Scheduler.collect`.
        ordered: As in `Scheduler.collect`.
    """

    __slots__ = ("n_collected", "n_results", "ordered")

    def __init__(self, n_results: float | None, *, ordered: bool) -> None:
        self.n_results = n_results
        self.ordered = ordered
        self.n_collected = 0

    def take(self, pool: Pool) -> Entry | None:
        """The next entry to deliver, or None."""
        if self.has_all:
            return None
        entry = pool.take(ordered=self.ordered)
        if entry is not None:
            self.n_collected += 1
        return entry

    @property
    def has_all(self) -> bool:
        """Whether as many were taken as were asked for."""
        return self.n_results is not None and 0 < self.n_results <= self.n_collected

    def can_take_all(self, pool: Pool, *, closed: bool) -> bool:
        """Whether all that is demanded can be taken at once.

        Raises:
            NotEnoughJobs: It never will.
        """
        if self.n_results is None:
            return pool.n_ready == len(pool)
        if self.n_results == math.inf:
            return closed
        if self.n_results <= pool.n_ready:
            return True
        return pool.n_ready == len(pool) and self.is_met(_EMPTY, closed=closed)

    def is_met(self, pool: Pool, *, closed: bool) -> bool:
        """Whether it's over, given that there is nothing to take.

        Raises:
            NotEnoughJobs: It can never be met.
        """
        if self.n_results is None:
            return not len(pool)
        if self.n_results <= self.n_collected:
            return True
        if len(pool):
            return False
        if self.n_results == math.inf:
            return closed
        raise NotEnoughJobs(
            f"collect was asked for {self.n_results} results, gave {self.n_collected}, and no job is "
            "left that could give another: dispatch more first, or collect(n_results=math.inf)",
            n_collected=self.n_collected,
        )


_EMPTY = Pool()
