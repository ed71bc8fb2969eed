"""Tunes a classifier of handwritten digits: a random search that asks and tells, with no batch barrier.

`python -m benchmarks.demo`: the same search with the objective as a callable, as a function in a script and as
a script; and as Slurm jobs, where there is a cluster.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import aiohypertunity as ht

from .digits import accuracy

DIGITS = Path(__file__).with_name("digits.py")
N_BEST = 5


class Settings(NamedTuple):
    """What is tuned."""

    c: float
    gamma: float


class RandomSearch:
    """Asked for settings to try, and told how good they were."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        self.told: list[tuple[float, Settings]] = []

    def ask(self) -> Settings:
        """Settings to try next."""
        return Settings(
            c=10 ** self._random.uniform(-2, 3), gamma=10 ** self._random.uniform(-4, 0.3)
        )

    def tell(self, settings: Settings, value: float) -> None:
        """How good some settings were."""
        self.told.append((value, settings))


class Search(NamedTuple):
    """A search that is over."""

    way: str
    found: list[tuple[float, Settings]]
    seconds: float
    first_after: float
    busy: float | None


async def tune(
    way: str,
    make_job: Callable[[Settings], ht.Job[float]],
    n_trials: int,
    scheduler: ht.Scheduler,
    n_at_once: int,
) -> Search:
    """Runs a search: as soon as any trial is over, the next one is on its way."""
    search = RandomSearch()
    n_asked = n_told = 0
    began_at, first_after = time.monotonic(), 0.0

    def ask() -> None:
        nonlocal n_asked
        if n_asked < n_trials:
            n_asked += 1
            scheduler.dispatch(make_job(search.ask()))

    for _ in range(n_at_once):
        ask()
    async for result in scheduler.collect():
        ask()
        n_told += 1
        first_after = first_after or time.monotonic() - began_at
        if not result.ok:
            print(f"{way:>15} {n_told:3}/{n_trials}  {result.error}", flush=True)
            continue
        settings = Settings(*result.job.args)
        search.tell(settings, result.data)
        took = result.finished_at - (result.started_at or result.queued_at)
        print(
            f"{way:>15} {n_told:3}/{n_trials}  accuracy {result.data:.4f}  {_words(settings)}  {took:5.2f} s",
            flush=True,
        )
    seconds = time.monotonic() - began_at
    busy = scheduler.statistics().utilization if scheduler.statistics().busy_seconds else None
    return Search(way, search.told, seconds, first_after, busy)


async def main() -> None:
    """Tunes in every way there is, and says what was best."""
    ways: list[tuple[str, int, Callable[[Settings], ht.Job[float]]]] = [
        ("callable", 20, lambda settings: ht.Job(task=accuracy, args=(*settings,))),
        (
            "script:function",
            20,
            lambda settings: ht.Job(task=f"{DIGITS}:accuracy", args=(*settings,)),
        ),
        ("script", 8, lambda settings: ht.Job(task=DIGITS, args=(*settings,))),
    ]
    searches = []
    for way, n_trials, make_job in ways:
        async with ht.Scheduler(n_parallel=-1) as scheduler:
            n_at_once = scheduler.statistics().n_parallel
            searches.append(await tune(way, make_job, n_trials, scheduler, n_at_once))
    if _is_there_a_cluster():
        searches.append(await tune_on_slurm())
    _print_best(searches)
    _print_searches(searches)


async def tune_on_slurm() -> Search:
    """The same search, each trial a Slurm job."""
    # Nodes must see the work directory: on a real cluster it lies where your home does.
    with tempfile.TemporaryDirectory(dir=Path.home()) as workdir:
        async with ht.Scheduler(slurm=ht.Slurm(workdir=workdir)) as scheduler:
            return await tune(
                "Slurm",
                lambda settings: ht.SlurmJob(
                    task=f"{DIGITS}:accuracy",
                    args=(*settings,),
                    meta={"resources": {"cpu": 1, "memory": "1G", "time": 10}},
                ),
                n_trials=8,
                scheduler=scheduler,
                n_at_once=4,
            )


def _is_there_a_cluster() -> bool:
    if shutil.which("sbatch") is None:
        return False
    try:
        return (
            subprocess.run(["sinfo"], capture_output=True, timeout=5, check=False).returncode == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def _print_best(searches: list[Search]) -> None:
    found = {settings: value for search in searches for value, settings in search.found}
    print(f"\nThe best {N_BEST} of {len(found)}:\n\n| accuracy | C | gamma |\n|---|---|---|")
    for settings in sorted(found, key=lambda settings: -found[settings])[:N_BEST]:
        print(f"| {found[settings]:.4f} | {settings.c:.3g} | {settings.gamma:.3g} |")


def _print_searches(searches: list[Search]) -> None:
    print("\n| objective as | trials | seconds | first result after | CPUs busy |")
    print("|---|---|---|---|---|")
    for search in searches:
        busy = "-" if search.busy is None else f"{search.busy:.0%}"
        print(
            f"| {search.way} | {len(search.found)} | {search.seconds:.1f} | {search.first_after:.1f} s | {busy} |"
        )


def _words(settings: Settings) -> str:
    return f"C={settings.c:<8.3g} gamma={settings.gamma:<8.3g}"


if __name__ == "__main__":
    asyncio.run(main())
