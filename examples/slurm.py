"""Jobs on a Slurm cluster, from its login node; run `python -m aiohypertunity doctor` first.

python slurm.py
"""

import asyncio

import aiohypertunity as ht

# What your site asks for goes here: options={"partition": "gpu", "account": "abc123"},
# setup=["module load cuda"].
CLUSTER = ht.Slurm(setup=["export OMP_NUM_THREADS=1"])


def train(rate: float) -> float:
    """Stand-in for a training that returns its loss."""
    return (rate - 0.1) ** 2


async def main() -> None:
    jobs = [
        ht.SlurmJob(
            task=train,
            args=(rate,),
            timeout=3600,  # of one attempt, kept on the node to the second
            queue_timeout=24 * 3600,
            retries=1,
            meta={"resources": {"cpu": 1, "memory": "200M", "time": "1:30:00"}},
        )
        for rate in (0.01, 0.03, 0.1, 0.3)
    ]
    async with ht.Scheduler(slurm=CLUSTER) as scheduler:
        scheduler.dispatch(jobs)
        async for result in scheduler.collect():
            where = f"{result.slurm_id} on {result.host}"
            if result.ok:
                print(f"{where}: rate {result.job.args[0]}, loss {result.data:.4f}")
            else:
                print(f"{where}: {result.error}")


if __name__ == "__main__":
    asyncio.run(main())
