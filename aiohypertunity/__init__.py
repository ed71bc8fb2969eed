"""An asyncio-native scheduler for functions, scripts and Slurm jobs.

    import asyncio
    import aiohypertunity as ht

    async def main():
        async with ht.Scheduler(n_parallel=2) as scheduler:
            scheduler.dispatch([ht.Job(task=pow, args=(number, 2)) for number in range(5)])
            async for result in scheduler.collect():
                print(result.id, result.data if result.ok else result.error)

    asyncio.run(main())

A `Job` or a `SlurmJob` says what to run, a `Scheduler` runs it, and a `Result` says what became of it.
`aiohypertunity.sync.Scheduler` is the blocking twin of `Scheduler`. Names are loaded on first use.
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
    from ._model.errors import (
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
    from ._model.events import (
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
    from ._model.jobs import Job, SlurmJob
    from ._model.results import Result, Status
    from ._model.slurm import Slurm
    from ._runtime.handles import Batch, Collector, JobHandle
    from ._runtime.map import Map
    from ._runtime.scheduler import Scheduler, Statistics

__version__ = "0.1.0"

_HOMES = {
    "_model.errors": (
        "CollectTimeout", "HypertunityError", "JobCancelled", "JobCrashed", "JobError", "JobFailed",
        "JobTimeout", "NodeFailed", "NotEnoughJobs", "OutOfMemory", "PayloadError",
        "RemoteTraceback", "ResultLost", "SubmitError", "TransportError",
    ),
    "_model.events": (
        "Cancelled", "Dropped", "Event", "Finished", "Held", "LinkDown", "LinkUp", "Queued",
        "Retried", "Started",
    ),
    "_runtime.handles": ("Batch", "Collector", "JobHandle"),
    "_model.jobs": ("Job", "SlurmJob"),
    "_runtime.map": ("Map",),
    "_model.results": ("Result", "Status"),
    "_runtime.scheduler": ("Scheduler", "Statistics"),
    "_model.slurm": ("Slurm",),
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
