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

import math
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ._errors import NotEnoughJobs
from ._jobs import SLURM_ONLY, did_you_mean
from ._results import Result, Status

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from ._jobs import Job
    from ._results import Outcome


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
        self._queues: dict[Needs, deque[Entry]] = {}

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
        """Adds an entry at the end of its queue."""
        assert entry.needs is not None
        queue = self._queues.get(entry.needs)
        if queue is None:
            queue = self._queues[entry.needs] = deque()
        queue.append(entry)

    def wait_again(self, entries: Iterable[Entry]) -> None:
        """Puts entries back to where they were: before whatever was dispatched after them."""
        for entry in sorted(entries, key=lambda entry: entry.seq, reverse=True):
            assert entry.needs is not None
            queue = self._queues.setdefault(entry.needs, deque())
            younger_than_it = 0
            while younger_than_it < len(queue) and queue[younger_than_it].seq < entry.seq:
                younger_than_it += 1
            queue.insert(younger_than_it, entry)

    def start(self) -> Entry | None:
        """Takes the next entry that may start now, and gives it what it needs."""
        if self.free_cpus <= 0 or not self._queues:
            return None
        lacking: set[str] = set()
        for queue in self._by_age():
            needs = queue[0].needs
            assert needs is not None
            if needs.cpus > self.free_cpus:
                return None
            lacks = {name for name, n in needs.others if len(self._free[name]) < n}
            if not lacks and lacking.isdisjoint(name for name, _ in needs.others):
                entry = queue.popleft()
                if not queue:
                    del self._queues[needs]
                entry.grant = self._grant(needs)
                return entry
            lacking |= lacks
        return None

    def ahead(self, needs: Needs | None, fits: Callable[[Entry], bool]) -> Entry | None:
        """Takes the oldest entry of all, if it needs just `needs` and `fits`. It gets no grant."""
        oldest = next(iter(self._by_age()), None)
        if oldest is None or oldest[0].needs != needs or not fits(oldest[0]):
            return None
        return oldest.popleft()

    def purge(self) -> None:
        """Lets go of entries that were over before they started."""
        waiting = {
            needs: deque(entry for entry in queue if not entry.status.is_final)
            for needs, queue in self._queues.items()
        }
        self._queues = {needs: queue for needs, queue in waiting.items() if queue}

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

    def _by_age(self) -> Iterable[deque[Entry]]:
        """The queues with something in them, the one whose head was dispatched first in front."""
        for needs, queue in tuple(self._queues.items()):
            while queue and queue[0].status.is_final:  # cancelled while it waited
                queue.popleft()
            if not queue:
                del self._queues[needs]
        if len(self._queues) < 2:
            return self._queues.values()
        return sorted(self._queues.values(), key=lambda queue: queue[0].seq)


_ONE_CPU = Needs()
_ONE_CPU_GRANTED = Grant()


class Pool:
    """Results on their way to whoever collects them.

    Attributes:
        waiters: What to call when something has changed; each is called once and let go of.
    """

    __slots__ = ("_members", "_ready", "waiters")

    def __init__(self) -> None:
        # OrderedDict: the first of a plain dict is slow to find once many before it are deleted.
        self._members: OrderedDict[int, Entry] = OrderedDict()
        self._ready: OrderedDict[int, Entry] = OrderedDict()
        self.waiters: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        """How many results are still to be taken, finished or not."""
        return len(self._members)

    @property
    def n_ready(self) -> int:
        """How many results can be taken now."""
        return len(self._ready)

    def unfinished(self) -> list[Entry]:
        """The entries that will put a result here, in the order of dispatch."""
        return [entry for entry in self._members.values() if entry.result is None]

    def add(self, entry: Entry) -> None:
        """Expects an entry's result here."""
        entry.pool = self
        self._members[entry.seq] = entry
        if entry.result is not None:
            self._ready[entry.seq] = entry

    def ready(self, entry: Entry) -> None:
        """Notes that an entry has its result, and wakes who waits."""
        self._ready[entry.seq] = entry
        # All of them: the first might want another entry before this one.
        self.wake_all()

    def take(self, *, ordered: bool = False) -> Entry | None:
        """Takes the first finished entry; if `ordered`, only if nothing dispatched before is left."""
        if not self._ready:
            return None
        if ordered:
            entry = next(iter(self._members.values()))
            if entry.result is None:
                return None
        else:
            entry = next(iter(self._ready.values()))
        self.remove(entry)
        return entry

    def restore(self, entries: Iterable[Entry]) -> None:
        """Has results again that were taken and not delivered: before all that are ready since."""
        returned = {entry.seq: entry for entry in entries}
        for entry in returned.values():
            entry.pool = self
        self._members = OrderedDict(sorted({**self._members, **returned}.items()))
        self._ready = OrderedDict({**returned, **self._ready})
        self.wake_all()

    def remove(self, entry: Entry) -> None:
        """Expects this entry's result no more."""
        del self._members[entry.seq]
        self._ready.pop(entry.seq, None)
        entry.pool = None
        if not self._members:
            self.wake_all()

    def claim(self, entries: Iterable[Entry]) -> None:
        """Moves entries whose result nobody has taken yet from their pools to this one."""
        others = set()
        for entry in entries:
            if entry.pool is not None and entry.pool is not self:
                others.add(entry.pool)
                entry.pool.remove(entry)
                self.add(entry)
        for pool in others:
            pool.wake_all()

    def wake_all(self) -> None:
        """Wakes every waiter, to look at the pool again."""
        while self.waiters:
            self.waiters.popleft()()


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
        if self.n_results is not None and 0 < self.n_results <= self.n_collected:
            return None
        entry = pool.take(ordered=self.ordered)
        if entry is not None:
            self.n_collected += 1
        return entry

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
