"""The blocking twin: the same names and parameters, for scripts, threads and notebooks.

A scheduler runs on a loop of its own in a thread of its own, so that it works anywhere, also where a loop is
running already. One call into it costs about 0.1 ms; `stream` and `collect` take all that is ready at once.

On purpose different from the async one: `collect` returns a list, in the order of dispatch; `stream` is what
`async for` over `collect` is there; a handle has `result()` instead of being awaited.
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

from . import _handles, _scheduler, _sigterm
from ._failures import name

if TYPE_CHECKING:
    import os
    from types import TracebackType
    from typing import Self

    from ._events import Event
    from ._jobs import Job
    from ._ledger import Entry
    from ._map import Map
    from ._results import Result, Status
    from ._scheduler import Statistics
    from ._slurm import Slurm
    from ._streams import EventStream

T = TypeVar("T")


class JobHandle(Generic[T]):
    """A dispatched job. See `aiohypertunity.JobHandle`."""

    __slots__ = ("_handle", "_portal")

    def __init__(self, handle: _handles.JobHandle[T], portal: _Portal) -> None:
        self._handle = handle
        self._portal = portal

    @property
    def id(self) -> int | str:
        """The job's id."""
        return self._handle.id

    @property
    def job(self) -> Job[T]:
        """The job."""
        return self._handle.job

    @property
    def status(self) -> Status:
        """Where it stands."""
        return self._handle.status

    @property
    def slurm_id(self) -> str | None:
        """Slurm's id of it; None until it is known."""
        return self._handle.slurm_id

    @property
    def pending_reason(self) -> str | None:
        """Why Slurm lets it wait."""
        return self._handle.pending_reason

    @property
    def node(self) -> str | None:
        """The machine it runs or ran on, where it's known."""
        return self._handle.node

    @property
    def started_at(self) -> float | None:
        """When it began to run (the last time), in seconds since the epoch; None if it hasn't."""
        return self._handle.started_at

    def done(self) -> bool:
        """Whether it's over."""
        return self._handle.done()

    def cancel(self) -> None:
        """Asks for its end. `result` returns once it's truly gone."""
        self._portal.call(self._handle.cancel)

    def wait_started(self, timeout: float | None = None) -> None:
        """Waits until it runs, or is over without having run.

        Raises:
            TimeoutError: It took longer than `timeout` seconds.
        """
        wait = self._handle.wait_started
        self._portal.call(_within, timeout, wait, self._handle, "hasn't started")

    def result(self, timeout: float | None = None) -> Result[T]:
        """Waits for its result, which stays collectable.

        Raises:
            TimeoutError: It took longer than `timeout` seconds. The job runs on.
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
        """As `Scheduler.collect`, of this batch alone. Claims its results."""
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
        """As `Scheduler.stream`, of this batch alone. Claims its results."""
        make = partial(self._batch.collect, n_results, timeout, deadline=deadline, ordered=ordered)
        return _Stream(self._portal, self._portal.call(make))

    def cancel(self) -> None:
        """Cancels all of it that isn't over."""
        self._portal.call(self._batch.cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._portal.call(self._batch.__aexit__, kind, error, traceback)

    def __repr__(self) -> str:
        return repr(self._batch)


class Scheduler:
    """Runs jobs, and gives their results as they come. See `aiohypertunity.Scheduler` for the arguments.

    Use it as `with`, or with `start()` and `close()` where a `with` can't span (notebook cells). Any thread may
    use it.
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
        """Starts it, where a `with` can't span its life.

        Raises:
            OSError: There's no room for its directory in the temporary directory, or `logs` can't be written to.
            RuntimeError: It was started before.
        """
        try:
            self._portal.open()
            self._portal.call(self._scheduler.start)
        except BaseException:
            self._portal.close()
            raise
        return self

    def close(self) -> None:
        """Leaves: cancels or waits for what isn't over, as `on_exit` says. `collect` still works.

        Interrupted while it waits, it cancels what is left, and is done when that is gone.
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
        if error is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self._portal.call(self._scheduler.__aexit__, kind, error, traceback)
        self.close()

    def dispatch(self, jobs: Job[T] | Iterable[Job[T]], *, private: bool = False) -> Batch[T]:
        """See `aiohypertunity.Scheduler.dispatch`. Their calls are packed in this thread."""
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
        """See `aiohypertunity.Scheduler.map`. `inputs` are taken in the scheduler's thread."""
        start = partial(self._scheduler.map, function, inputs, ordered=ordered, chunk=chunk)
        return self._values(self._portal.call(start))

    def _values(self, running: Map[T]) -> Iterator[T]:
        try:
            while values := self._portal.call(running.take):
                yield from values
        finally:
            self._portal.call(running.aclose)

    def collect(
        self,
        n_results: float | None = None,
        timeout: float | None = None,
        *,
        deadline: float | None = None,
        ordered: bool = True,
    ) -> list[Result[Any]]:
        """The results, as a list in the order of dispatch.

        Takes nothing until all of them are there: after a timeout or Ctrl-C all can still be collected.

        Args:
            n_results: How many: the first ones to be done. None: all, until no job is left. 0 or less: those that
                are ready now.
            timeout: Seconds to wait for the next one to be done, at the most.
            deadline: Seconds to wait for all of them, at the most.
            ordered: Whether in the order of dispatch, or in that in which they were done.

        Raises:
            CollectTimeout: It took too long.
            NotEnoughJobs: There are no more jobs to give as many.
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
        """The results as they come: `async for` over `aiohypertunity.Scheduler.collect`, blocking."""
        make = partial(
            self._scheduler.collect, n_results, timeout, deadline=deadline, ordered=ordered
        )
        return _Stream(self._portal, self._portal.call(make))

    def statistics(self) -> Statistics:
        """How things stand."""
        return self._portal.call(self._scheduler.statistics)

    def events(self, maxsize: int = 10_000) -> Iterator[Event]:
        """What happens from now on. See `aiohypertunity.Scheduler.events`."""
        stream = self._portal.call(self._scheduler.events, maxsize)
        return iter(lambda: self._portal.call(_next, stream), None)


class _LoopThread:
    """A loop in a thread of its own. It can be closed whatever its start has come to."""

    def __init__(self) -> None:
        self._ready: Future[BlockingPortal] = Future()
        self._thread = threading.Thread(
            target=Context().run,
            args=(_serve, self._ready),
            name="aiohypertunity-loop",
            daemon=True,
        )

    def start(self) -> None:
        """Starts it, and waits until it can be called."""
        self._thread.start()
        self._ready.result()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function there and waits; interrupted, it cancels the call."""
        outcome: Future[Any] = Future()
        try:
            self._ready.result().start_task_soon(_run, outcome, function, args)
            return outcome.result()
        except BaseException:
            outcome.cancel()
            raise

    def close(self) -> None:
        """Ends it, and waits for its end; where its start was interrupted, it ends by itself."""
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
    """A call for whoever waits for `outcome`: cancelled with it, also before this begins."""
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
    """The way into the scheduler's loop: its thread while it runs, another one for a moment afterwards."""

    def __init__(self) -> None:
        self._thread: _LoopThread | None = None
        self.loans: list[tuple[_handles.Collector[Any], deque[Entry]]] = []

    def reclaim(self) -> None:
        """Takes back what streams have and haven't delivered. On the loop's thread."""
        loans, self.loans = self.loans, []
        for collector, taken in loans:
            left = []
            with contextlib.suppress(IndexError):
                while True:  # the stream may be taking from it at the same time
                    left.append(taken.popleft())
            collector.give_back(left)

    def open(self) -> None:
        """Starts the thread."""
        self._thread = _LoopThread()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    @overload
    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T: ...
    @overload
    def call(self, function: Callable[..., T], *args: Any) -> T: ...
    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function there and waits; interrupted, it cancels the call."""
        if self._thread is not None:
            return self._thread.call(function, *args)
        with contextlib.closing(_LoopThread()) as thread:
            thread.start()
            return thread.call(function, *args)


def _collect(
    portal: _Portal, make: Callable[[], _handles.Collector[T]], *, ordered: bool
) -> list[Result[T]]:
    """Takes all at once, or nothing."""
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
    """Delivers all that is ready at each hop into the loop.

    What it has and doesn't deliver is only on loan: whoever collects next gets it.
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
