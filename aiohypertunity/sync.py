"""The blocking twin, with the same names and parameters, for scripts, threads and notebooks.

Each scheduler runs on an event loop in a thread of its own. It therefore works anywhere, also where
an event loop is running already. One call into it costs about 0.1 ms; `stream` and `collect` take
all results that are ready at once.

Three differences from the async API are deliberate: `collect` returns a list in the order of
dispatch; `stream` corresponds to `async for` over the async `collect`; a handle has `result()`
instead of being awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, InvalidStateError
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

import anyio
from anyio.from_thread import BlockingPortal

from ._host import sigterm as _sigterm
from ._rules.messages import name
from ._runtime import handles as _handles
from ._runtime import scheduler as _scheduler

if TYPE_CHECKING:
    import os
    from types import TracebackType
    from typing import Self

    from ._model.events import Event
    from ._model.jobs import Job
    from ._model.results import Result, Status
    from ._model.slurm import Slurm
    from ._rules.ledger import Entry
    from ._runtime.map import Map
    from ._runtime.scheduler import Statistics
    from ._runtime.streams import EventStream

T = TypeVar("T")


class JobHandle(Generic[T]):
    """A dispatched job. See `aiohypertunity.JobHandle`."""

    __slots__ = ("_handle", "_portal")

    def __init__(self, handle: _handles.JobHandle[T], portal: _Portal) -> None:
        self._handle = handle
        self._portal = portal

    @property
    def id(self) -> int | str:
        """The id of the job."""
        return self._handle.id

    @property
    def job(self) -> Job[T]:
        """The job."""
        return self._handle.job

    @property
    def status(self) -> Status:
        """The present status of the job."""
        return self._handle.status

    @property
    def slurm_id(self) -> str | None:
        """Slurm's id of the job; None until it is known."""
        return self._handle.slurm_id

    @property
    def pending_reason(self) -> str | None:
        """Slurm's reason why the job waits; None if it does not wait, or is not a Slurm job."""
        return self._handle.pending_reason

    @property
    def node(self) -> str | None:
        """The name of the machine on which the job runs or ran, if known."""
        return self._handle.node

    @property
    def started_at(self) -> float | None:
        """The time of the last attempt's start, in seconds since the epoch; None if none started."""
        return self._handle.started_at

    def done(self) -> bool:
        """Return True if the job has finished."""
        return self._handle.done()

    def cancel(self) -> None:
        """Cancel the job. `result` returns once all of its processes are gone."""
        self._portal.call(self._handle.cancel)

    def wait_started(self, timeout: float | None = None) -> None:
        """Wait until the job runs, or has finished without having run.

        Raises:
            TimeoutError: `timeout` seconds have passed.
        """
        wait = self._handle.wait_started
        self._portal.call(_within, timeout, wait, self._handle, "hasn't started")

    def result(self, timeout: float | None = None) -> Result[T]:
        """Wait for the result of the job and return it. It can still be collected.

        Raises:
            TimeoutError: `timeout` seconds have passed. The job runs on.
        """

        async def wait() -> Result[T]:
            return await self._handle

        return self._portal.call(_within, timeout, wait, self._handle, "isn't over")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobHandle) and other._handle == self._handle

    def __hash__(self) -> int:
        return hash(self._handle)

    def __repr__(self) -> str:
        return repr(self._handle)


