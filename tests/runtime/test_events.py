"""`events()` and `statistics()`: what happens, and how things stand."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

import anyio
import pytest
import tasks
from helpers import PATIENCE

from aiohypertunity import (
    Cancelled,
    Dropped,
    Finished,
    Job,
    JobFailed,
    Queued,
    Retried,
    Scheduler,
    Started,
    Status,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def test_the_life_of_a_job(scheduler: Scheduler, tmp_path: Path) -> None:
    """Queued, started, retried, started, finished; each of the job, in time."""
    began = time.time()
    events = scheduler.events()
    job = Job(tasks.count_then, args=(str(tmp_path / "n"), "raise"), retries=1)
    result = await scheduler.dispatch(job)[0]
    seen = [await anext(events) for _ in range(5)]
    assert [type(event) for event in seen] == [Queued, Started, Retried, Started, Finished]
    assert all(event.job is job for event in seen)  # type: ignore[union-attr]
    assert [event.attempt for event in (seen[1], seen[2], seen[3])] == [1, 1, 2]  # type: ignore[union-attr]
    assert isinstance(seen[2], Retried)
    assert isinstance(seen[2].error, JobFailed)
    assert isinstance(seen[4], Finished)
    assert seen[4].result is result
    assert began <= seen[0].at <= seen[1].at <= seen[4].at <= time.time()


async def test_cancelled(scheduler: Scheduler) -> None:
    """Of one that ran and of one that didn't."""
    events = scheduler.events()
    batch = scheduler.dispatch([Job(tasks.forever) for _ in range(3)])
    await batch[0].wait_started()
    batch.cancel()
    for handle in batch:
        await handle
    await scheduler.aclose()
    ends = [event async for event in events if isinstance(event, Cancelled)]
    assert {event.result.status for event in ends} == {Status.CANCELLED}
    assert {event.job.id for event in ends} == {handle.id for handle in batch}


async def test_it_ends_with_the_scheduler() -> None:
    """After what has happened was told."""
    async with Scheduler(n_parallel=1) as scheduler:
        events = scheduler.events()
        reader = asyncio.ensure_future(_all(events))
        await scheduler.dispatch(Job(tasks.double, args=(1,)))[0]
    with anyio.fail_after(PATIENCE):
        assert [type(e) for e in await reader] == [Queued, Started, Finished]


async def _all(events):  # type: ignore[no-untyped-def]
    return [event async for event in events]


async def test_a_slow_reader_is_told_what_it_missed(scheduler: Scheduler) -> None:
    """Memory is bounded; the oldest go, and their number is said in their place."""
    events = scheduler.events(maxsize=10)
    batch = scheduler.dispatch([Job(tasks.double, args=(i,)) for i in range(50)])
    for handle in batch:
        await handle
    await scheduler.aclose()
    first, *rest = [event async for event in events]
    assert isinstance(first, Dropped)
    assert len(rest) == 10
    assert first.n_events + len(rest) == 150
    assert isinstance(rest[-1], Finished)


async def test_readers_are_independent(scheduler: Scheduler) -> None:
    """Each gets every event since it began."""
    first = scheduler.events()
    await scheduler.dispatch(Job(tasks.double, args=(1,)))[0]
    second = scheduler.events()
    await scheduler.dispatch(Job(tasks.double, args=(1,)))[0]
    await scheduler.aclose()
    assert (len(await _all(first)), len(await _all(second))) == (6, 3)


async def test_events_are_frozen(scheduler: Scheduler) -> None:
    """Values, not views."""
    events = scheduler.events()
    scheduler.dispatch(Job(tasks.pid))
    event = await anext(events)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at = 0  # type: ignore[misc]


@pytest.mark.parametrize("maxsize", [0, -1, 1.5])
async def test_a_wrong_size(scheduler: Scheduler, maxsize: float) -> None:
    """Is an error in the caller's line."""
    with pytest.raises(ValueError, match="maxsize"):
        scheduler.events(maxsize=maxsize)  # type: ignore[arg-type]


async def test_statistics(tmp_path: Path) -> None:
    """How many wait, run and are over, by how they ended; how busy it was kept."""
    async with Scheduler(n_parallel=1) as scheduler:
        for task, args in (
            (tasks.double, (1,)),
            (tasks.fail, ("no",)),
            (tasks.end_as, ("os._exit",)),
        ):
            await scheduler.dispatch(Job(task, args=args))[0]
        running, waiting = scheduler.dispatch(
            [Job(tasks.gate, args=(str(tmp_path / "gate"),)), Job(tasks.pid)]
        )
        await running.wait_started()
        now = scheduler.statistics()
        assert (now.n_succeeded, now.n_failed, now.n_crashed) == (1, 1, 1)
        assert (now.n_running, now.n_pending, now.n_uncollected) == (1, 1, 3)
        assert (now.n_parallel, now.n_timed_out, now.n_cancelled) == (1, 0, 0)
        assert now.n_workers >= 1
        assert 0 < now.busy_seconds <= now.elapsed_seconds
        assert 0 < now.utilization <= 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            now.n_running = 0  # type: ignore[misc]
        (tmp_path / "gate").touch()
        await waiting
        [r async for r in scheduler.collect()]
        after = scheduler.statistics()
        assert (after.n_succeeded, after.n_running, after.n_uncollected) == (3, 0, 0)
        assert after.busy_seconds >= now.busy_seconds


async def test_statistics_before_the_start() -> None:
    """Nothing has happened."""
    stand = Scheduler(n_parallel=3).statistics()
    assert (stand.n_parallel, stand.n_pending, stand.elapsed_seconds, stand.utilization) == (
        3,
        0,
        0.0,
        0,
    )
