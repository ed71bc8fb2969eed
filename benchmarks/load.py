"""What a scheduler costs the process that it lives in: memory, CPU, and the time of its loop."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-call"
# Most of the peers have no types, and not all of them are there.

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohypertunity as ht

from . import _tasks
from ._harness import N_WORKERS, Figures, Row, Stopwatch, amount, benchmark, in_turns
from .callables import family, new_dask_client

N_MANY = 100_000
N_FEW = 1_000
N_FLOWING = 1_000
IDLE_SECONDS = 3.0


# --- a hundred thousand jobs -------------------------------------------------------------------


@benchmark
def queue() -> list[Row]:
    """Many jobs at once: what one costs in memory and time, and `dispatch` in one go."""
    queued = in_turns({"ours": queue_many}, fresh=True, warm_up=False)
    flowed = in_turns({f"{N_MANY:,} jobs": flow_many, f"{N_FEW:,} jobs": flow_few})
    return [
        queued.row(
            f"driver memory per queued job, {N_MANY:,} queued",
            "KB", "≤", 4, unit="KB", of_ratio=False,
        ),
        flowed.row(
            f"time per job, {N_MANY:,} jobs compared with {N_FEW:,}", "µs", "≤", 1.2, unit="µs"
        ),
        queued.row(
            f"one `dispatch` of {N_MANY:,} jobs, per job", "µs", "≤", 10, unit="µs", of_ratio=False
        ),
    ]  # fmt: skip


async def queue_many() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        running = scheduler.dispatch(
            [ht.Job(task=_tasks.sleep, args=(60,)) for _ in range(N_WORKERS)]
        )
        await running[-1].wait_started()
        before = _resident()
        jobs = [ht.Job(task=_tasks.nothing_with, args=(number,)) for number in range(N_MANY)]
        with Stopwatch() as watch:
            batch = scheduler.dispatch(jobs)
        del jobs
        yield {
            "KB": (_resident() - before) / N_MANY / 1024,
            "µs": 1e6 * watch.seconds / len(batch),
        }


def flow_many() -> AsyncIterator[Figures]:
    return _flow(N_MANY)


def flow_few() -> AsyncIterator[Figures]:
    return _flow(N_FEW)


async def _flow(n_jobs: int) -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        while True:
            times = []
            for _ in range(max(20 * N_FEW // n_jobs, 1)):
                with Stopwatch() as watch:
                    scheduler.dispatch([ht.Job(task=_tasks.nothing) for _ in range(n_jobs)])
                    async for _ in scheduler.collect():
                        pass
                times.append(1e6 * watch.seconds / n_jobs)
            yield {"µs": statistics.median(times)}


def _resident() -> int:
    """The memory of this process in bytes, as the kernel sees it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("there is always a VmRSS")


# --- idle --------------------------------------------------------------------------------------


@benchmark
def idle() -> list[Row]:
    """The CPU that driver and workers use together while long jobs run that use none."""
    runs = in_turns({"ours": our_idleness, "Dask": dask_idleness, "Ray": ray_idleness})
    return [
        runs.row(
            "CPU use of a scheduler while long jobs run, of one core",
            "%", "<", 0.5, unit="%", of_ratio=False,
        )
    ]  # fmt: skip


async def our_idleness() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        scheduler.dispatch([ht.Job(task=_tasks.sleep, args=(90,)) for _ in range(N_WORKERS)])
        await asyncio.sleep(3)  # for its spare worker to stand
        while True:
            before = _cpu_seconds()
            await asyncio.sleep(IDLE_SECONDS)
            yield {"%": 100 * (_cpu_seconds() - before) / IDLE_SECONDS}


def dask_idleness() -> Iterator[Figures]:
    with new_dask_client() as client:
        jobs = client.map(_tasks.sleep, [90.0] * N_WORKERS, pure=False)
        yield from _idlenesses(jobs)


def ray_idleness() -> Iterator[Figures]:
    import ray

    ray.init(num_cpus=N_WORKERS, include_dashboard=False, logging_level="ERROR")
    try:
        sleep = ray.remote(_tasks.sleep)
        yield from _idlenesses([sleep.remote(90.0) for _ in range(N_WORKERS)])
    finally:
        ray.shutdown()


def _idlenesses(jobs: list[Any]) -> Iterator[Figures]:
    time.sleep(3)
    while jobs:
        before = _cpu_seconds()
        time.sleep(IDLE_SECONDS)
        yield {"%": 100 * (_cpu_seconds() - before) / IDLE_SECONDS}


def _cpu_seconds() -> float:
    """What this process and its descendants have used so far."""
    nanoseconds = 0
    for pid in family():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


# --- the loop ----------------------------------------------------------------------------------


@benchmark
def held() -> list[Row]:
    """How late a 1 ms ticker is on the loop while jobs flow, from start to leave."""
    runs = in_turns({"ours": ticks_of_ours, "an idle loop": ticks_of_idle_loop}, fresh=True)
    row = runs.row(
        f"event-loop blocking time during {N_FLOWING:,} jobs, start and exit included: 99th percentile",
        "p99", "≤", 5, unit="ms", of_ratio=False,
    )  # fmt: skip
    longest = [f"{name} {amount(value, 'ms')}" for name, value in runs.medians("max").items()]
    return [
        row,
        Row(
            figure=f"event-loop blocking time during {N_FLOWING:,} jobs, start and exit included: longest",
            ours=longest[0].removeprefix("ours "),
            against=longest[1],
            ratio=None,
            must_be="-",
            met=None,
            runs=runs.of("max"),
        ),
    ]


async def ticks_of_ours() -> AsyncIterator[Figures]:
    chance = random.Random(3)
    while True:
        durations = [0.004 * (chance.random() < 0.5) for _ in range(N_FLOWING)]
        jobs = [ht.Job(task=_tasks.sleep, args=(duration,)) for duration in durations]
        ticker = asyncio.create_task(_tick())
        async with ht.Scheduler(N_WORKERS) as scheduler:
            scheduler.dispatch(jobs)
            async for result in scheduler.collect():
                assert result.ok
        yield await _figures_of(ticker)


async def ticks_of_idle_loop() -> AsyncIterator[Figures]:
    while True:
        ticker = asyncio.create_task(_tick())
        await asyncio.sleep(2)
        yield await _figures_of(ticker)


async def _tick() -> list[float]:
    lateness = []
    try:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            lateness.append(time.perf_counter() - due)
    except asyncio.CancelledError:
        return lateness


async def _figures_of(ticker: asyncio.Task[list[float]]) -> Figures:
    ticker.cancel()
    lateness = await ticker
    return {"p99": 1e3 * statistics.quantiles(lateness, n=100)[-1], "max": 1e3 * max(lateness)}