class Batch(Sequence[JobHandle[T]]):
    """The handles of one `dispatch`. See `aiohypertunity.Batch`."""

    def __init__(self, batch: _handles.Batch[T], portal: _Portal) -> None:
        self._batch = batch
        self._portal = portal

    @overload
    def __getitem__(self, index: int) -> JobHandle[T]: ...
    @overload
    def __getitem__(self, index: slice) -> list[JobHandle[T]]: ...
    def __getitem__(self, index: int | slice) -> JobHandle[T] | list[JobHandle[T]]:
        if isinstance(index, slice):
            return [JobHandle(handle, self._portal) for handle in self._batch[index]]
        return JobHandle(self._batch[index], self._portal)

    def __len__(self) -> int:
        return len(self._batch)

    def collect(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = True,
    ) -> list[Result[T]]:
        """Return results of this batch alone, as `Scheduler.collect` does. Claims its results."""
        make = partial(self._batch.collect, n_results, timeout, deadline=deadline)
        return _collect(self._portal, make, ordered=ordered)

    def stream(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = False,
    ) -> Iterator[Result[T]]:
        """Yield results of this batch alone, as `Scheduler.stream` does. Claims its results."""
        make = partial(self._batch.collect, n_results, timeout, deadline=deadline, ordered=ordered)
        return _Stream(self._portal, self._portal.call(make))

    def cancel(self) -> None:
        """Cancel all jobs of the batch that have not finished."""
        self._portal.call(self._batch.cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._portal.is_here:
            self._portal.call(self._batch.__aexit__, kind, error, traceback)

    def __repr__(self) -> str:
        return repr(self._batch)


class Scheduler:
    """A scheduler with a blocking API. The arguments are those of `aiohypertunity.Scheduler`.

    Use it in a `with` statement, or call `start()` and `close()` where a `with` cannot span its
    life, as in notebook cells. Any thread may use it.
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
        self._scheduler = _scheduler.Scheduler(
            n_parallel,
            backend=backend,
            resources=resources,
            slurm=slurm,
            timeout=timeout,
            retries=retries,
            kill_grace=kill_grace,
            logs=logs,
            on_exit=on_exit,
        )
        self._portal = _Portal()

    def start(self) -> Self:
        """Start the scheduler, where a `with` statement cannot span its life.

        Raises:
            OSError: The temporary directory has no room for that of the scheduler, or `logs` is not
                writable.
            RuntimeError: The scheduler was started before.
        """
        self._portal.check()
        try:
            self._portal.open()
            self._portal.call(self._scheduler.start)
        except BaseException:
            self._portal.close()
            raise
        return self

    def close(self) -> None:
        """Close the scheduler: cancel the unfinished jobs or wait for them, depending on `on_exit`.

        An interrupt while it waits cancels the remaining jobs, and is raised once they are gone.
        What has finished can still be collected afterwards.
        """
        interrupt = None
        while True:
            try:
                self._portal.call(self._scheduler.aclose)
                break
            except KeyboardInterrupt as error:
                interrupt = error
        self._portal.close()
        _sigterm.restore()
        if interrupt is not None:
            raise interrupt

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._portal.is_here:
            return
        if error is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self._portal.call(self._scheduler.__aexit__, kind, error, traceback)
        self.close()

    def dispatch(self, jobs: Job[T] | Iterable[Job[T]], *, private: bool = False) -> Batch[T]:
        """Dispatch jobs, as `aiohypertunity.Scheduler.dispatch` does.

        Calls are pickled in the calling thread.
        """
        batch = self._scheduler.dispatch(jobs, private=private)
        _sigterm.install()
        return Batch(batch, self._portal)

    def map(
        self,
        function: Callable[..., T] | str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = False,
        chunk: int | Literal["auto"] = "auto",
    ) -> Iterator[T]:
        """Yield the values of a function, as `aiohypertunity.Scheduler.map` does.

        `inputs` are taken in the thread of the scheduler.
        """
        start = partial(self._scheduler.map, function, inputs, ordered=ordered, chunk=chunk)
        return self._values(self._portal.call(start))

    def _values(self, running: Map[T]) -> Iterator[T]:
        try:
            while values := self._portal.call(running.take):
                yield from values
        finally:
            if self._portal.is_here:
                self._portal.call(running.aclose)

    def collect(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = True,
    ) -> list[Result[Any]]:
        """Return results as a list, in the order of dispatch.

        No result is taken until all of them are there: after a timeout or Ctrl-C, all can still be
        collected.

        Args:
            n_results: The number of results; those of the jobs that finish first. None: all, until
                no job is left. 0 or less: those that are ready now.
            timeout: The longest wait for the next job to finish, in seconds.
            deadline: The longest wait for all of them, in seconds.
            ordered: True for the order of dispatch, False for the order in which the jobs finished.

        Raises:
            CollectTimeout: `timeout` or `deadline` has passed.
            NotEnoughJobs: The remaining jobs cannot give that many results.
        """
        make = partial(self._scheduler.collect, n_results, timeout, deadline=deadline)
        return _collect(self._portal, make, ordered=ordered)

    def stream(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = False,
    ) -> Iterator[Result[Any]]:
        """Yield results as they become available, as `aiohypertunity.Scheduler.collect` does."""
        make = partial(
            self._scheduler.collect, n_results, timeout, deadline=deadline, ordered=ordered
        )
        return _Stream(self._portal, self._portal.call(make))

    def statistics(self) -> Statistics:
        """Return a snapshot of the scheduler."""
        return self._portal.call(self._scheduler.statistics)

    def events(self, maxsize: int = 10_000) -> Iterator[Event]:
        """Yield the events from now on, as `aiohypertunity.Scheduler.events` does."""
        stream = self._portal.call(self._scheduler.events, maxsize)
        return iter(lambda: self._portal.call(_next, stream), None)


class _LoopThread:
    """An event loop in a thread of its own, which can be closed even if its start failed."""

    def __init__(self) -> None:
        self._ready: Future[BlockingPortal] = Future()
        self._thread = threading.Thread(
            target=Context().run,
            args=(_serve, self._ready),
            name="aiohypertunity-loop",
            daemon=True,
        )

    def start(self) -> None:
        """Start the thread, and wait until it can be called."""
        self._thread.start()
        self._ready.result()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the loop's thread and wait; an interrupt cancels the call."""
        outcome: Future[Any] = Future()
        try:
            self._ready.result().start_task_soon(_run, outcome, function, args)
            return outcome.result()
        except BaseException:
            outcome.cancel()
            raise

    def close(self) -> None:
        """End the thread and wait for its end; if its start was interrupted, it ends by itself."""
        if not self._ready.cancel() and self._ready.exception() is None:
            portal = self._ready.result()
            portal.start_task_soon(portal.stop)
            self._thread.join()


def _serve(ready: Future[BlockingPortal]) -> None:
    async def serve() -> None:
        async with BlockingPortal() as portal:
            ready.set_result(portal)  # raises, and ends it, if nobody waits for it any more
            await portal.sleep_until_stopped()

    try:
        anyio.run(serve)
    except BaseException as error:
        with contextlib.suppress(InvalidStateError):
            ready.set_exception(error)


async def _run(outcome: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run a call and set `outcome`; cancelling `outcome` cancels the call, even unstarted."""
    loop = asyncio.get_running_loop()
    with anyio.CancelScope() as scope:

        def stop(outcome: Future[Any]) -> None:
            if outcome.cancelled():
                loop.call_soon_threadsafe(scope.cancel)

        outcome.add_done_callback(stop)
        if outcome.cancelled():
            return
        try:
            value = function(*args)
            value = await value if isinstance(value, Coroutine) else value
        except asyncio.CancelledError:
            outcome.cancel()
            raise
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                outcome.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                outcome.set_result(value)


class _Portal:
    """Access to the event loop: the scheduler's thread while it runs, then a temporary one."""

    def __init__(self) -> None:
        self._thread: _LoopThread | None = None
        self._home = _handles.Home()
        self.loans: list[tuple[_handles.Collector[Any], deque[Entry]]] = []

    def reclaim(self) -> None:
        """Take back results that streams hold and have not delivered. Runs on the loop's thread."""
        loans, self.loans = self.loans, []
        for collector, taken in loans:
            left = []
            with contextlib.suppress(IndexError):
                while True:  # the stream may be taking from it at the same time
                    left.append(taken.popleft())
            collector.give_back(left)

    @property
    def is_here(self) -> bool:
        """False in a forked child of the process that has the thread."""
        return self._thread is None or self._home.is_here

    def check(self) -> None:
        """Raise RuntimeError in a forked child of the process that has the thread."""
        if self._thread is not None:
            self._home.check()

    def open(self) -> None:
        """Start the thread."""
        self._home = _handles.Home()
        self._thread = _LoopThread()
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    @overload
    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T: ...
    @overload
    def call(self, function: Callable[..., T], *args: Any) -> T: ...
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the loop's thread and wait; an interrupt cancels the call."""
        self.check()
        if self._thread is not None:
            return self._thread.call(function, *args)
        with contextlib.closing(_LoopThread()) as thread:
            thread.start()
            return thread.call(function, *args)


def _collect(
    portal: _Portal, make: Callable[[], _handles.Collector[T]], *, ordered: bool
) -> list[Result[T]]:
    """Return all results at once, or take none."""
    collector = portal.call(make)
    taken: list[Entry] = []

    async def take() -> None:
        portal.reclaim()
        taken.extend(await collector.take_all())

    try:
        portal.call(take)
        if ordered:
            taken.sort(key=lambda entry: entry.seq)
        return [cast("Result[T]", entry.result) for entry in taken]
    except BaseException:
        # The interrupt may have come when they were taken already.
        portal.call(collector.give_back, taken)
        raise


class _Stream(Generic[T]):
    """An iterator of results that takes all that are ready at each call into the loop.

    Results that it holds and has not delivered are on loan: the next collector gets them.
    """

    def __init__(self, portal: _Portal, collector: _handles.Collector[T]) -> None:
        self._portal = portal
        self._collector = collector
        self._taken: deque[Entry] = deque()
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Result[T]:
        while True:
            with contextlib.suppress(IndexError):
                return cast("Result[T]", self._taken.popleft().result)
            if self._over:
                raise StopIteration
            self._portal.call(self._take)

    async def _take(self) -> None:
        self._portal.reclaim()
        try:
            first = await self._collector.next_entry()
        except StopAsyncIteration:
            self._over = True
            return
        self._taken.extend((first, *self._collector.take_ready()))
        self._portal.loans.append((self._collector, self._taken))


async def _next(stream: EventStream) -> Event | None:
    return await anext(stream, None)


async def _within(
    timeout: float | None,
    wait: Callable[[], Awaitable[T]],
    handle: _handles.JobHandle[Any],
    what: str,
) -> T:
    try:
        with anyio.fail_after(timeout):
            return await wait()
    except TimeoutError:
        raise TimeoutError(
            f"{name(handle.job)} {what} after {timeout:g} s: it is {handle.status.value}, and wasn't cancelled"
        ) from None
