"""How long the event loop is blocked by what is done at once to very many jobs, or to large ones.

A ticker asks for its turn every millisecond; what is measured is how late it gets it. Time for which the
process was ready to run and had no CPU is left out: that is other processes' doing, the workers' included.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohypertunity as ht

from . import _tasks
from ._harness import N_WORKERS, Figures, Row, benchmark, in_turns

N_CANCELLED = 10_000
N_LEFT = 20_000
N_COLLECTORS = 1_000
N_RESULTS = 200
N_SLURM_JOBS = 20_000
LARGE = 1 << 30
_INTERVAL = 0.001
_N_TURNS = 3
_SUBMITTED_WITHIN = 15.0


@benchmark
def holds() -> list[Row]:
    """How long the loop is blocked, at most and in the 99th percentile."""
    measured: dict[str, Callable[[], AsyncIterator[Figures]]] = {
        f"`batch.cancel()` of {N_CANCELLED:,} jobs": cancelling,
        f"leaving with {N_LEFT:,} jobs": leaving,
        f"{N_COLLECTORS:,} collectors for as many results": collecting,
        f"{N_RESULTS} results of 50 kB": reading,
        "an argument of 1 GB, dispatched from a thread": sending,
    }
    rows = [row for what, contender in measured.items() for row in _rows(what, contender)]
    if shutil.which("sbatch"):
        from .slurm import a_cluster

        with a_cluster():  # which takes 10,000 jobs: the others wait here
            rows += _rows(f"{N_SLURM_JOBS:,} Slurm jobs while they are submitted", submitting)
    return rows


def _rows(what: str, contender: Callable[[], AsyncIterator[Figures]]) -> list[Row]:
    runs = in_turns({"ours": contender}, n_turns=_N_TURNS, warm_up=False)
    figure = f"blocking of the loop, {what}"
    return [
        runs.row(f"{figure}: 99th percentile", "p99", "<", 5, unit="ms", of_ratio=False),
        runs.row(f"{figure}: the longest", "max", "<", 20, unit="ms", of_ratio=False),
    ]


async def cancelling() -> AsyncIterator[Figures]:
    while True:
        async with ht.Scheduler(N_WORKERS) as scheduler:
            batch = scheduler.dispatch(_sleeps(N_CANCELLED))
            await batch[0].wait_started()

            async def cancel(batch: ht.Batch[None] = batch) -> None:
                batch.cancel()
                await batch[-1]

            figures = await _blocking(cancel())
        yield figures


async def leaving() -> AsyncIterator[Figures]:
    while True:
        scheduler = await ht.Scheduler(N_WORKERS).start()
        batch = scheduler.dispatch(_sleeps(N_LEFT))
        await batch[0].wait_started()
        yield await _blocking(scheduler.aclose())


async def collecting() -> AsyncIterator[Figures]:
    while True:
        async with ht.Scheduler(N_WORKERS) as scheduler:
            scheduler.dispatch([ht.Job(_tasks.nothing) for _ in range(N_COLLECTORS)])

            async def collect(scheduler: ht.Scheduler = scheduler) -> None:
                async for _ in scheduler.collect():
                    await asyncio.sleep(0)

            tasks = [asyncio.create_task(collect()) for _ in range(N_COLLECTORS)]
            await asyncio.sleep(0)
            figures = await _blocking(asyncio.wait(tasks))
        yield figures


async def reading() -> AsyncIterator[Figures]:
    while True:
        async with ht.Scheduler(N_WORKERS) as scheduler:
            scheduler.dispatch([ht.Job(bytes, args=(50_000,)) for _ in range(N_RESULTS)])

            async def collect(scheduler: ht.Scheduler = scheduler) -> None:
                async for _ in scheduler.collect():
                    pass

            figures = await _blocking(collect())
        yield figures


async def sending() -> AsyncIterator[Figures]:
    large = bytes(LARGE)
    while True:
        async with ht.Scheduler(N_WORKERS) as scheduler:
            job = ht.Job(_tasks.nothing_with, args=(large,))

            async def send(scheduler: ht.Scheduler = scheduler, job: ht.Job[None] = job) -> None:
                batch = await asyncio.to_thread(scheduler.dispatch, job)
                result = await batch[0]
                assert result.ok

            figures = await _blocking(send())
        yield figures


async def submitting() -> AsyncIterator[Figures]:
    from .slurm import new_directory

    while True:
        # Held: what is measured is how they get there, and not the cluster.
        slurm = ht.Slurm(workdir=new_directory(), options={"hold": True})
        async with ht.Scheduler(slurm=slurm) as scheduler:
            batch = scheduler.dispatch(
                [ht.SlurmJob(_tasks.nothing_with, (i,)) for i in range(N_SLURM_JOBS)]
            )

            async def submitted(batch: ht.Batch[None] = batch) -> None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SUBMITTED_WITHIN):
                        while batch[-1].slurm_id is None:
                            await asyncio.sleep(0.1)

            figures = await _blocking(submitted())
        yield figures


def _sleeps(n: int) -> list[ht.Job[None]]:
    return [ht.Job(_tasks.sleep, args=(60.0,)) for _ in range(n)]


async def _blocking(awaited: Awaitable[object]) -> Figures:
    """How late a ticker is while something is awaited."""
    lateness: list[float] = []
    # What was set up before is not to be looked at again and again by the garbage collector.
    gc.collect()
    gc.freeze()
    with open("/proc/thread-self/schedstat", "rb", buffering=0) as schedule:

        def waited() -> float:
            schedule.seek(0)
            return int(schedule.read(64).split()[1]) / 1e9

        async def tick() -> None:
            while True:
                before, waited_before = time.perf_counter(), waited()
                await asyncio.sleep(_INTERVAL)
                late = time.perf_counter() - before - _INTERVAL
                lateness.append(max(late - (waited() - waited_before), 0.0))

        ticker = asyncio.create_task(tick())
        try:
            await asyncio.sleep(0)
            await awaited
            await asyncio.sleep(2 * _INTERVAL)
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker
            gc.unfreeze()
    return {
        "p99": 1e3 * statistics.quantiles(lateness, n=100, method="inclusive")[-1],
        "max": 1e3 * max(lateness),
    }
