"""Without asyncio: a grid of settings, and a table of scores.

python plain_script.py
"""

import itertools

from aiohypertunity import Job
from aiohypertunity.sync import Scheduler


def score(rate: float, depth: int) -> float:
    """Stand-in for a training that returns its score."""
    return 1 - (rate - 0.1) ** 2 - 0.01 * depth


def main() -> None:
    grid = list(itertools.product((0.01, 0.1, 1.0), (2, 4)))
    with Scheduler(n_parallel=2, retries=1) as scheduler:
        scheduler.dispatch([Job(task=score, args=settings) for settings in grid])
        results = scheduler.collect(deadline=600)  # a list, in the order of dispatch
    for (rate, depth), result in zip(grid, results, strict=True):
        found = f"{result.data:.3f}" if result.ok else f"failed: {result.error}"
        print(f"rate {rate:<5} depth {depth}  {found}")


if __name__ == "__main__":
    main()
