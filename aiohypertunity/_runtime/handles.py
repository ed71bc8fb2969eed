"""What `dispatch` and `collect` give: handles on jobs, batches of them, and collectors of results."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import anyio

from .._model.errors import CollectTimeout
from .._model.results import Result, Status
from .._rules.ledger import Demand, Entry, Pool, Waiter, Wants

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .._model.jobs import Job

T = TypeVar("T")

Cancel = Callable[[Entry], None]
CancelAll = Callable[[Iterable[Entry]], None]

_HOLD = 0.002
"""Seconds for which results are delivered or dropped before the rest of the loop has its turn."""


class Home:
    """The process that a scheduler belongs to: a forked child has its objects, but not its threads."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """True in that process, False in a child of it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise RuntimeError in any other process."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this scheduler belongs to process {self._pid}: a forked child cannot use it, make "
                "another one in this process"
            )


class JobHandle(Generic[T]):
    """A dispatched job: a future of its `Result`.

    Awaiting it gives the result, any number of times; that never raises the job's error, takes the
    result from no collector, and cancels no job if it is cancelled itself.
    """

    __slots__ = ("_cancel", "_entry")

    def __init__(self, entry: Entry, cancel: Cancel) -> None:
        self._entry = entry
        self._cancel = cancel

    @property
    def id(self) -> int | str:
        """The job's id."""
        return self._entry.job.id

    @property
    def job(self) -> Job[T]:
        """The job."""
        return self._entry.job

    @property
    def status(self) -> Status:
        """Where it stands."""
        return self._entry.status

    @property
    def slurm_id(self) -> str | None:
        """Slurm's id of it, as `squeue` prints it; None until it is known."""
        return self._entry.slurm_id

    @property
    def pending_reason(self) -> str | None:
        """Why Slurm lets it wait, in Slurm's words; None if it doesn't, or isn't Slurm's."""
        return self._entry.pending_reason if self.status is Status.PENDING else None

    @property
    def node(self) -> str | None:
        """The machine it runs or ran on, where it's known."""
        return self._entry.result.host if self._entry.result else self._entry.node

    @property
    def started_at(self) -> float | None:
        """When it began to run (the last time), in seconds since the epoch; None if it hasn't."""
        return self._entry.result.started_at if self._entry.result else self._entry.started_at

    def done(self) -> bool:
        """Whether it's over."""
        return self._entry.result is not None

    def cancel(self) -> None:
        """Asks for its end. It's done once its process tree or Slurm job is truly gone."""
        self._cancel(self._entry)

    async def wait_started(self) -> None:
        """Waits until it runs, or is over without having run."""
        await _changed(self._entry, lambda: self._entry.started_at is not None)

    def __await__(self) -> Generator[Any, None, Result[T]]:
        return self._result().__await__()

    async def _result(self) -> Result[T]:
        await _changed(self._entry, lambda: False)
        return cast("Result[T]", self._entry.result)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobHandle) and other._entry is self._entry

    def __hash__(self) -> int:
        return hash(self._entry)

    def __repr__(self) -> str:
        return f"JobHandle(id={self.id!r}, status={self.status.name})"


async def _changed(entry: Entry, enough: Callable[[], bool]) -> None:
    """Waits until an entry is over, or has changed to what is `enough`."""
    while entry.result is None and not enough():
        future = asyncio.get_running_loop().create_future()
        if entry.waiters is None:
            entry.waiters = []
        entry.waiters.append(future)
        try:
            await future
        finally:
            if entry.waiters and future in entry.waiters:
                entry.waiters.remove(future)


