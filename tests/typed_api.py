"""What the type checkers must make of the public names. Never run, only checked."""

from __future__ import annotations

from typing import Any, assert_type

import aiohypertunity as ht
from aiohypertunity import sync


def train(rate: float, *, epochs: int = 1) -> tuple[float, str]:
    """A task with a type."""
    return rate * epochs, "done"


async def check_async() -> None:
    """Results are typed by their tasks."""
    async with ht.Scheduler(n_parallel=2) as scheduler:
        job = ht.Job(task=train, args=(0.1,))
        assert_type(job, ht.Job[tuple[float, str]])
        batch = scheduler.dispatch([job])
        assert_type(batch, ht.Batch[tuple[float, str]])
        assert_type(batch[0], ht.JobHandle[tuple[float, str]])
        result = await batch[0]
        assert_type(result, ht.Result[tuple[float, str]])
        assert_type(result.data, tuple[float, str])
        assert_type(result.error, ht.JobError | ht.SubmitError | ht.TransportError | None)
        async for each in batch.collect(timeout=1):
            assert_type(each.data, tuple[float, str])
        async for every in scheduler.collect():
            assert_type(every, ht.Result[Any])
        async for value in scheduler.map(train, [0.1, 0.2]):
            assert_type(value, tuple[float, str])


def check_sync() -> None:
    """The blocking twin is typed alike."""
    with sync.Scheduler(n_parallel=2) as scheduler:
        batch = scheduler.dispatch(ht.Job(task=train, args={"rate": 0.1}))
        assert_type(batch, sync.Batch[tuple[float, str]])
        assert_type(batch[0].result(), ht.Result[tuple[float, str]])
        assert_type(batch.collect(), list[ht.Result[tuple[float, str]]])
        assert_type([*scheduler.map(train, [0.1])], list[tuple[float, str]])
