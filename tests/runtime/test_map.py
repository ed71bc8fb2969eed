"""`map`: a function over any number of inputs."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import tasks
from helpers import PATIENCE, script, until

from aiohypertunity import Job, JobCrashed, JobFailed, JobTimeout, PayloadError, Scheduler

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs what was forgotten: tasks that were destroyed, errors that nobody saw."""
    yield
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("chunk", [1, 7, "auto", 5000])
@pytest.mark.parametrize("ordered", [True, False])
async def test_values(scheduler: Scheduler, chunk: Any, ordered: bool) -> None:
    """Each input's value, once; `ordered`, in their order."""
    found = [
        v async for v in scheduler.map(tasks.double, range(1000), ordered=ordered, chunk=chunk)
    ]
    assert (found if ordered else sorted(found)) == [2 * i for i in range(1000)]


async def test_nothing_to_do(scheduler: Scheduler) -> None:
    """No inputs, no values."""
    assert [v async for v in scheduler.map(tasks.double, ())] == []


async def test_async_inputs(scheduler: Scheduler) -> None:
    """Also from an async iterable; a value is there although the next input is long in coming."""
    second = asyncio.Event()

    async def inputs() -> AsyncIterator[int]:
        yield 1
        await second.wait()
        yield 2

    values = scheduler.map(tasks.double, inputs(), ordered=True)
    with anyio.fail_after(PATIENCE):
        assert await anext(values) == 2
        second.set()
        assert [v async for v in values] == [4]


async def test_inputs_are_taken_as_slots_come_free(scheduler: Scheduler) -> None:
    """Endless inputs need constant memory: what was taken is never far ahead of what was given."""
    taken = itertools.count()
    n_given = 0
    most = 0
    async for _ in scheduler.map(tasks.double, (next(taken) for _ in itertools.count()), chunk=10):
        n_given += 1
        ahead = int(repr(taken)[6:-1]) - n_given
        most = max(most, ahead)
        if n_given == 2000:
            break
    assert most <= (2 * 2 + 2) * 10


@pytest.mark.parametrize("chunk", [1, 7, 1000])
async def test_the_first_error(scheduler: Scheduler, chunk: int) -> None:
    """After all values that came before it were delivered."""
    values = []
    function = functools.partial(tasks.fail_on, 50)
    with pytest.raises(JobFailed, match="50 is bad") as caught:
        async for value in scheduler.map(function, range(100), ordered=True, chunk=chunk):
            values.append(value)
    assert values == list(range(50))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("ordered", [False, True])
async def test_values_of_all_inputs_before_it_come_first(
    scheduler: Scheduler, tmp_path: Path, ordered: bool
) -> None:
    """Also where an input before the one that fails takes its time, and others after it don't."""
    gates = tmp_path / "gate", tmp_path
    values = scheduler.map(
        lambda path: tasks.gate(path) or 1 / (path == gates[0]), [*gates, tmp_path], ordered=ordered
    )
    first = asyncio.ensure_future(anext(values))
    await until(lambda: scheduler.statistics().n_failed)
    gates[0].touch()
    assert await first == 1
    with pytest.raises(JobFailed, match=r"^input 1 \(.*\) of map: job .* raised ZeroDivisionError"):
        await anext(values)
    with pytest.raises(StopAsyncIteration):
        await anext(values)


@pytest.mark.parametrize(
    ("chunk", "which"), [(1, r"input 5 \(5\)"), (4, r"input 5 \(5\)"), ("auto", r"input 5 \(5\)")]
)
async def test_which_input_failed(scheduler: Scheduler, chunk: Any, which: str) -> None:
    """Its place and, cut short, itself; and it counts as a failure."""
    with pytest.raises(JobFailed, match=f"^{which} of map: ") as caught:
        [v async for v in scheduler.map(functools.partial(tasks.fail_on, 5), range(9), chunk=chunk)]
    assert isinstance(caught.value.__cause__, ValueError)
    assert scheduler.statistics().n_failed >= 1
    with pytest.raises(JobFailed) as long:
        [v async for v in scheduler.map(tasks.fail, ["x" * 100_000])]
    assert len(str(long.value).partition(" of map")[0]) < 100


async def test_waiting_for_the_last_one_is_idle(scheduler: Scheduler, tmp_path: Path) -> None:
    """All inputs are taken, and the loop has nothing to do until a value comes."""
    last = asyncio.ensure_future(anext(scheduler.map(tasks.gate, [str(tmp_path / "gate")])))
    await until(lambda: scheduler.statistics().n_running)
    used = time.thread_time()
    await asyncio.sleep(0.3)
    assert time.thread_time() - used < 0.15
    (tmp_path / "gate").touch()
    assert await last is None


async def test_a_chunk_that_crashes_names_its_inputs(scheduler: Scheduler) -> None:
    """Any of them may have done it."""
    inputs = ["", "", "", "os._exit"]
    with pytest.raises(JobCrashed, match="^inputs 2 to 3 of map: the process of job"):
        [v async for v in scheduler.map(tasks.end_as, inputs, chunk=2)]