class Batch(Sequence[JobHandle[T]]):
    """The handles of one `dispatch`, in its order.

    As `async with batch:` it cancels what's left of it on the way out, waits until that is gone, and
    lets go of what nobody collected.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        pool: Pool,
        cancel: Cancel,
        cancel_all: CancelAll,
        closed: Closed,
        home: Home,
    ) -> None:
        self._entries = entries
        self._pool = pool
        self._cancel = cancel
        self._cancel_all = cancel_all
        self._closed = closed
        self._home = home

    @overload
    def __getitem__(self, index: int) -> JobHandle[T]: ...
    @overload
    def __getitem__(self, index: slice) -> list[JobHandle[T]]: ...
    def __getitem__(self, index: int | slice) -> JobHandle[T] | list[JobHandle[T]]:
        if isinstance(index, slice):
            return [JobHandle(entry, self._cancel) for entry in self._entries[index]]
        return JobHandle(self._entries[index], self._cancel)

    def __len__(self) -> int:
        return len(self._entries)

    def collect(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = False,
    ) -> Collector[T]:
        """As `Scheduler.collect`, of this batch alone.

        Calling it claims all results of the batch that nobody has taken yet: the scheduler's own
        `collect` gives them no more.
        """
        self._home.check()
        self._pool.claim(self._entries)
        return Collector(self._pool, self._closed, n_results, timeout, deadline, ordered=ordered)

    def cancel(self) -> None:
        """Cancel all jobs of the batch that are not over. None of them starts after this returns.

        Their statuses say so at once. Of a large batch the jobs end a few at a time, so that the event loop is not
        blocked.

        Raises:
            RuntimeError: Some of it can't be stopped, being run by a joblib backend.
        """
        self._cancel_all(self._entries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._home.is_here:
            return
        with contextlib.suppress(RuntimeError):
            self.cancel()
        try:
            with anyio.CancelScope(shield=True):
                async for entry in _in_slices(self._entries):
                    await _changed(entry, lambda: False)
                async for entry in _in_slices(self._entries):
                    _drop(entry)
        finally:
            for entry in self._entries:
                _drop(entry)

    def __repr__(self) -> str:
        n_over = sum(entry.result is not None for entry in self._entries)
        return f"<Batch of {len(self)} jobs, {n_over} of them over>"


Closed = Callable[[], bool]


def _drop(entry: Entry) -> None:
    """Lets go of a result that nobody has collected."""
    if entry.pool is not None:
        entry.pool.remove(entry)


async def _in_slices(entries: Iterable[Entry]) -> AsyncIterator[Entry]:
    """The entries, as many at a time as the loop may be held for."""
    let_loop_run_at = time.monotonic() + _HOLD
    for entry in entries:
        yield entry
        if time.monotonic() > let_loop_run_at:
            await asyncio.sleep(0)
            let_loop_run_at = time.monotonic() + _HOLD


@contextlib.contextmanager
def waiting(pool: Pool, wants: Wants) -> Iterator[asyncio.Future[None]]:
    """A future that is done when a pool has changed as wanted.

    Whoever takes a result because of it does so inside the `with`: what is left at its end is for others.
    """
    changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiter = Waiter(partial(wake, changed), wants)
    pool.wait(waiter)
    try:
        yield changed
    finally:
        pool.leave(waiter)


def wake(changed: asyncio.Future[None], _: object = None) -> None:
    """Lets whoever awaits a future go on. It may have been cancelled."""
    if not changed.done():
        changed.set_result(None)


class Collector(Generic[T]):
    """Results as they come. What it hasn't delivered is the next collector's to deliver.

    An iterator object and no generator: a timeout can't land in the body of the loop, and nothing is
    lost by a `break` or by a cancelled `anext`.
    """

    def __init__(
        self,
        pool: Pool,
        closed: Closed,
        n_results: float | None,
        timeout: float | None,
        deadline: float | None,
        *,
        ordered: bool,
    ) -> None:
        _check_wait("timeout", timeout)
        _check_wait("deadline", deadline)
        _check_number(n_results)
        self._pool = pool
        self._closed = closed
        self._demand = Demand(n_results, ordered=ordered)
        self._timeout = math.inf if timeout is None else timeout
        self._loop = asyncio.get_running_loop()
        self._end = math.inf if deadline is None else self._loop.time() + deadline
        self._let_loop_run_at = 0.0
        self._n_waiting = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result[T]:
        """The next result.

        Raises:
            CollectTimeout: It took too long. Nothing is lost.
            NotEnoughJobs: There can't be as many as were asked for.
        """
        return cast("Result[T]", (await self.next_entry()).result)

    async def next_entry(self) -> Entry:
        """The entry of the next result, taken. Raises as `__anext__` does."""
        now = self._loop.time()
        if now > self._let_loop_run_at:
            if self._let_loop_run_at and self._pool.n_ready:
                await asyncio.sleep(0)
            self._let_loop_run_at = self._loop.time() + _HOLD
        entry = self._take()
        return await self._wait(now) if entry is None else entry

    def take_ready(self) -> list[Entry]:
        """Takes all that can be had now, without waiting."""
        entries = []
        while (entry := self._take()) is not None:
            entries.append(entry)
        return entries

    def _take(self) -> Entry | None:
        entry = self._demand.take(self._pool)
        if entry is not None and self._n_waiting and self._demand.has_all:
            self._pool.wake_all()  # others who wait for this collector have nothing to wait for
        return entry

    def give_back(self, entries: Sequence[Entry]) -> None:
        """Lets another collector have what was taken here and not delivered."""
        self._demand.n_collected -= len(entries)
        self._pool.restore(entries)

    async def take_all(self) -> list[Entry]:
        """Waits for all that was asked for, and takes nothing before all of it is there.

        Raises:
            CollectTimeout: It took too long.
            NotEnoughJobs: There can't be as many as were asked for.
        """
        n_ready, since = self._pool.n_ready, self._loop.time()
        while not self._demand.can_take_all(self._pool, closed=self._closed()):
            now = self._loop.time()
            if self._pool.n_ready != n_ready:
                n_ready, since = self._pool.n_ready, now
            until = min(since + self._timeout, self._end)
            if now >= until:
                raise self._timed_out()
            with self._waiting(Wants.CHANGE, until) as changed:
                await changed
        return self.take_ready()

    async def _wait(self, since: float) -> Entry:
        until = min(since + self._timeout, self._end)
        wants = Wants.NEXT if self._demand.ordered else Wants.ANY
        while not self._demand.is_met(self._pool, closed=self._closed()):
            if self._loop.time() >= until:
                raise self._timed_out()
            with self._waiting(wants, until) as changed:
                await changed
                entry = self._take()
            if entry is not None:
                return entry
        raise StopAsyncIteration

    @contextlib.contextmanager
    def _waiting(self, wants: Wants, until: float) -> Iterator[asyncio.Future[None]]:
        """A future that is done when the pool has changed as wanted, or the time has come."""
        with waiting(self._pool, wants) as changed:
            timer = None if until == math.inf else self._loop.call_at(until, wake, changed)
            self._n_waiting += 1
            try:
                yield changed
            finally:
                self._n_waiting -= 1
                if timer is not None:
                    timer.cancel()

    def _timed_out(self) -> CollectTimeout:
        pending = [entry.job for entry in self._pool.unfinished()]
        ids = ", ".join(repr(job.id) for job in pending[:5]) + (", ..." if len(pending) > 5 else "")
        n = self._demand.n_collected
        reasons = Counter(e.pending_reason for e in self._pool.unfinished() if _waits(e))
        waits = "".join(f"; {count} jobs: {why}" for why, count in reasons.most_common(5))
        return CollectTimeout(
            f"no result came in time: {n} came before, {len(pending)} jobs are pending (ids {ids}{waits}); "
            "none of them was cancelled and nothing is lost: collect again",
            n_collected=n,
            pending=pending,
        )


def _waits(entry: Entry) -> bool:
    """Return True if it is known why it waits."""
    return entry.status is Status.PENDING and bool(entry.pending_reason)


def _check_wait(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a number of seconds or None")
    if not value >= 0:
        raise ValueError(f"{name}={value!r}: must be 0 seconds or more")


def _check_number(n_results: object) -> None:
    if n_results is None or n_results == math.inf:
        return
    if not isinstance(n_results, int) or isinstance(n_results, bool):
        raise TypeError(f"n_results={n_results!r}: must be a whole number, math.inf or None")
