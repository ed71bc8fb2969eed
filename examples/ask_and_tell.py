"""Optuna decides what to try next; the trials run in parallel.

pip install optuna
python ask_and_tell.py
"""

import asyncio

import optuna

import aiohypertunity as ht

N_TRIALS = 30


def objective(x: float, depth: int) -> float:
    """Stand-in for a training that returns its loss."""
    return (x - 0.3) ** 2 + 0.1 * abs(depth - 4)


async def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    trials = {}

    def ask() -> ht.Job[float]:
        trial = study.ask()
        args = {"x": trial.suggest_float("x", -1, 1), "depth": trial.suggest_int("depth", 1, 8)}
        job = ht.Job(task=objective, args=args)
        trials[job.id] = trial
        return job

    async with ht.Scheduler(n_parallel=2, timeout=600, retries=1) as scheduler:
        # A few more than run at once: the sampler learns from what has finished, so not too many.
        scheduler.dispatch([ask() for _ in range(3)])
        async for result in scheduler.collect():
            trial = trials.pop(result.id)
            if result.ok:
                study.tell(trial, result.data)
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if len(study.trials) < N_TRIALS:
                scheduler.dispatch(ask())

    print(f"best of {len(study.trials)}: {study.best_value:.4f} at {study.best_params}")


if __name__ == "__main__":
    asyncio.run(main())
