"""What stands in our environment doesn't change what Slurm's commands do for us."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from slurm_kit import cluster_fixture, needs_slurm, slurm_fixture  # noqa: F401 - fixtures

import aiohypertunity as ht
from aiohypertunity._transports.local import LocalShell

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_slurm

_VARIABLES = {
    "SQUEUE_PARTITION": "no-such-partition",
    "SQUEUE_STATES": "suspended",
    "SQUEUE_USERS": "nobody",
    "SCANCEL_STATE": "suspended",
    "SCANCEL_PARTITION": "no-such-partition",
    "SACCT_FORMAT": "jobid",
    "SBATCH_PARTITION": "no-such-partition",
    "SLURM_TIME_FORMAT": "relative",
    "SINFO_FORMAT": "nothing",
    "SCONTROL_FUTURE": "1",
}


async def test_variables_of_commands(
    slurm: Callable[..., ht.Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables by which people set up squeue, scancel or sbatch for themselves don't reach ours."""
    for name, value in _VARIABLES.items():
        monkeypatch.setenv(name, value)
    shown = await LocalShell().run("env", timeout=10)
    assert not [name for name in _VARIABLES if name in shown.stdout]
    assert "SLURM_CONF=" in shown.stdout
    async with ht.Scheduler(1, slurm=slurm()) as scheduler:
        handles = scheduler.dispatch(
            [ht.SlurmJob(time.sleep, (seconds,)) for seconds in (5.0, 1000)]
        )
        for handle in handles:
            await handle.wait_started()
        await asyncio.sleep(1)
        handles[1].cancel()
        assert (await handles[1]).status is ht.Status.CANCELLED
        assert (await handles[0]).error is None
