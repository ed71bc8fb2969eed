"""An asyncio-native scheduler for functions, scripts and Slurm jobs.

    import asyncio
    import aiohypertunity as ht

    async def main():
        async with ht.Scheduler(n_parallel=2) as scheduler:
            scheduler.dispatch([ht.Job(task=pow, args=(number, 2)) for number in range(5)])
            async for result in scheduler.collect():
                print(result.id, result.data if result.ok else result.error)

    asyncio.run(main())

What to run is a `Job` or a `SlurmJob`; a `Scheduler` runs it and delivers a `Result`. From the top:

    _errors      the exceptions
    _results     results of jobs
    _events      events of a scheduler
    _jobs        descriptions of what to run
    _ledger      rules: allocation of slots, order of starts, delivery of results
    _payload     both ends of a call, on any side of a process boundary
    _failures    error messages of jobs
    _calls       calls, packed at dispatch
    _threads     threads for blocking work
    _guardian    ends the processes of a run whose driver is gone
    _sigterm     SIGTERM of a driver that has jobs on a cluster
    _rundir      the directories of a scheduler on this machine
    _worker_main, _capture, _workers, _callables, _joblib
                 callables, in isolated workers or through a joblib backend
    _scripts     scripts, as asyncio subprocesses
    _inline      a job run in the calling thread
    _address, _transports, _ssh, _slurm
                 Slurm jobs
    _handles, _map, _streams
                 the objects that a scheduler returns
    _scheduler   the only owner of tasks
    sync         the blocking twin
    _doctor, __main__
                 `python -m aiohypertunity doctor`

A module imports only from those above it. Each is imported on first use, because a program that
only makes jobs, or a worker that only runs them, needs little of the package.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if sys.platform == "win32":
    raise ImportError(
        "aiohypertunity needs process groups and Unix sockets: on Windows, run it in WSL 2"
    )

if TYPE_CHECKING:
    from . import sync as sync
    from ._errors import (
        CollectTimeout,
        HypertunityError,
        JobCancelled,
        JobCrashed,
        JobError,
        JobFailed,
        JobTimeout,
        NodeFailed,
        NotEnoughJobs,
        OutOfMemory,
        PayloadError,
        RemoteTraceback,
        ResultLost,
        SubmitError,
        TransportError,
    )
    from ._events import (
        Cancelled,
        Dropped,
        Event,
        Finished,
        Held,
        LinkDown,
        LinkUp,
        Queued,
        Retried,
        Started,
    )
    from ._handles import Batch, Collector, JobHandle
    from ._jobs import Job, SlurmJob
    from ._map import Map
    from ._results import Result, Status
    from ._scheduler import Scheduler, Statistics
    from ._slurm import Slurm

__version__ = "0.1.0"

_HOMES = {
    "_errors": (
        "CollectTimeout", "HypertunityError", "JobCancelled", "JobCrashed", "JobError", "JobFailed",
        "JobTimeout", "NodeFailed", "NotEnoughJobs", "OutOfMemory", "PayloadError",
        "RemoteTraceback", "ResultLost", "SubmitError", "TransportError",
    ),
    "_events": (
        "Cancelled", "Dropped", "Event", "Finished", "Held", "LinkDown", "LinkUp", "Queued",
        "Retried", "Started",
    ),
    "_handles": ("Batch", "Collector", "JobHandle"),
    "_jobs": ("Job", "SlurmJob"),
    "_map": ("Map",),
    "_results": ("Result", "Status"),
    "_scheduler": ("Scheduler", "Statistics"),
    "_slurm": ("Slurm",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch", "Cancelled", "CollectTimeout", "Collector", "Dropped", "Event", "Finished", "Held",
    "HypertunityError", "Job", "JobCancelled", "JobCrashed", "JobError", "JobFailed", "JobHandle",
    "JobTimeout", "LinkDown", "LinkUp", "Map", "NodeFailed", "NotEnoughJobs", "OutOfMemory",
    "PayloadError", "Queued", "RemoteTraceback", "Result", "ResultLost", "Retried", "Scheduler",
    "Slurm", "SlurmJob", "Started", "Statistics", "Status", "SubmitError", "TransportError",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name == "sync":
        return importlib.import_module(".sync", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF, "sync"]
