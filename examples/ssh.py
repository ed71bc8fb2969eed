"""Jobs on a Slurm cluster from another machine, such as a laptop; events show what happens.

The Python on the cluster must have the minor version of this one, and cloudpickle.

python ssh.py me@login.example.edu /home/me/venv/bin/python
"""

import asyncio
import getpass
import sys

import aiohypertunity as ht


def train(rate: float) -> float:
    """Stand-in for a training that returns its loss."""
    return (rate - 0.1) ** 2


async def show(events) -> None:
    async for event in events:
        match event:
            case ht.LinkDown():
                print(f"connection lost, jobs go on: {event.reason}")
            case ht.LinkUp():
                print("connected")
            case ht.Started():
                print(f"job {event.job.id} started")


async def main(host: str, python: str) -> None:
    # `prompt` is asked for passwords and codes; with a key or an agent it is not used.
    cluster = ht.Slurm(host, python=python, connect={"prompt": getpass.getpass})
    async with ht.Scheduler(slurm=cluster) as scheduler:
        watcher = asyncio.create_task(show(scheduler.events()))
        scheduler.dispatch([ht.SlurmJob(task=train, args=(rate,)) for rate in (0.01, 0.1, 0.3)])
        async for result in scheduler.collect():
            print(result.slurm_id, result.host, result.data if result.ok else result.error)
    await watcher  # the events end when the scheduler is closed


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
