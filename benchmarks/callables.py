"""Callables: how many, how soon, how large, and how quickly away with them."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-call"
# Most of the peers have no types, and not all of them are there.

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import statistics
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import aiohypertunity as ht

from . import _tasks
from ._harness import N_WORKERS, Figures, Row, Stopwatch, benchmark, in_turns

N_JOBS = 5_000
N_DASK_JOBS = 1_000  # it would take most of the time for all
N_CALLS = 200_000
N_DASK_CALLS = 20_000
N_PARTS = 50
MEGABYTES = 200
ROUND_TRIPS_FOR = 0.4
RUNS_FOR = 1.5


# --- separate jobs a second --------------------------------------------------------------------


@benchmark
def throughput() -> list[Row]:
    """No-op callables a second, each a job of its own, from dispatch to collected."""
    runs = in_turns(
        {
            "ours": our_throughput,
            "Pebble": pebble_throughput,
            "concurrent.futures": futures_throughput,
            "joblib": joblib_throughput,
            "loky": loky_throughput,
            "Dask": dask_throughput,
            "anyio": anyio_throughput,
        }
    )
    figure = f"no-op callables per second, {N_JOBS:,} separate jobs"
    return [runs.row(figure, "rate", "≥", 1.5, unit="/s", better=max)]


async def our_throughput() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        while True:
            with Stopwatch() as watch:
                scheduler.dispatch([ht.Job(task=_tasks.nothing) for _ in range(N_JOBS)])
                results = [result async for result in scheduler.collect()]
            assert all(result.ok for result in results)
            yield {"rate": len(results) / watch.seconds}


def pebble_throughput() -> Iterator[Figures]:
    from pebble import ProcessPool

    with ProcessPool(max_workers=N_WORKERS) as pool:
        yield from _rates(lambda: pool.schedule(_tasks.nothing))


def futures_throughput() -> Iterator[Figures]:
    with concurrent.futures.ProcessPoolExecutor(N_WORKERS) as pool:
        yield from _rates(lambda: pool.submit(_tasks.nothing))


def loky_throughput() -> Iterator[Figures]:
    import loky

    pool = loky.get_reusable_executor(N_WORKERS)
    yield from _rates(lambda: pool.submit(_tasks.nothing))


def _rates(submit: Callable[[], concurrent.futures.Future[None]]) -> Iterator[Figures]:
    while True:
        with Stopwatch() as watch:
            futures = [submit() for _ in range(N_JOBS)]
            for future in futures:
                future.result()
        yield {"rate": N_JOBS / watch.seconds}


def joblib_throughput() -> Iterator[Figures]:
    import joblib

    with joblib.Parallel(N_WORKERS, batch_size=1, pre_dispatch="all") as parallel:
        while True:
            with Stopwatch() as watch:
                parallel(joblib.delayed(_tasks.nothing)() for _ in range(N_JOBS))
            yield {"rate": N_JOBS / watch.seconds}


def dask_throughput() -> Iterator[Figures]:
    with new_dask_client() as client:
        while True:
            with Stopwatch() as watch:
                client.gather(client.map(_tasks.nothing_with, range(N_DASK_JOBS), pure=False))
            yield {"rate": N_DASK_JOBS / watch.seconds}


async def anyio_throughput() -> AsyncIterator[Figures]:
    import anyio
    from anyio import to_process

    async def some(numbers: Iterator[int]) -> None:
        for _ in numbers:
            await to_process.run_sync(_tasks.nothing)

    while True:
        numbers = iter(range(N_JOBS))
        with Stopwatch() as watch:
            async with anyio.create_task_group() as group:
                for _ in range(N_WORKERS):
                    group.start_soon(some, numbers)
        yield {"rate": N_JOBS / watch.seconds}


def new_dask_client() -> Any:
    """Two processes of one thread each, and no dashboard."""
    from distributed import Client

    warnings.simplefilter("ignore")
    return Client(
        n_workers=N_WORKERS,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        silence_logs="CRITICAL",
    )


# --- one job at a time -------------------------------------------------------------------------


@benchmark
def round_trip() -> list[Row]:
    """From handing over one no-op callable to having what it returned, nothing else going on."""
    runs = in_turns(
        {
            "ours": our_round_trip,
            "Pebble": pebble_round_trip,
            "concurrent.futures": futures_round_trip,
            "joblib": joblib_round_trip,
            "loky": loky_round_trip,
            "Dask": dask_round_trip,
            "anyio": anyio_round_trip,
        }
    )
    return [runs.row("round trip of one no-op callable", "µs", "≤", 0.8, unit="µs")]


async def our_round_trip() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        while True:
            times = _Times()
            while times.wanted:
                with Stopwatch() as watch:
                    await scheduler.dispatch(ht.Job(task=_tasks.nothing), private=True)[0]
                times.add(watch.seconds)
            yield times.median


def pebble_round_trip() -> Iterator[Figures]:
    from pebble import ProcessPool

    with ProcessPool(max_workers=N_WORKERS) as pool:
        yield from _round_trips(lambda: pool.schedule(_tasks.nothing).result())


def futures_round_trip() -> Iterator[Figures]:
    with concurrent.futures.ProcessPoolExecutor(N_WORKERS) as pool:
        yield from _round_trips(lambda: pool.submit(_tasks.nothing).result())


def loky_round_trip() -> Iterator[Figures]:
    import loky

    pool = loky.get_reusable_executor(N_WORKERS)
    yield from _round_trips(lambda: pool.submit(_tasks.nothing).result())


def joblib_round_trip() -> Iterator[Figures]:
    import joblib

    with joblib.Parallel(N_WORKERS, batch_size=1) as parallel:
        yield from _round_trips(lambda: parallel([joblib.delayed(_tasks.nothing)()]))


def dask_round_trip() -> Iterator[Figures]:
    with new_dask_client() as client:
        yield from _round_trips(lambda: client.submit(_tasks.nothing, pure=False).result())


async def anyio_round_trip() -> AsyncIterator[Figures]:
    from anyio import to_process

    while True:
        times = _Times()
        while times.wanted:
            with Stopwatch() as watch:
                await to_process.run_sync(_tasks.nothing)
            times.add(watch.seconds)
        yield times.median


def _round_trips(call: Callable[[], object]) -> Iterator[Figures]:
    while True:
        times = _Times()
        while times.wanted:
            with Stopwatch() as watch:
                call()
            times.add(watch.seconds)
        yield times.median


class _Times:
    """As many times as fit into a while; their median is a run's figure."""

    def __init__(self) -> None:
        self._end = time.perf_counter() + ROUND_TRIPS_FOR
        self._seconds: list[float] = []

    @property
    def wanted(self) -> bool:
        return time.perf_counter() < self._end or not self._seconds

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    @property
    def median(self) -> Figures:
        return {"µs": 1e6 * statistics.median(self._seconds)}


