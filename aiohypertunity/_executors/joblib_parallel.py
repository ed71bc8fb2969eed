"""Callables through any joblib backend by name: `joblib.Parallel` in a thread.

One `Parallel` call for each group of calls that may start together, never one that is fed as it runs: it would
hold back results until it's fed again. Which backends there are and what they can do is joblib's to say; what is
not joblib's public API is used here and nowhere else.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from .._host.threads import in_thread
from .._model.errors import JobCrashed
from .._model.jobs import FunctionRef
from .._model.results import Outcome, Status
from .._rules import messages
from .._wire import payloads
from .workers.child import Chunk
from .workers.loading import Loader, Reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._model.jobs import Job
    from .._rules.ledger import Entry, Owner

_Answer = tuple[bytes, bytes, float, float, str, int]


def check_name(backend: str) -> None:
    """Sees whether joblib knows such a backend.

    Raises:
        ValueError: It doesn't.
    """
    from joblib.parallel import BACKENDS, EXTERNAL_BACKENDS

    known = {*BACKENDS, *EXTERNAL_BACKENDS} - {"multiprocessing"}
    if backend not in known:
        raise ValueError(
            f"backend={backend!r}: joblib knows {', '.join(sorted(known))}; one of another package has to be "
            "registered before (ray: ray.util.joblib.register_ray()); left out, it is 'isolated'"
        )
    if backend == "dask" and importlib.util.find_spec("distributed") is None:
        raise ValueError("backend='dask' needs dask.distributed: pip install distributed")


def check_backend(backend: str, n_slots: int) -> None:
    """Sees whether joblib has such a backend, and whether it can give results one by one. Blocks.

    Raises:
        ValueError: It hasn't, or it can't.
    """
    try:
        _parallel(backend, n_slots)
    except Exception as error:
        raise ValueError(
            f"backend={backend!r}: joblib can't use it to give results one by one: {error}"
        ) from error


def _parallel(backend: str, n_slots: int) -> Any:
    import joblib

    # Backends of other packages ("dask") are known to `parallel_config` alone.
    with joblib.parallel_config(backend=backend):
        return joblib.Parallel(
            # With one, joblib would run calls in this very process. How many may start, others decide.
            n_jobs=max(n_slots, 2),
            return_as="generator_unordered",
            batch_size=1,  # pyright: ignore[reportArgumentType]  # it is inferred from "auto"
            pre_dispatch="all",
        )


def call_packed(function: bytes, payload: bytes, chunk: bool) -> _Answer:
    """Runs a packed call, wherever joblib has brought it."""

    def load() -> Callable[..., Any]:
        loaded = payloads.load_function(function)
        return Chunk(loaded) if chunk else loaded

    started = time.time()
    kind, reply, _ = payloads.run(load, lambda: payloads.loads(payload), None)
    return kind, reply, started, time.time(), socket.gethostname(), os.getpid()


class JoblibCallables:
    """Runs callables through a joblib backend.

    Args:
        owner: To whom to report.
        backend: joblib's name of it.
        n_slots: How many calls may run at once.
    """

    n_processes = 0

    def __init__(self, owner: Owner, backend: str, n_slots: int) -> None:
        self._owner = owner
        self._backend = backend
        self._n_slots = n_slots
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Entry] = []
        self._groups: set[asyncio.Task[None]] = set()
        self._loader = Loader()
        self._limiter = anyio.CapacityLimiter(n_slots)

    def check(self, job: Job[Any], timeout: float | None) -> None:
        """Refuses what a joblib backend can't do.

        Raises:
            ValueError: The job has a timeout, an environment or a directory of its own.
        """
        if isinstance(job.target, FunctionRef) and job.target.path is not None:
            raise ValueError(
                f"{messages.name(job)} is a function in a script: in the processes of the joblib backend "
                f"{self._backend!r}, scripts would get into each other's way; backend='isolated' keeps "
                "them apart"
            )
        others = set((job.meta or {}).get("resources", {})) - {"cpu"}
        if others:
            raise ValueError(
                f"{messages.name(job)} asks for {', '.join(sorted(others))}: the joblib backend "
                f"{self._backend!r} can't tell a call which it was given; backend='isolated' can"
            )
        given = {"timeout": timeout, "env": job.env, "cwd": job.cwd}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{messages.name(job)} has {name}={value!r}: the joblib backend {self._backend!r} "
                    "can't keep that; backend='isolated' can"
                )

    def start(self, entry: Entry) -> None:
        """Runs it together with whatever else may start in this turn of the loop."""
        if not self._waiting:
            self._loop.call_soon(self._start_group)
        entry.place = self
        self._waiting.append(entry)

    def check_stop(self, entry: Entry) -> None:
        """Raises RuntimeError: joblib can't end a call."""
        if isinstance(entry.place, Reading):
            return
        raise RuntimeError(
            f"{messages.name(entry.job)} is running, and the joblib backend {self._backend!r} can't "
            "stop a running call; backend='isolated' can"
        )

    def stop(self, entry: Entry) -> None:
        """Gives up a result that is being loaded; else see `check_stop`."""
        self.check_stop(entry)
        entry.place.stop()

    async def aclose(self) -> None:
        """Waits for what still runs."""
        if self._groups:
            await asyncio.wait(self._groups)

    def _start_group(self) -> None:
        group, self._waiting = self._waiting, []
        task = self._loop.create_task(self._run(group))
        self._groups.add(task)
        task.add_done_callback(self._groups.discard)

    async def _run(self, group: list[Entry]) -> None:
        unanswered = dict(enumerate(group))
        calls = [(e.call.function, e.call.read_payload(), e.call.chunk) for e in group]

        def take(index: int, answer: _Answer) -> None:
            self._finish(unanswered.pop(index), answer)

        def tell(index: int, answer: _Answer) -> None:
            self._loop.call_soon_threadsafe(take, index, answer)

        error: BaseException | None = None
        try:
            await in_thread(self._run_group, calls, tell, limiter=self._limiter)
        except asyncio.CancelledError:
            raise
        except (
            BaseException
        ) as raised:  # joblib, or a backend of another package, may raise anything
            error = raised
        # What the thread told before it ended is behind us in the loop's queue.
        await asyncio.sleep(0)
        for entry in unanswered.values():
            self._lose(entry, error)

    def _run_group(
        self, calls: list[tuple[bytes, bytes, bool]], tell: Callable[[int, _Answer], None]
    ) -> None:
        import joblib

        parallel = _parallel(self._backend, self._n_slots)
        call = joblib.delayed(_call_numbered)
        for index, answer in parallel(call(i, *packed) for i, packed in enumerate(calls)):
            tell(index, answer)

    def _finish(self, entry: Entry, answer: _Answer) -> None:
        kind, reply = answer[:2]
        part = "the exception" if kind == payloads.RAISED else "the return value"
        read = partial(messages.from_reply, entry.job, kind, reply)
        done = partial(self._report, entry, answer)
        entry.place = self._loader.start(entry.job, part, read, done)

    def _report(self, entry: Entry, answer: _Answer, outcome: Outcome) -> None:
        _, _, started_at, finished_at, host, pid = answer
        outcome.started_at, outcome.finished_at = started_at, finished_at
        outcome.host, outcome.pid = host, pid
        entry.place = None
        self._owner.finished(entry, outcome)

    def _lose(self, entry: Entry, error: BaseException | None) -> None:
        crashed = JobCrashed(
            f"the joblib backend {self._backend!r} lost {messages.name(entry.job)}: {error}; "
            "backend='isolated' would say what its process died of, and spare the others",
            job=entry.job,
        )
        crashed.__cause__ = error
        entry.place = None
        self._owner.finished(entry, Outcome(Status.CRASHED, error=crashed))


def _call_numbered(index: int, function: bytes, payload: bytes, chunk: bool) -> tuple[int, _Answer]:
    return index, call_packed(function, payload, chunk)
