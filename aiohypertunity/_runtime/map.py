"""`Scheduler.map`: a function over any number of inputs, in constant memory.

Inputs travel in chunks. A chunk grows while its calls prove tiny, so that a call costs little more than a
function call; it stays one input long as soon as one takes its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .._model.errors import JobCancelled
from .._model.jobs import Job
from .._rules import messages
from .._rules.ledger import Entry, Pool, Wants
from .._wire.payloads import FailedChunk, short
from .handles import waiting, wake

if TYPE_CHECKING:
    from typing import Self

    from .._model.results import Result

R = TypeVar("R")

_HOLD = 0.002
"""Seconds for which inputs are taken, or values given, before the rest of the loop has its turn."""

_CHUNK_SECONDS = 0.005
_LONGEST_CHUNK = 4096
_GROWTH = 4


class Map(Generic[R]):
    """Values as they come, or in the order of the inputs.

    Args:
        function: What to call: a callable, or `"script.py:function"`.
        inputs: One argument a call; sync or async.
        dispatch: Dispatches a chunk: its job, its inputs, its pool.
        cancel: Cancels an entry.
        n_ahead: How many chunks may be on their way or waiting to be taken.
        ordered: Whether to keep to the order of the inputs.
        chunk: How many inputs a chunk has; "auto" to find out.
    """

    def __init__(
        self,
        function: Callable[..., R] | str,
        inputs: Iterable[Any] | AsyncIterable[Any],
        dispatch: Callable[[Job[Any], list[Any], Pool], Entry],
        cancel: Callable[[Entry], None],
        *,
        n_ahead: int,
        ordered: bool,
        chunk: int | Literal["auto"],
    ) -> None:
        if chunk != "auto" and (not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk={chunk!r}: must be 'auto' or a whole number from 1")
        self._cancel = cancel
        self._ordered = ordered
        self._fixed = chunk != "auto"
        self._pool = Pool()
        self._source = _Source(
            function,
            _Inputs(inputs),
            dispatch,
            self._pool,
            n_ahead,
            1 if chunk == "auto" else chunk,
        )
        self._values: deque[R] = deque()
        self._failed: Entry | None = None
        self._error: BaseException | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._let_loop_run_at = 0.0
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        """The next value.

        Raises:
            JobError: What became of the first input that has no value; those of all inputs before it were
                delivered.
        """
        if not self._values:
            await self._refill()
        return self._values.popleft()

    async def take(self) -> list[R]:
        """The values that are ready, at least one; none once it's over."""
        try:
            first = await anext(self)
        except StopAsyncIteration:
            return []
        values = [first, *self._values]
        self._values.clear()
        return values

    async def aclose(self) -> None:
        """Stops: takes no more inputs, and cancels what is on its way."""
        self._over = True
        if self._feeder is not None:
            self._feeder.cancel()
            await asyncio.gather(self._feeder, return_exceptions=True)
        _cancel_rest(self._pool, self._cancel)

    def starve(self) -> None:
        """The scheduler closes: takes no more inputs, and says so where the values end."""
        if self._feeder is not None and not self._feeder.done():
            self._feeder.cancel()

    async def _refill(self) -> None:
        if self._over:
            raise StopAsyncIteration
        if self._feeder is None:
            self._feeder = self._start()
        elif time.monotonic() > self._let_loop_run_at:
            await asyncio.sleep(0)
            self._let_loop_run_at = time.monotonic() + _HOLD
        while not self._values:
            entry = self._pool.take(ordered=self._ordered)
            if entry is not None:
                self._source.room.set()
                self._deliver(entry)
            elif self._error is not None and not self._awaits_earlier():
                await self.aclose()
                raise self._error
            elif self._feeder.done() and not len(self._pool):
                self._over = True
                if self._feeder.cancelled():
                    raise JobCancelled("the scheduler closed before map had taken all its inputs")
                self._feeder.result()
                raise StopAsyncIteration
            else:
                await self._changed(self._feeder)

    def _start(self) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        feeder = loop.create_task(self._source.feed())
        # Who breaks out of the loop just drops this; in whatever thread that is found out.
        abandon = weakref.finalize(
            self, _abandon, os.getpid(), loop, feeder, self._pool, self._cancel
        )
        abandon.atexit = False
        return feeder

    async def _changed(self, feeder: asyncio.Task[None]) -> None:
        with waiting(self._pool, Wants.CHANGE) as changed:
            on_end = partial(wake, changed)
            if not feeder.done():  # else it would wake at once, again and again
                feeder.add_done_callback(on_end)
            try:
                await changed
            finally:
                feeder.remove_done_callback(on_end)

    def _deliver(self, entry: Entry) -> None:
        result = entry.result
        assert result is not None
        start, n = self._source.spans.pop(entry)
        if self._failed is not None and self._failed.seq < entry.seq:
            return
        if result.error is not None:
            self._fail(entry, result, start, n)
            return
        self._values.extend(result.data)
        if not self._fixed and result.started_at is not None:
            self._adapt(n, result.finished_at - result.started_at)

    def _fail(self, entry: Entry, result: Result[Any], start: int, n: int) -> None:
        """Takes no more inputs, and gives up those after the one that failed; those before it go on."""
        assert result.error is not None
        inputs: Any = entry.job.args
        before = vars(result)["_data"]
        if isinstance(before, FailedChunk):
            self._values.extend(before.values)
            which = f"input {start + len(before.values)} ({before.item})"
        elif n == 1:
            which = f"input {start} ({short(inputs[0])})"
        else:
            which = f"inputs {start} to {start + n - 1}"
        self._failed, self._error = entry, messages.of_inputs(result.error, which)
        self.starve()
        _cancel_rest(self._pool, self._cancel, entry.seq)

    def _awaits_earlier(self) -> bool:
        """Whether an input before the one that failed may still give a value."""
        assert self._failed is not None
        return any(entry.seq < self._failed.seq for entry in self._pool.unfinished())

    def _adapt(self, n: int, seconds: float) -> None:
        """Aims at chunks that take `_CHUNK_SECONDS`, approaching it from below."""
        wanted = int(_CHUNK_SECONDS * n / max(seconds, 1e-6))
        self._source.size = max(1, min(wanted, _GROWTH * n, _LONGEST_CHUNK))


