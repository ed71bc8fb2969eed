"""Searches that ask and tell, and tiny jobs among long ones: are the workers kept busy?"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Iterable

import aiohypertunity as ht
from aiohypertunity._executors.workers import pool

from . import _tasks
from ._harness import N_WORKERS, Figures, Row, Stopwatch, benchmark, in_turns

SECONDS = 3.0
BATCH = 4 * N_WORKERS
N_SLOTS = 4
N_MIXED = 1_000


# --- ask and tell ------------------------------------------------------------------------------


@benchmark
def search() -> list[Row]:
    """A search with a budget of seconds, over trials whose durations have a heavy tail."""
    runs = in_turns({"ours": ask_and_tell, "in batches": in_batches})
    what = f"heavy-tailed trials for {SECONDS:g} s, ask and tell"
    return [
        runs.row(
            f"{what}: busy share of the CPUs", "busy", "≥", 0.97, better=max, of_ratio=False
        ),
        runs.row(
            f"{what}: delay of the first result after the end of the first trial",
            "first", "≤", 5, unit="ms", of_ratio=False,
        ),
    ]  # fmt: skip


class _Trials:
    """Durations of trials, ever the same ones, and what became of them."""

    def __init__(self) -> None:
        self._random = random.Random(1)
        self._ends: list[float] = []
        self._durations: list[float] = []
        self._first: float | None = None
        self.began_at = time.time()

    def ask(self) -> ht.Job[float]:
        duration = min(0.01 * self._random.paretovariate(1.2), 0.5)
        return ht.Job(task=_tasks.burn, args=(duration,))

    @property
    def are_wanted(self) -> bool:
        return time.time() - self.began_at < SECONDS

    def tell(self, results: Iterable[ht.Result[float]]) -> None:
        told_at = time.time()
        for result in results:
            self._ends.append(result.data)
            assert isinstance(result.job.args, tuple)
            self._durations.append(result.job.args[0])
        if self._first is None:
            self._first = told_at - min(self._ends)

    def figures(self) -> Figures:
        """Busy seconds while there were trials to be had, as a share of all; the wait for the first."""
        assert self._first is not None
        end = self.began_at + SECONDS
        busy = sum(
            max(min(at, end) - (at - duration), 0)
            for at, duration in zip(self._ends, self._durations, strict=True)
        )
        return {"busy": busy / (SECONDS * N_WORKERS), "first": 1e3 * self._first}


async def ask_and_tell() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        await _warm(scheduler, N_WORKERS)
        while True:
            trials = _Trials()
            scheduler.dispatch([trials.ask() for _ in range(N_WORKERS)])
            async for result in scheduler.collect():
                if trials.are_wanted:
                    scheduler.dispatch(trials.ask())
                trials.tell([result])
            yield trials.figures()


async def in_batches() -> AsyncIterator[Figures]:
    async with ht.Scheduler(N_WORKERS) as scheduler:
        await _warm(scheduler, N_WORKERS)
        while True:
            trials = _Trials()
            while trials.are_wanted:
                scheduler.dispatch([trials.ask() for _ in range(BATCH)])
                trials.tell([result async for result in scheduler.collect()])
            yield trials.figures()


# --- tiny jobs among long ones -----------------------------------------------------------------


@benchmark
def mixed() -> list[Row]:
    """Durations of a Pareto law, tiny ones among long ones, with and without getting ahead."""
    runs = in_turns({"ours": getting_ahead, "strict order": not_getting_ahead})
    return [
        runs.row(
            f"tiny jobs among long ones ({N_MIXED:,}, Pareto, {N_SLOTS} slots): busy share",
            "busy", "≥", 0.99, better=max,
        )
    ]  # fmt: skip


async def getting_ahead() -> AsyncIterator[Figures]:
    chance = random.Random(2)
    durations = [min(2e-4 * chance.paretovariate(0.8), 0.5) for _ in range(N_MIXED)]
    async with ht.Scheduler(N_SLOTS) as scheduler:
        await _warm(scheduler, N_SLOTS)
        while True:
            jobs = [ht.Job(task=_tasks.sleep, args=(duration,)) for duration in durations]
            with Stopwatch() as watch:
                scheduler.dispatch(jobs)
                async for result in scheduler.collect():
                    assert result.ok
            yield {"busy": sum(durations) / (N_SLOTS * watch.seconds)}


async def not_getting_ahead() -> AsyncIterator[Figures]:
    pool._MOST_AHEAD = 0
    async for figures in getting_ahead():
        yield figures


async def _warm(scheduler: ht.Scheduler, n_workers: int) -> None:
    scheduler.dispatch([ht.Job(task=_tasks.sleep, args=(0.3,)) for _ in range(n_workers)])
    async for _ in scheduler.collect():
        pass
