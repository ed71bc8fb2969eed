"""A random search on the cores of this machine that keeps every core busy.

python random_search.py
"""

import asyncio
import random

import aiohypertunity as ht

N_TRIALS = 40


def objective(x: float, y: float) -> float:
    """Stand-in for a training that returns its loss."""
    return (x - 0.3) ** 2 + (y + 0.1) ** 2


def next_trial() -> ht.Job[float]:
    return ht.Job(
        task=objective, args={"x": random.uniform(-1, 1), "y": random.uniform(-1, 1)}, timeout=60
    )


async def main() -> None:
    best = None
    async with ht.Scheduler() as scheduler:
        n_slots = scheduler.statistics().n_parallel
        n_started = min(2 * n_slots, N_TRIALS)  # enough that no slot ever waits for the next job
        scheduler.dispatch([next_trial() for _ in range(n_started)])
        async for result in scheduler.collect(n_results=N_TRIALS):
            if n_started < N_TRIALS:
                scheduler.dispatch(next_trial())
                n_started += 1
            if not result.ok:
                print(f"trial {result.id} is left out: {result.error}")
            elif best is None or result.data < best.data:
                best = result
                print(f"trial {result.id}: {best.data:.4f} at {best.job.args}")


if __name__ == "__main__":
    asyncio.run(main())