def _abandon(
    owner: int,
    loop: asyncio.AbstractEventLoop,
    feeder: asyncio.Task[None],
    pool: Pool,
    cancel: Callable[[Entry], None],
) -> None:
    if os.getpid() != owner:  # the loop of a forked child shares its wake-up socket with ours
        return
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(feeder.cancel)
        loop.call_soon_threadsafe(_cancel_rest, pool, cancel)


def _cancel_rest(pool: Pool, cancel: Callable[[Entry], None], after: int = -1) -> None:
    for entry in pool.unfinished():
        if entry.seq > after:
            with contextlib.suppress(RuntimeError):  # a joblib backend runs it, and can't stop it
                cancel(entry)


class _Source:
    """Dispatches inputs in chunks, as there is room for them. Doesn't know who takes the values.

    Attributes:
        size: How many inputs the next chunk has.
        room: Set where a chunk was taken.
        spans: The position of each chunk's first input, and how many it has.
    """

    def __init__(
        self,
        function: Callable[..., Any] | str,
        inputs: _Inputs,
        dispatch: Callable[[Job[Any], list[Any], Pool], Entry],
        pool: Pool,
        n_ahead: int,
        size: int,
    ) -> None:
        self._function = function
        self._inputs = inputs
        self._dispatch = dispatch
        self._pool = pool
        self._n_ahead = n_ahead
        self.size = size
        self.room = asyncio.Event()
        self.spans: dict[Entry, tuple[int, int]] = {}
        self._n_taken = 0

    async def feed(self) -> None:
        """Dispatches chunk after chunk, to the last."""
        while True:
            while len(self._pool) >= self._n_ahead:
                self.room.clear()
                await self.room.wait()
            inputs = await self._inputs.take(self.size)
            if not inputs:
                return
            job: Job[Any] = Job(task=self._function, args=(inputs[0],))
            entry = self._dispatch(job, inputs, self._pool)
            self.spans[entry] = self._n_taken, len(inputs)
            self._n_taken += len(inputs)
            await asyncio.sleep(0)


class _Inputs:
    """Inputs in chunks, from a sync or an async iterable."""

    def __init__(self, inputs: Iterable[Any] | AsyncIterable[Any]) -> None:
        self._sync: Iterator[Any] | None = None
        self._async: AsyncIterator[Any] | None = None
        if isinstance(inputs, AsyncIterable):
            self._async = aiter(inputs)
        else:
            self._sync = iter(inputs)

    async def take(self, n: int) -> list[Any]:
        """The next inputs, `n` at most; none at the end.

        Of an async iterable always one: the next may be long in coming.
        """
        if self._sync is not None:
            return self._take_quickly(self._sync, n)
        assert self._async is not None
        try:
            return [await anext(self._async)]
        except StopAsyncIteration:
            return []

    def _take_quickly(self, inputs: Iterator[Any], n: int) -> list[Any]:
        """Takes `n` inputs, or fewer if that would hold the loop."""
        taken: list[Any] = []
        until = time.monotonic() + _HOLD
        step = 1
        while len(taken) < n and time.monotonic() < until:
            some = list(itertools.islice(inputs, min(step, n - len(taken))))
            taken += some
            if len(some) < step:
                break
            step *= 2
        return taken