async def test_a_crash_and_what_cannot_be_pickled(scheduler: Scheduler) -> None:
    """Are errors of the map; the scheduler lives."""
    with pytest.raises(JobCrashed):
        [v async for v in scheduler.map(tasks.end_as, ["segfault"])]
    with pytest.raises(PayloadError):
        [v async for v in scheduler.map(tasks.double, [(i for i in ())])]
    with pytest.raises(PayloadError):
        [v async for v in scheduler.map(lambda x: (i for i in ()), [1])]
    assert [v async for v in scheduler.map(tasks.double, [1])] == [2]


async def test_inputs_that_raise(scheduler: Scheduler) -> None:
    """Their own error arrives, after the values of what they gave before."""

    def inputs() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    values = []
    with pytest.raises(LookupError, match="no more"):
        async for value in scheduler.map(tasks.double, inputs()):
            values.append(value)
    assert values == [2]


async def test_large_inputs(scheduler: Scheduler) -> None:
    """Arrays travel beside the pickle, as in jobs."""
    arrays = (np.full(1 << 18, i) for i in range(6))
    assert [v async for v in scheduler.map(np.max, arrays, ordered=True)] == list(range(6))


async def test_functions_by_name(scheduler: Scheduler, tmp_path: Path) -> None:
    """Out of a script or a module."""
    path = script(tmp_path / "s.py", "def triple(x): return 3 * x")
    found = [v async for v in scheduler.map(f"{path}:triple", range(5), ordered=True)]
    assert found == [0, 3, 6, 9, 12]
    assert [v async for v in scheduler.map("math:sqrt", [4.0])] == [2.0]


async def test_a_script_is_no_function(scheduler: Scheduler, tmp_path: Path) -> None:
    """`map` says so in the caller's line."""
    with pytest.raises((TypeError, ValueError), match="function"):
        scheduler.map(str(script(tmp_path / "s.py", "")), [1])


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "big"])
async def test_a_wrong_chunk(scheduler: Scheduler, chunk: Any) -> None:
    """Is an error in the caller's line."""
    with pytest.raises(ValueError, match="chunk"):
        scheduler.map(tasks.double, [1], chunk=chunk)


async def test_break(scheduler: Scheduler) -> None:
    """What is left of it doesn't keep the slots: a job dispatched afterwards runs."""
    async for _ in scheduler.map(tasks.double, itertools.count()):
        break
    gc.collect()
    with anyio.fail_after(PATIENCE):
        assert (await scheduler.dispatch(Job(tasks.double, args=(1,)))[0]).data == 2
        await until(lambda: scheduler.statistics().n_running == 0)


async def test_closing_one(scheduler: Scheduler) -> None:
    """Cancels what is on its way."""
    values = scheduler.map(lambda _: tasks.forever(), range(100))
    waiting = asyncio.ensure_future(anext(values))
    await until(lambda: scheduler.statistics().n_running)
    waiting.cancel()
    await asyncio.wait([waiting])
    await values.aclose()
    with anyio.fail_after(PATIENCE):
        await until(
            lambda: scheduler.statistics().n_running + scheduler.statistics().n_pending == 0
        )
    assert [v async for v in values] == []


async def test_a_cancelled_wait_loses_nothing(scheduler: Scheduler) -> None:
    """As with `collect`."""
    mapped = scheduler.map(tasks.double, range(60), chunk=1)
    found: list[float] = []
    turns = 0
    while len(found) < 60:
        waiting = asyncio.ensure_future(anext(mapped))
        for _ in range(turns % 4):
            await asyncio.sleep(0)
        turns += 1
        waiting.cancel()
        done = (await asyncio.gather(waiting, return_exceptions=True))[0]
        if not isinstance(done, BaseException):
            found.append(done)
    assert sorted(found) == [2 * i for i in range(60)]


async def test_its_values_are_nobody_elses(scheduler: Scheduler) -> None:
    """`collect` gives no results of a map."""
    values = scheduler.map(tasks.double, range(10))
    await anext(values)
    assert [r async for r in scheduler.collect()] == []
    assert len([v async for v in values]) == 9


async def test_two_at_once(scheduler: Scheduler) -> None:
    """Each gets its own."""

    async def total(n: int) -> float:
        return sum([v async for v in scheduler.map(tasks.double, range(n))])

    assert await asyncio.gather(total(100), total(200)) == [100 * 99, 200 * 199]


@pytest.mark.parametrize("on_exit", ["cancel", "wait"])
async def test_leaving_while_it_runs(on_exit: Any) -> None:
    """Ends it: who waits for its values isn't kept waiting for ever."""
    with anyio.fail_after(PATIENCE):
        async with Scheduler(n_parallel=1, on_exit=on_exit) as scheduler:
            values = scheduler.map(tasks.double, itertools.count())
            assert await anext(values) == 0
        with pytest.raises((StopAsyncIteration, RuntimeError, Exception)):
            while True:
                await anext(values)


async def test_the_schedulers_timeout_is_per_chunk() -> None:
    """It ends a chunk that hangs."""
    async with Scheduler(n_parallel=1, timeout=0.3) as scheduler:
        with pytest.raises(JobTimeout):
            [v async for v in scheduler.map(lambda _: tasks.forever(), [1])]