# --- tiny calls in chunks ----------------------------------------------------------------------


@benchmark
def tiny_calls() -> list[Row]:
    """One function over many inputs, where each may group them as it does best."""
    runs = in_turns(
        {
            "ours": our_map,
            "joblib (batch_size='auto')": joblib_map,
            "Pebble": pebble_map,
            "concurrent.futures": futures_map,
            "loky": loky_map,
            "Dask (bag)": dask_map,
        }
    )
    rates = runs.medians("rate")
    everything = runs.row(
        f"tiny calls per second through `map`, {N_CALLS:,} inputs",
        "rate",
        "≥",
        1,
        unit="/s",
        better=max,
    )
    of_joblib = rates["ours"] / rates["joblib (batch_size='auto')"]
    ahead = rates["ours"] >= max(
        rate for name, rate in rates.items() if name != "ours" and not name.startswith("joblib")
    )
    return [
        Row(
            everything.figure,
            everything.ours,
            everything.against,
            of_joblib,
            "≥ 0.50 of joblib, ahead of the others",
            of_joblib >= 0.5 and ahead,
            everything.runs,
        )
    ]


async def our_map() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        while True:
            with Stopwatch() as watch:
                values = [value async for value in scheduler.map(_tasks.double, range(N_CALLS))]
            assert len(values) == N_CALLS
            yield {"rate": N_CALLS / watch.seconds}


def joblib_map() -> Iterator[Figures]:
    import joblib

    with joblib.Parallel(N_WORKERS, batch_size="auto") as parallel:
        while True:
            with Stopwatch() as watch:
                parallel(joblib.delayed(_tasks.double)(number) for number in range(N_CALLS))
            yield {"rate": N_CALLS / watch.seconds}


_CHUNK = N_CALLS // (8 * N_WORKERS)


def pebble_map() -> Iterator[Figures]:
    from pebble import ProcessPool

    with ProcessPool(max_workers=N_WORKERS) as pool:
        yield from _maps(lambda: pool.map(_tasks.double, range(N_CALLS), chunksize=_CHUNK).result())


def futures_map() -> Iterator[Figures]:
    with concurrent.futures.ProcessPoolExecutor(N_WORKERS) as pool:
        yield from _maps(lambda: pool.map(_tasks.double, range(N_CALLS), chunksize=_CHUNK))


def loky_map() -> Iterator[Figures]:
    import loky

    pool = loky.get_reusable_executor(N_WORKERS)
    yield from _maps(lambda: pool.map(_tasks.double, range(N_CALLS), chunksize=_CHUNK))


def dask_map() -> Iterator[Figures]:
    import dask.bag

    with new_dask_client():
        # Numbers that come to be in its workers: those of a sequence would cost it ten times as much.
        bag = dask.bag.range(N_DASK_CALLS, npartitions=8 * N_WORKERS)
        yield from _maps(lambda: bag.map(_tasks.double).compute(), N_DASK_CALLS)


def _maps(mapped: Callable[[], Any], n_calls: int = N_CALLS) -> Iterator[Figures]:
    while True:
        with Stopwatch() as watch:
            values = list(mapped())
        assert len(values) == n_calls
        yield {"rate": n_calls / watch.seconds}


