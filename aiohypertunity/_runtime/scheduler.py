"""The scheduler: takes jobs, lets executors run them, gives back results. The only owner of all of it.

Whatever happens to a job passes through `started`, `pending` and `finished` here, on the loop's thread;
what follows from it, `_rules.ledger` decides. This is the one place where what an executor saw of a job becomes its
`Result`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import anyio

from .._executors.calls import Call, Packer, ScriptCall
from .._executors.joblib_parallel import JoblibCallables, check_backend, check_name
from .._executors.scripts import Scripts
from .._executors.workers.pool import IsolatedCallables, available_cpus
from .._host import sigterm
from .._host.rundir import RunDirectory
from .._host.threads import in_thread, start_thread
from .._model.errors import JobCrashed, JobFailed, JobTimeout, PayloadError
from .._model.events import Cancelled, Event, Finished, Queued, Retried, Started
from .._model.jobs import (
    Job,
    ScriptRef,
    SlurmJob,
    check_retries,
    check_seconds,
    claim,
    release,
    resolve,
)
from .._model.results import Outcome, Result, Status
from .._rules import messages
from .._rules.ledger import Entry, Executor, Ledger, Pool
from .._wire.payloads import short
from .handles import Batch, Collector, Home
from .map import Map
from .streams import EventStream

if TYPE_CHECKING:
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self

    from .._executors.slurm.executor import SlurmExecutor
    from .._model.slurm import Slurm

T = TypeVar("T")

_HOLD = 0.002
"""Seconds for which jobs are started, cancelled or ended before the rest of the loop has its turn."""

_RETRIED = (JobFailed, JobCrashed, JobTimeout)
_ANOTHER = "job.replace() makes another one like it"


@dataclass(frozen=True, slots=True)
class Statistics:
    """A scheduler at one moment.

    Attributes:
        n_pending: Jobs that wait.
        n_running: Jobs that run.
        n_succeeded: Jobs that are over and succeeded; and so on.
        n_uncollected: Results that a `collect` of the scheduler could take now.
        n_parallel: Slots for local jobs.
        n_workers: Worker processes for callables, spare ones included.
        busy_seconds: Slot-seconds for which local jobs have run, those that run now included.
        elapsed_seconds: Seconds since the scheduler started.
    """

    n_pending: int
    n_running: int
    n_succeeded: int
    n_failed: int
    n_crashed: int
    n_timed_out: int
    n_cancelled: int
    n_uncollected: int
    n_parallel: int
    n_workers: int
    busy_seconds: float
    elapsed_seconds: float

    @property
    def utilization(self) -> float:
        """The share of its slots that was kept busy since it started, from 0 to 1."""
        return min(self.busy_seconds / max(self.elapsed_seconds * self.n_parallel, 1e-9), 1.0)


class Scheduler:
    """Runs jobs, and gives their results as they come.

    Use it as `async with`, or with `await start()` and `await aclose()` where a `with` can't span. After
    that, what has finished can still be collected.

    Args:
        n_parallel: How many local jobs run at once. None: all CPUs but one, and at least one. Negative
            numbers count from the end, as joblib's do: -1 is all CPUs, -2 all but one.
        backend: What runs callables. "isolated": worker processes of our own, one a slot. Or the name of any
            joblib backend that can return a generator ("loky", "threading", "dask", "ray", ...): there a
            running callable can't be stopped, and a crash may take others with it.
        resources: What there is to hand out to local jobs that ask for it in `meta["resources"]`: indices by
            name, `{"gpu": [0, 1]}`. A job sees its GPUs in `CUDA_VISIBLE_DEVICES`, another resource in
            `AIOHYPERTUNITY_<NAME>`.
        slurm: The cluster for `SlurmJob`s. None: the one whose `sbatch` is on PATH.
        timeout: Seconds an attempt may run, for jobs that don't say.
        retries: How many more attempts a failure, a crash or a timeout gets, for jobs that don't say.
        kill_grace: Seconds between TERM and KILL for scripts.
        logs: A directory in which the whole output of every local job is kept. New directories and files get the
            modes that the umask gives them, but never more than 0755 and 0644.
        on_exit: What leaving does with unfinished jobs: "cancel" them or "wait" for them.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has an impossible value.
    """

    def __init__(
        self,
        n_parallel: int | None = None,
        *,
        backend: str = "isolated",
        resources: Mapping[str, Sequence[int | str]] | None = None,
        slurm: Slurm | None = None,
        timeout: float | None = None,
        retries: int = 0,
        kill_grace: float = 5.0,
        logs: str | os.PathLike[str] | None = None,
        on_exit: Literal["cancel", "wait"] = "cancel",
    ) -> None:
        self._n_parallel = _slots(n_parallel)
        _check_defaults(timeout, retries, kill_grace, on_exit)
        if not isinstance(backend, str):
            raise TypeError(f"backend={backend!r}: must be a name")
        if backend == "multiprocessing":
            raise ValueError(
                "backend='multiprocessing' can't give results one by one: leave it out, or take 'loky'"
            )
        if backend != "isolated":
            check_name(backend)
        self._ledger = Ledger(self._n_parallel, _checked_resources(resources))
        self._backend = backend
        self._slurm = slurm
        self._timeout = timeout
        self._retries = retries
        self._kill_grace = kill_grace
        self._logs = None if logs is None else Path(logs).absolute()
        self._on_exit = on_exit
        self._pool = Pool()
        self._unfinished: dict[Job[Any], Entry] = {}
        self._running: set[Entry] = set()
        self._counts: Counter[Status] = Counter()
        self._busy_seconds = 0.0
        self._n_dispatched = 0
        self._is_pumping = False
        self._is_pump_due = False
        self._cancelled: deque[Entry] = deque()  # whose ends are still to be seen to
        self._is_end_due = False
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._is_watched = False  # whether there ever was one: to ask a WeakSet is slow
        self._maps: weakref.WeakSet[Map[Any]] = weakref.WeakSet()
        self._closing: asyncio.Task[None] | None = None
        self._is_ending = False
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: Home | None = None
        self._rundir: RunDirectory | None = None
        self._slurm_executor: SlurmExecutor | None = None

    # --- beginning and end -------------------------------------------------------------------

    async def start(self) -> Self:
        """Starts it, where an `async with` can't span its life.

        Raises:
            OSError: There's no room for its directory in the temporary directory, or `logs` can't be written to.
            RuntimeError: It was started before, or there's no asyncio loop (trio has none).
        """
        if self._home is not None:
            self._home.check()
            raise RuntimeError("this scheduler was started before: make another one")
        self._loop = _running_loop()
        self._home = Home()
        self._opener = asyncio.current_task()
        self._thread = threading.get_ident()
        self._started_at = time.monotonic()
        try:
            if self._backend != "isolated":
                await in_thread(check_backend, self._backend, self._n_parallel)
            if self._logs is not None:
                await in_thread(_check_logs, self._logs)
            self._rundir = await _make_rundir()
        except BaseException:
            self._is_closed = True
            raise
        self._scripts = Scripts(self, self._rundir, self._kill_grace)
        self._callables = self._make_callables(self._rundir)
        self._changed = asyncio.Event()
        return self

    def _make_callables(self, rundir: RunDirectory) -> IsolatedCallables | JoblibCallables:
        if self._backend == "isolated":
            return IsolatedCallables(self, rundir, self._n_parallel)
        return JoblibCallables(self, self._backend, self._n_parallel)

    async def aclose(self) -> None:
        """Leaves: cancels or waits for what isn't over, as `on_exit` says, and lets go of everything.

        Cancelled while it waits, it cancels the jobs instead; it is done when nothing of them is left.
        """
        if self._home is not None:
            self._home.check()
        await self._leave(cancel=self._on_exit == "cancel")

    async def _leave(self, *, cancel: bool) -> None:
        if self._loop is None or self._is_closed:
            return
        self._is_ending = self._is_ending or cancel
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            self._is_ending = True
            self._changed.set()
            with anyio.CancelScope(shield=True):
                while not self._closing.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([self._closing])
            raise

    async def _close(self) -> None:
        try:
            while self._unfinished:
                if self._is_ending:
                    await self._cancel_everything()
                if self._unfinished:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        assert self._rundir is not None
        try:
            for running_map in tuple(self._maps):
                running_map.starve()
            if self._slurm_executor is not None:
                await self._slurm_executor.aclose()
            await self._scripts.aclose()
            await self._callables.aclose()
        finally:
            await in_thread(self._rundir.close)
            self._is_closed = True
            self._pool.wake_all()
            for stream in tuple(self._streams):
                stream.wake()
            sigterm.release(self)

    def _leave_soon(self) -> bool:
        """Begin to leave as if whoever started this was interrupted; safe in a signal's handler.

        Returns:
            False if the loop doesn't run, and so nothing will happen.
        """
        if self._loop is None or not self._loop.is_running():
            return False
        self._loop.call_soon_threadsafe(self._begin_leaving)
        return True

    def _begin_leaving(self) -> None:
        assert self._loop is not None
        if self._opener is not None and not self._opener.done():
            self._opener.cancel()
        self._is_ending = True
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        self._changed.set()

    async def _cancel_everything(self) -> None:
        """Cancels all jobs, as many at a time as the loop may be held for."""
        for running_map in tuple(self._maps):
            running_map.starve()
        if self._slurm_executor is not None:
            self._slurm_executor.leave()
        let_loop_run_at = time.monotonic() + _HOLD
        for entry in tuple(self._unfinished.values()):
            # A call that a joblib backend runs can't be stopped: leaving waits for it.
            with contextlib.suppress(RuntimeError):
                self._cancel(entry)
            if time.monotonic() > let_loop_run_at:
                await asyncio.sleep(0)
                let_loop_run_at = time.monotonic() + _HOLD

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._home is None or not self._home.is_here:
            return
        await self._leave(cancel=error is not None or self._on_exit == "cancel")

    if not TYPE_CHECKING:  # a type checker refuses it by itself

        def __enter__(self) -> NoReturn:
            """Says what to write instead."""
            raise TypeError("use `async with`, or aiohypertunity.sync.Scheduler")

        def __exit__(self, *_: object) -> None:
            """Is never reached."""

    # --- what a user asks for ----------------------------------------------------------------

    def dispatch(self, jobs: Job[T] | Iterable[Job[T]], *, private: bool = False) -> Batch[T]:
        """Hands over jobs, to run as soon as may be. Never waits.

        What they were given is fixed now: their calls are packed here, in the calling thread. A job with very
        large arguments is best dispatched from a thread (`await asyncio.to_thread(scheduler.dispatch, ...)`),
        which any thread may do.

        Args:
            jobs: A job, or several.
            private: Whether only this batch's `collect` gives their results. They are then kept only
                as long as the batch is.

        Returns:
            Their handles, in the same order.

        Raises:
            TypeError: Something among them is no job.
            ValueError: A job can never run here: it asks for more than there is, is running already, or has
                an id that another took after it was finished. None of them was taken then.
            RuntimeError: The scheduler isn't running.
        """
        given = _listed(jobs)
        self._check_open()
        needs = [self._check(job) for job in given]
        if len(set(given)) < len(given):
            raise ValueError(f"a job was given twice: {_ANOTHER}")
        packer = self._packer()
        calls = [packer.pack(job) for job in given]
        pool = Pool() if private else self._pool
        if threading.get_ident() != self._thread:
            return self._from_thread(given, calls, needs, pool)
        return self._admit(given, calls, needs, pool)

    def map(
        self,
        function: Callable[..., T] | str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = False,
        chunk: int | Literal["auto"] = "auto",
    ) -> Map[T]:
        """Calls a function with each of `inputs`, and yields the values.

        Takes inputs only as slots come free, so that any number of them needs the same memory. Nothing is
        retried.

        Args:
            function: A callable, `"script.py:function"` or `"package.module:function"`.
            inputs: One argument a call; sync or async.
            ordered: Whether values come in the order of the inputs, or as they are done.
            chunk: How many inputs travel together; "auto" finds out.

        Raises:
            JobError: While iterating: what became of the first input that gives no value, and which one it is.
                The values of all inputs before it are delivered first; those after it are given up, and of
                their values only those come that came before it failed.
        """
        self._check_open()
        if self._backend != "isolated" and self._timeout is not None:
            raise ValueError(
                f"the joblib backend {self._backend!r} can't keep the timeout of a map"
            )
        if isinstance(resolve(function), ScriptRef):
            message = f"map is for functions, and {function!r} is a script: dispatch jobs of it"
            raise ValueError(message)  # noqa: TRY004 - it is of the right type
        made: Map[T] = Map(
            function,
            inputs,
            self._dispatch_chunk,
            self._cancel,
            n_ahead=2 * self._n_parallel + 1,
            ordered=ordered,
            chunk=chunk,
        )
        self._maps.add(made)
        return made

    def collect(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = False,
    ) -> Collector[Any]:
        """Gives results as they come, finished ones at once. Each goes to exactly one collector.

        A timeout, a cancelled `anext` or a `break` cancels no job and loses no result: the next `collect`
        goes on from there.

        Args:
            n_results: How many. None: until no job is left, counting those dispatched meanwhile. 0 or less:
                those that are ready now. `math.inf`: until the scheduler closes.
            timeout: Seconds to wait for the next one, at the most.
            deadline: Seconds to wait for all of them, from now on, at the most.
            ordered: Whether to keep to the order of dispatch.

        Raises:
            CollectTimeout: While iterating: it took too long.
            NotEnoughJobs: While iterating: there are no more jobs to give as many.
        """
        if self._home is None:
            raise RuntimeError("this scheduler was not started: use it as 'async with'")
        self._home.check()
        return Collector(self._pool, self._closed, n_results, timeout, deadline, ordered=ordered)

    def statistics(self) -> Statistics:
        """How things stand."""
        now = time.time()
        busy = sum(
            (now - (entry.started_at or now)) * entry.needs.cpus
            for entry in self._running
            if entry.needs is not None
        )
        return Statistics(
            n_pending=len(self._unfinished) - len(self._running),
            n_running=len(self._running),
            n_succeeded=self._counts[Status.SUCCEEDED],
            n_failed=self._counts[Status.FAILED],
            n_crashed=self._counts[Status.CRASHED],
            n_timed_out=self._counts[Status.TIMED_OUT],
            n_cancelled=self._counts[Status.CANCELLED],
            n_uncollected=self._pool.n_ready,
            n_parallel=self._n_parallel,
            n_workers=self._callables.n_processes if self._loop else 0,
            busy_seconds=self._busy_seconds + busy,
            elapsed_seconds=time.monotonic() - self._started_at if self._loop else 0.0,
        )

    def events(self, maxsize: int = 10_000) -> EventStream:
        """What happens from now on, as typed events; ends when the scheduler is closed.

        Args:
            maxsize: How many unread events are kept; a slow reader gets a `Dropped` for the rest.
        """
        self._check_open()
        stream = EventStream(maxsize, self._closed)
        self._streams.add(stream)
        self._is_watched = True
        return stream

    # --- dispatch ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._home is None:
            raise RuntimeError("this scheduler was not started: use it as 'async with'")
        self._home.check()
        if self._is_closed or self._closing is not None:
            raise RuntimeError("this scheduler is closed: make another one")

    def _check(self, job: object) -> Any:
        if not isinstance(job, Job):
            raise TypeError(f"{job!r} is no Job: write Job(task=..., args=...)")
        self._check_new(job)
        if isinstance(job, SlurmJob):
            return None
        if isinstance(job.target, ScriptRef):
            if job.target.remote:
                raise ValueError(f"{job.task!r} lies on a cluster: dispatch it as a SlurmJob")
        else:
            self._callables.check(job, self._timeout if job.timeout is None else job.timeout)
        try:
            return self._ledger.needs(job.meta.get("resources") or {} if job.meta else {})
        except ValueError as error:
            raise ValueError(f"{messages.name(job)} {error}") from None

    def _check_new(self, job: Job[Any]) -> None:
        if job in self._unfinished:
            raise ValueError(f"{messages.name(job)} isn't over yet: {_ANOTHER}")

    def _packer(self) -> Packer:
        assert self._rundir is not None
        return Packer(self._rundir.write if self._backend == "isolated" else None)

    def _from_thread(self, *given: Any) -> Batch[Any]:
        async def admit() -> Batch[Any]:
            self._check_open()
            return self._admit(*given)

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(admit(), self._loop).result()

    def _admit(
        self,
        jobs: list[Job[Any]],
        calls: Sequence[Call | ScriptCall | PayloadError],
        needs: list[Any],
        pool: Pool,
    ) -> Batch[Any]:
        # Again: another thread may have dispatched one of them while their calls were packed.
        for job in jobs:
            self._check_new(job)
        claim(jobs)
        now = time.time()
        entries = []
        for job, call, need in zip(jobs, calls, needs, strict=True):
            entry = Entry(
                job,
                call,
                self._executor(job),
                need,
                pool,
                timeout=self._timeout if job.timeout is None else job.timeout,
                retries=self._retries if job.retries is None else job.retries,
                queued_at=now,
            )
            entries.append(entry)
            self._enter(entry)
        self._pump()
        own = Pool() if pool is self._pool else pool
        assert self._home is not None
        return Batch(entries, own, self._cancel, self._cancel_all, self._closed, self._home)

    def _executor(self, job: Job[Any]) -> Executor:
        if isinstance(job, SlurmJob):
            if self._slurm_executor is None:
                self._slurm_executor = self._make_slurm()
                sigterm.guard(self, self._leave_soon)
            return self._slurm_executor
        return self._scripts if isinstance(job.target, ScriptRef) else self._callables

    def _make_slurm(self) -> SlurmExecutor:
        from .._executors.slurm.executor import SlurmExecutor
        from .._model.slurm import Slurm

        assert self._rundir is not None
        return SlurmExecutor(
            self._slurm or Slurm(), self, emit=self._emit, directory=self._rundir.path
        )

    def _enter(self, entry: Entry) -> None:
        pool = entry.pool
        assert pool is not None
        entry.seq = self._n_dispatched
        self._n_dispatched += 1
        pool.add(entry)
        self._unfinished[entry.job] = entry
        if self._is_watched:
            self._emit(Queued(entry.job, entry.queued_at))
        if isinstance(entry.call, PayloadError):
            self.finished(entry, Outcome(Status.FAILED, error=entry.call))
        elif entry.needs is None:
            entry.executor.start(entry)
        else:
            self._ledger.wait(entry)

    def _dispatch_chunk(self, job: Job[Any], inputs: list[Any], pool: Pool) -> Entry:
        self._check_open()
        entry = Entry(
            job,
            self._packer().pack_chunk(job, inputs),
            self._callables,
            self._ledger.needs({}),
            pool,
            timeout=self._timeout and self._timeout * len(inputs),
            queued_at=time.time(),
        )
        self._enter(entry)
        self._pump()
        return entry

    def _pump(self) -> None:
        """Starts what may start, as much as the loop may be held for."""
        if (
            self._is_pumping or self._is_ending
        ):  # what is started may be over at once, and come back here
            return
        self._is_pumping = True
        try:
            self._start_waiting()
        finally:
            self._is_pumping = False

    def _start_waiting(self) -> None:
        let_loop_run_at = time.monotonic() + _HOLD
        while (entry := self._ledger.start()) is not None:
            try:
                if self._logs is not None and entry.log_path is None:
                    entry.log_path = _make_log_directory(self._logs, entry.job.id)
                entry.executor.start(entry)
            except Exception as error:  # no descriptor or no disk is left, say
                failed = messages.not_started(entry.job, error)
                self._end_attempt(entry, Outcome(Status.FAILED, error=failed))
            if time.monotonic() > let_loop_run_at:
                self._pump_soon()
                return

    def _pump_soon(self) -> None:
        assert self._loop is not None
        if not self._is_pump_due:
            self._is_pump_due = True
            self._loop.call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._is_pump_due = False
        self._pump()

    # --- Owner: what executors report ----------------------------------------------------------

    def started(
        self,
        entry: Entry,
        at: float,
        *,
        slurm_id: str | None = None,
        node: str | None = None,
        attempt: int | None = None,
    ) -> None:
        """See `_rules.ledger.Owner`."""
        entry.slurm_id = slurm_id or entry.slurm_id
        entry.node = node or entry.node
        self._note_start(entry, at, attempt)
        self._running.add(entry)
        if entry.stop_status is None:
            entry.status = Status.RUNNING
            if entry.timeout is not None and entry.needs is not None:
                self._arm(entry, entry.timeout - (time.time() - at))

    def pending(self, entry: Entry, reason: str | None, *, slurm_id: str | None = None) -> None:
        """See `_rules.ledger.Owner`."""
        entry.pending_reason = reason
        entry.slurm_id = slurm_id or entry.slurm_id
        self._running.discard(entry)
        if entry.stop_status is None:
            entry.status = Status.PENDING

    def finished(self, entry: Entry, outcome: Outcome) -> None:
        """See `_rules.ledger.Owner`."""
        self._end_attempt(entry, outcome)
        self._pump()

    def ahead(self, entry: Entry, fits: Callable[[Entry], bool]) -> Entry | None:
        """See `_rules.ledger.Owner`."""
        if self._logs is not None:
            return None
        return self._ledger.ahead(entry.needs, fits)

    def handed_over(self, done: Entry, successor: Entry) -> None:
        """See `_rules.ledger.Owner`."""
        successor.grant, done.grant = done.grant, None

    def given_back(self, entries: list[Entry]) -> None:
        """See `_rules.ledger.Owner`."""
        for entry in entries:
            self._ledger.release(entry)
            if entry.stop_status is None:
                self._ledger.wait(entry)
            else:
                self._cancelled.append(entry)
        self._end_cancelled(time.monotonic() + _HOLD)
        self._pump()

    # --- what follows from it ------------------------------------------------------------------

    def _end_attempt(self, entry: Entry, outcome: Outcome) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        self._running.discard(entry)
        if outcome.started_at is None:
            outcome.started_at = entry.started_at
        elif entry.started_at is None:
            self._note_start(entry, outcome.started_at)
        finished_at = outcome.finished_at or time.time()
        if entry.needs is not None and outcome.started_at is not None:
            self._busy_seconds += (finished_at - outcome.started_at) * entry.needs.cpus
        self._ledger.release(entry)
        if outcome.status is not Status.SUCCEEDED:
            self._see_why(entry, outcome)
            if self._try_again(entry, outcome, finished_at):
                return
        self._settle(entry, outcome, finished_at)

    def _note_start(self, entry: Entry, at: float, attempt: int | None = None) -> None:
        entry.attempt = attempt or entry.attempt + 1
        entry.started_at = at
        if self._is_watched:
            self._emit(Started(entry.job, at, entry.attempt))
        if entry.waiters:
            _wake(entry)

    def _arm(self, entry: Entry, seconds: float) -> None:
        assert self._loop is not None
        if entry.timer is not None:
            entry.timer.cancel()
        entry.timer = self._loop.call_later(max(seconds, 0), self._time_out, entry)

    def _time_out(self, entry: Entry) -> None:
        entry.timer = None
        if entry.stop_status is None:
            entry.stop_status = Status.TIMED_OUT
            entry.executor.stop(entry)

    def _cancel(self, entry: Entry) -> None:
        assert self._home is not None
        self._home.check()
        if entry.result is not None or entry.stop_status is Status.CANCELLED:
            return
        if _waits_here(entry):
            self._ledger.discard([entry])
            entry.stop_status = Status.CANCELLED
            self.finished(entry, Outcome(Status.CRASHED))
        elif self._mark_cancelled(entry):
            entry.executor.stop(entry)

    def _mark_cancelled(self, entry: Entry) -> bool:
        """Note that an entry which an executor has is to end; return True if the executor must be told.

        Raises:
            RuntimeError: It can't be stopped.
        """
        entry.executor.check_stop(entry)
        must_stop = entry.stop_status is None
        entry.stop_status = Status.CANCELLED
        entry.status = Status.CANCELLING
        return must_stop

    def _cancel_all(self, entries: Iterable[Entry]) -> None:
        """Cancels entries. None of them starts from now on; what follows from it is done a slice at a time.

        Raises:
            RuntimeError: Some of them can't be stopped; all others are.
        """
        assert self._home is not None
        self._home.check()
        let_loop_run_at = time.monotonic() + _HOLD
        cancelled = Status.CANCELLED
        left = [e for e in entries if e.result is None and e.stop_status is not cancelled]
        waiting = [entry for entry in left if _waits_here(entry)]
        refusal = None
        running = []
        if len(waiting) < len(left):
            for entry in left:
                if _waits_here(entry):
                    continue
                try:
                    if self._mark_cancelled(entry):
                        running.append(entry)
                except RuntimeError as error:
                    refusal = error
        for entry in waiting:
            entry.stop_status = cancelled
            entry.status = Status.CANCELLING
        self._ledger.discard(waiting)
        self._cancelled += waiting
        for entry in running:
            # A call that waits in a worker would start: so those on this machine are ended at once.
            if entry.needs is None:
                self._cancelled.append(entry)
            else:
                entry.executor.stop(entry)
        self._end_cancelled(let_loop_run_at)
        self._pump()
        if refusal is not None:
            raise refusal

    def _end_cancelled(self, let_loop_run_at: float) -> None:
        """Sees to the ends of cancelled entries, unless the next slice is due anyway."""
        if self._cancelled and not self._is_end_due:
            self._end_some(let_loop_run_at)

    def _end_some(self, let_loop_run_at: float = 0.0) -> None:
        """Sees to the ends of cancelled entries, as much as the loop may be held for."""
        assert self._loop is not None
        self._is_end_due = True  # what is ended here may come back here
        let_loop_run_at = let_loop_run_at or time.monotonic() + _HOLD
        try:
            while self._cancelled and time.monotonic() < let_loop_run_at:
                entry = self._cancelled.popleft()
                if entry.needs is None:
                    entry.executor.stop(entry)
                else:
                    self._end_attempt(entry, Outcome(Status.CRASHED))
        finally:
            self._is_end_due = bool(self._cancelled)
            if self._is_end_due:
                self._loop.call_soon(self._end_some)

    def _see_why(self, entry: Entry, outcome: Outcome) -> None:
        """An attempt that died when we ended it did so for our reason."""
        job = entry.job
        if outcome.status is Status.CRASHED and entry.stop_status is Status.TIMED_OUT:
            outcome.status = Status.TIMED_OUT
            outcome.error = messages.timed_out(job, entry.timeout, outcome.stdout, outcome.stderr)
        elif outcome.status is Status.CRASHED and entry.stop_status is Status.CANCELLED:
            outcome.status = Status.CANCELLED
            outcome.error = messages.cancelled(job, started=entry.started_at is not None)

    def _try_again(self, entry: Entry, outcome: Outcome, at: float) -> bool:
        """Lets the job wait for another attempt, if one is due."""
        error = outcome.error
        due = entry.retries_left > 0 and isinstance(error, _RETRIED) and not self._is_ending
        if not due or entry.stop_status is Status.CANCELLED:
            return False
        assert error is not None
        entry.retries_left -= 1
        entry.stop_status = None
        entry.started_at = None
        entry.status = Status.PENDING
        if self._is_watched:
            self._emit(Retried(entry.job, at, entry.attempt, error))
        if entry.needs is None:
            entry.executor.start(entry)
        else:
            self._ledger.wait(entry)
        return True

    def _settle(self, entry: Entry, outcome: Outcome, at: float) -> None:
        """The job is over: its result goes to whoever waits for it."""
        outcome.log_path = outcome.log_path or entry.log_path
        outcome.slurm_id = outcome.slurm_id or entry.slurm_id
        result: Result[Any] = Result.of(
            entry.job, outcome, attempts=entry.attempt, queued_at=entry.queued_at, finished_at=at
        )
        entry.result = result
        entry.status = outcome.status
        entry.call = entry.place = None
        self._counts[outcome.status] += 1
        del self._unfinished[entry.job]
        release(entry.job)
        if entry.pool is not None:
            entry.pool.ready(entry)
        if entry.waiters:
            _wake(entry)
        if self._is_watched:
            kind = Cancelled if outcome.status is Status.CANCELLED else Finished
            self._emit(kind(entry.job, at, result))
        if not self._unfinished and self._closing is not None:
            self._changed.set()

    def _emit(self, event: Event) -> None:
        for stream in tuple(self._streams):
            stream.put(event)

    def _closed(self) -> bool:
        return self._is_closed


def _waits_here(entry: Entry) -> bool:
    """Whether an entry waits for room on this machine, and no executor has it."""
    return entry.needs is not None and entry.grant is None and entry.place is None


def _wake(entry: Entry) -> None:
    waiters, entry.waiters = entry.waiters, None
    for future in waiters or ():
        if not future.done():
            future.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "no asyncio loop is running here: aiohypertunity runs on asyncio and uvloop, not on trio; "
            "in a plain script, in a thread or under trio use aiohypertunity.sync.Scheduler"
        ) from None


def _listed(jobs: Job[Any] | Iterable[Job[Any]]) -> list[Job[Any]]:
    if isinstance(jobs, Job):
        return [jobs]
    if isinstance(jobs, str) or not isinstance(jobs, Iterable):
        raise TypeError(
            f"dispatch takes a Job or several, not {short(jobs)}: write Job(task=..., args=...)"
        )
    return list(jobs)


async def _make_rundir() -> RunDirectory:
    making = start_thread(RunDirectory)
    try:
        return await asyncio.wrap_future(making)
    except asyncio.CancelledError:
        making.add_done_callback(_close_unused)
        raise


def _close_unused(made: Future[RunDirectory]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()


def _slots(n_parallel: int | None) -> int:
    """The number of slots that `n_parallel` means."""
    if n_parallel is None:
        return max(available_cpus() - 1, 1)
    if type(n_parallel) is not int:
        raise TypeError(f"n_parallel={n_parallel!r}: must be a whole number or None")
    if n_parallel == 0:
        raise ValueError("n_parallel=0: must be 1 or more, or negative to count from all CPUs")
    return n_parallel if n_parallel > 0 else max(available_cpus() + 1 + n_parallel, 1)


def _check_defaults(timeout: object, retries: object, kill_grace: object, on_exit: object) -> None:
    """The scheduler's defaults for its jobs are checked by the rules for a job's own."""
    check_seconds("timeout", timeout)
    check_retries(retries)
    if isinstance(kill_grace, bool) or not isinstance(kill_grace, int | float) or kill_grace < 0:
        raise ValueError(f"kill_grace={kill_grace!r}: must be 0 seconds or more")
    if on_exit not in ("cancel", "wait"):
        raise ValueError(f"on_exit={on_exit!r}: must be 'cancel' or 'wait'")


def _checked_resources(
    resources: Mapping[str, Sequence[int | str]] | None,
) -> dict[str, list[int | str]]:
    checked = {}
    for name, indices in (resources or {}).items():
        if (
            name == "cpu"
            or not str(name).isidentifier()
            or isinstance(indices, str)
            or not isinstance(indices, Sequence)
        ):
            raise ValueError(
                f"resources={{{name!r}: {indices!r}}}: must be a list of indices, as {{'gpu': [0, 1]}}; "
                "the number of CPUs is n_parallel"
            )
        if len(set(indices)) != len(indices):
            raise ValueError(f"resources={{{name!r}: {indices!r}}}: an index is there twice")
        checked[name] = list(indices)
    return checked


def _check_logs(logs: Path) -> None:
    """Makes the directory of the logs, and sees whether it can be written to."""
    try:
        for directory in (*reversed(logs.parents), logs):  # `parents=True` would ignore the mode
            directory.mkdir(mode=0o755, exist_ok=True)
        tempfile.TemporaryFile(dir=logs).close()
    except (OSError, ValueError) as error:
        raise OSError(f"logs={str(logs)!r} can't be written to: {error}") from error


def _make_log_directory(logs: Path, job_id: int | str) -> Path:
    """A new directory for a job's output, named by its id; an older run's is left alone."""
    name = str(job_id).replace(os.sep, "_")
    for number in itertools.count():
        path = logs / (f"{name}.{number}" if number else name)
        try:
            path.mkdir(mode=0o755)
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            raise OSError(f"there is no place for its output: {error}") from error
        return path
    raise AssertionError("unreachable")