# --- one large array for many ------------------------------------------------------------------


@benchmark
def large_array() -> list[Row]:
    """One large array, given to many jobs: each reads its part of it."""
    timed = in_turns({"ours": our_array, "joblib": joblib_array})
    weighed = in_turns({"ours": our_weighed_array, "joblib": joblib_weighed_array})
    what = f"one {MEGABYTES} MB array passed to {N_PARTS} jobs"
    return [
        timed.row(f"{what}: time", "ms", "≤", 1.1, unit="ms"),
        weighed.row(f"{what}: peak memory of all processes", "MB", "≤", 1.1, unit="MB"),
    ]


def _new_array() -> Any:
    # A new one for each run: joblib keeps what it wrote of an array that it has seen.
    import numpy as np

    return np.random.default_rng(0).random(MEGABYTES * 1_000_000 // 8)


async def our_array() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        while True:
            array = _new_array()
            with Stopwatch() as watch:
                await _our_sums(scheduler, array)
            yield {"ms": 1e3 * watch.seconds}


async def our_weighed_array() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        await _our_sums(scheduler, _new_array()[:1_000_000])
        while True:
            array = _new_array()
            with Scales() as scales:
                await _our_sums(scheduler, array)
            yield {"MB": scales.most / 1e6}


async def _our_sums(scheduler: ht.Scheduler, array: Any) -> None:
    # From a thread, as `dispatch` asks for with arguments this large.
    jobs = [ht.Job(task=_tasks.sum_of_part, args=(array, i, N_PARTS)) for i in range(N_PARTS)]
    await asyncio.to_thread(scheduler.dispatch, jobs)
    sums = [result.data async for result in scheduler.collect()]
    assert len(sums) == N_PARTS


def joblib_array() -> Iterator[Figures]:
    import joblib

    with joblib.Parallel(N_WORKERS) as parallel:
        while True:
            array = _new_array()
            with Stopwatch() as watch:
                _joblib_sums(parallel, array)
            yield {"ms": 1e3 * watch.seconds}


def joblib_weighed_array() -> Iterator[Figures]:
    import joblib

    _joblib_sums(joblib.Parallel(N_WORKERS), _new_array()[:1_000_000])
    while True:
        array = _new_array()
        with Scales() as scales, joblib.Parallel(N_WORKERS) as parallel:
            _joblib_sums(parallel, array)
        yield {"MB": scales.most / 1e6}


def _joblib_sums(parallel: Any, array: Any) -> None:
    import joblib

    sums = parallel(
        joblib.delayed(_tasks.sum_of_part)(array, part, N_PARTS) for part in range(N_PARTS)
    )
    assert len(sums) == N_PARTS


class Scales:
    """The most memory that this process, its descendants and /dev/shm had together, in a `with`.

    Memory shared by several processes counts once: by the kernel's proportional share, and files in /dev/shm
    by what they occupy there.
    """

    def __enter__(self) -> Self:
        self.most = 0.0
        self._before = _shared_memory()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            memory = sum(map(_own_memory, family())) + _shared_memory() - self._before
            self.most = max(self.most, memory)


def family() -> list[int]:
    """This process and its descendants."""
    import psutil

    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def _own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    fields = dict(line.split(":", 1) for line in lines[1:])
    return sum(1024 * int(fields[key].split()[0]) for key in ("Pss_Anon", "Pss_File"))


def _shared_memory() -> int:
    stat = os.statvfs("/dev/shm")
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


# --- cancel ------------------------------------------------------------------------------------


@benchmark
def cancel() -> list[Row]:
    """From cancelling a running callable to the next job running in its place."""
    runs = in_turns({"ours": our_cancel, "Pebble": pebble_cancel})
    return [
        runs.row(
            "from cancelling a running callable to the next job in its slot",
            "ms",
            "<",
            1,
            unit="ms",
        )
    ]


async def our_cancel() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        while True:
            running = scheduler.dispatch(
                [ht.Job(task=_tasks.sleep, args=(60,)) for _ in range(N_WORKERS)]
            )
            waiting = scheduler.dispatch(ht.Job(task=_tasks.now))
            await asyncio.sleep(RUNS_FOR)
            cancelled_at = time.time()
            running[0].cancel()
            began_at = (await waiting[0]).data
            running.cancel()
            async for _ in scheduler.collect():
                pass
            yield {"ms": 1e3 * (began_at - cancelled_at)}


def pebble_cancel() -> Iterator[Figures]:
    from pebble import ProcessPool

    with ProcessPool(max_workers=N_WORKERS) as pool:
        while True:
            running = [pool.schedule(_tasks.sleep, args=(60,)) for _ in range(N_WORKERS)]
            waiting = pool.schedule(_tasks.now)
            time.sleep(RUNS_FOR)
            cancelled_at = time.time()
            running[0].cancel()
            began_at = waiting.result()
            running[1].cancel()
            concurrent.futures.wait(running)
            yield {"ms": 1e3 * (began_at - cancelled_at)}
