"""Callables in isolated worker processes: one a slot, one pipe each.

While calls prove tiny a worker gets a few ahead, so that they stream; whatever still waits in a worker when
its first call takes longer is taken back and given to whoever is free. A cancel or a timeout kills one
worker, and a spare takes over. The workers are started by ourselves, not through joblib: joblib's own
(loky's) take several times as long to start, for what they import.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pickle
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..._model.results import Outcome, Status
from ..._rules import messages
from ..._wire import payloads
from .child import UNKNOWN
from .loading import Loader, Reading, load_harmless
from .process import GARBLED, Death, Reply, WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..._host.rundir import RunDirectory
    from ..._model.errors import JobCrashed, JobFailed
    from ..._model.jobs import Job
    from ..._rules.ledger import Entry, Grant, Owner
    from ..calls import Call

THREAD_LIMITS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS", "NUMEXPR_NUM_THREADS",
)  # fmt: skip
"""The variables by which numerical libraries are told how many threads to use; joblib caps the same."""

_TINY = 0.001
"""Seconds up to which a call is worth being kept ahead."""

_STREAM = 0.002
"""Seconds of work to keep ahead in a worker."""

_MOST_AHEAD = 48

_NAMES_SOMETHING = 20
"""Bytes below which no pickle names a class or function."""

_SLICE = 0.002
"""Seconds for which answers are read in one turn of the loop."""

_SWEEP = 0.005
_SPARE_AFTER = 1.0
_LEAVE = 1.0
_START_FAILURES = 3


class _Key(NamedTuple):
    """What a worker is good for.

    Attributes:
        env: Variables beside the driver's own.
        script: The script it has loaded, by identity and content.
    """

    env: tuple[tuple[str, str], ...] = ()
    script: tuple[str, ...] | None = None


class IsolatedCallables:
    """Runs callables in isolated worker processes.

    Args:
        owner: To whom to report.
        rundir: Where files go.
        n_slots: How many workers may run a call at once.
    """

    def __init__(self, owner: Owner, rundir: RunDirectory, n_slots: int) -> None:
        self._owner = owner
        self._rundir = rundir
        self._n_slots = n_slots
        self._threads = max(available_cpus() // n_slots, 1)
        self._workers: list[WorkerProcess] = []
        self._idle: list[WorkerProcess] = []
        self._pace = 0.0
        self._sweeping: asyncio.TimerHandle | None = None
        self._sparing: asyncio.TimerHandle | None = None
        self._n_start_failures = 0
        self._loader = Loader()
        self._has_overrun = False
        self._loop = asyncio.get_running_loop()
        self._host = socket.gethostname()

    # --- Executor --------------------------------------------------------------------------

    def start(self, entry: Entry) -> None:
        """Runs it in an idle worker that fits, or in a new one."""
        key = self._key(entry)
        worker = self._worker_for(key)
        try:
            # The socket of an idle worker has room, unless the last call shut it down.
            while not worker.send(entry):
                worker = self._spawn(key)
        except OSError:
            self._idle.append(worker)
            raise
        entry.place = worker
        self._watch_starts()

    def stop(self, entry: Entry) -> None:
        """Kills the worker that runs it; if none does yet, takes it back."""
        if isinstance(entry.place, Reading):
            if entry.stop_status is Status.CANCELLED:  # the attempt itself ended in time
                entry.place.stop()
            return
        worker: WorkerProcess | None = entry.place
        if worker is None or entry not in worker.calls:  # it was answered, and is being loaded
            return
        unstarted = worker.take_back()
        # In this order: what it has answered by now is over, and nothing else can be running in it.
        self._read(worker)
        if entry in unstarted:
            unstarted.remove(entry)
            self._owner.finished(entry, Outcome(Status.CRASHED))
        elif entry in worker.calls:
            worker.kill()
        self._give_back(unstarted)
        if not worker.calls and not worker.retired and worker not in self._idle:
            self._idle.append(worker)

    def check(self, job: Job[Any], timeout: float | None) -> None:
        """Any callable will do."""

    def check_stop(self, entry: Entry) -> None:
        """A callable can always be ended."""

    async def aclose(self) -> None:
        """Ends all workers."""
        for timer in (self._sweeping, self._sparing):
            if timer is not None:
                timer.cancel()
        for worker in tuple(self._workers):
            worker.kill() if worker.calls else worker.retire()
        lives = [worker.gone for worker in self._workers]
        if lives:
            await asyncio.wait(lives, timeout=_LEAVE)
            for worker in tuple(self._workers):
                worker.kill()
            await asyncio.gather(*lives)

    @property
    def n_processes(self) -> int:
        """How many worker processes there are."""
        return len(self._workers)

    # --- workers ---------------------------------------------------------------------------

    def _key(self, entry: Entry) -> _Key:
        call: Call = entry.call
        grant = entry.grant
        env = dict(entry.job.env or {})
        if grant is not None and (grant.cpus > 1 or grant.others):
            env = {**self._thread_limits(grant.cpus), **resource_env(grant), **env}
        return _Key(tuple(sorted(env.items())), call.script) if env or call.script else _ANY

    def _thread_limits(self, cpus: int) -> dict[str, str]:
        return {name: str(self._threads * cpus) for name in THREAD_LIMITS if name not in os.environ}

    def _worker_for(self, key: _Key) -> WorkerProcess:
        for index in range(len(self._idle) - 1, -1, -1):
            if self._idle[index].key == key and self._idle[index].is_current:
                return self._idle.pop(index)
        fresh = key.script is not None and self._unused(key._replace(script=None))
        if fresh:
            fresh.key = key
            self._idle.remove(fresh)
            return fresh
        if self._idle and len(self._workers) > self._n_slots:
            self._idle.pop(0).retire()
        return self._spawn(key)

    def _unused(self, key: _Key) -> WorkerProcess | None:
        return next((w for w in self._idle if not w.used and w.key == key and w.is_current), None)

    def _spawn(self, key: _Key) -> WorkerProcess:
        env = {**os.environ, **self._thread_limits(1), **dict(key.env)}
        worker = WorkerProcess(key, env, self._rundir, self._on_replies, self._on_death)
        self._workers.append(worker)
        return worker

    def _watch_starts(self) -> None:
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Reports what has started, and takes back what waits behind a call that takes its time."""
        self._sweeping = None
        again = False
        now = time.time()
        for worker in self._workers:
            if not worker.calls:
                continue
            since = worker.running_since
            if since is None:
                again = True
            elif not worker.acknowledged:
                worker.acknowledge()
                self._owner.started(worker.calls[0], since)
                self._want_spare()
            if len(worker.calls) > 1:
                again = True
                if since is not None and now - since > _SWEEP:
                    self._pace = now - since
                    self._give_back(worker.take_back())
        if again:
            self._watch_starts()

    def _want_spare(self) -> None:
        if self._sparing is None:
            self._sparing = self._loop.call_later(_SPARE_AFTER, self._add_spare)

    def _add_spare(self) -> None:
        self._sparing = None
        if not self._idle and any(worker.calls for worker in self._workers):
            self._idle.append(self._spawn(_ANY))

    def _give_back(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.place = None
        if entries:
            self._owner.given_back(entries)

    # --- what comes back -------------------------------------------------------------------

    def _on_replies(self, worker: WorkerProcess) -> None:
        self._n_start_failures = 0
        # Once a turn has taken its time, each worker is read a single answer from.
        now = time.monotonic()
        self._read(worker, now if self._has_overrun else now + _SLICE)
        if worker.calls and not worker.retired:
            self._get_ahead(worker)

    def _read(self, worker: WorkerProcess, until: float = math.inf) -> None:
        """Read what a worker has answered; the loop comes back for what is left at `until`."""
        for reply in worker.read():
            if worker.calls:
                self._owner.handed_over(reply.entry, worker.calls[0])
            elif not worker.retired:
                self._idle.append(worker)
            if reply.kind == UNKNOWN:
                self._give_back([reply.entry])
                continue
            self._pace += (reply.finished_at - reply.started_at - self._pace) / 4
            if reply.kind == GARBLED:
                self._report_garbled(worker, reply)
            else:
                self._load(worker.pid, reply)
            if time.monotonic() > until:
                if not self._has_overrun:
                    self._has_overrun = True
                    self._loop.call_soon(self._begin_turn)
                break
        if worker.is_garbled:
            self._dismiss(worker)

    def _dismiss(self, worker: WorkerProcess) -> None:
        """End a worker that sent what is no reply, once it runs nothing but the call that is to blame."""
        if worker in self._idle:
            self._idle.remove(worker)
        self._give_back(worker.take_back())
        # Nothing else can start in it now. A second call that it took is past the first one, whose reply is
        # on its way then.
        if len(worker.calls) <= 1 and not worker.is_innocent:
            worker.kill()

    def _begin_turn(self) -> None:
        self._has_overrun = False

    def _load(self, pid: int | None, reply: Reply) -> None:
        if reply.kind != b"O":
            is_short = len(reply.body) < _NAMES_SOMETHING
            try:
                outcome = _loaded(reply, payloads.loads if is_short else load_harmless)
            except messages.NotNow:
                pass
            else:
                self._finish(pid, reply, outcome)
                return
        part = "the exception" if reply.kind == payloads.RAISED else "the return value"
        entry = reply.entry
        entry.place = self._loader.start(
            entry.job, part, partial(_fetched, reply), partial(self._finish, pid, reply)
        )

    def _finish(self, pid: int | None, reply: Reply, outcome: Outcome) -> None:
        entry = reply.entry
        outcome.started_at = reply.started_at
        outcome.finished_at = reply.finished_at
        outcome.host = self._host
        outcome.pid = pid
        entry.place = None
        self._owner.finished(entry, outcome)

    def _get_ahead(self, worker: WorkerProcess) -> None:
        n = min(int(_STREAM / max(self._pace, 1e-6)), _MOST_AHEAD) if self._pace < _TINY else 0
        while len(worker.calls) <= n:
            entry = self._owner.ahead(worker.calls[0], lambda entry: self._fits(entry, worker))
            if entry is None:
                break
            entry.place = worker
            if not worker.send(entry):
                self._give_back([entry])
                break
        self._watch_starts()

    def _fits(self, entry: Entry, worker: WorkerProcess) -> bool:
        if entry.executor is not self:
            return False
        call: Call = entry.call
        first: Entry = worker.calls[0]
        same_env = (entry.job.env or {}) == (first.job.env or {})
        return same_env and call.script == first.call.script and worker.is_current

    def _on_death(self, worker: WorkerProcess, death: Death) -> None:
        self._workers.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        unstarted = death.unstarted
        if death.guilty is not None:
            self._report_crash(worker, death, death.guilty)
        elif (
            unstarted and not worker.has_answered and self._n_start_failures >= _START_FAILURES - 1
        ):
            self._report_crash(worker, death, unstarted.pop(0))
        elif unstarted and not worker.has_answered:
            self._n_start_failures += 1
        self._give_back(unstarted)

    def _report_crash(self, worker: WorkerProcess, death: Death, entry: Entry) -> None:
        job, output = entry.job, (death.stdout, death.stderr)
        if death.exit_code is None and death.signal is None:
            error: JobFailed | JobCrashed = messages.not_started(job, OSError(death.stderr))
        elif death.is_garbled:
            error = messages.garbled(job, *output, signal=death.signal)
        elif death.in_need and death.signal:
            error = messages.out_of_memory(job, *output, signal=death.signal)
        else:
            error = messages.crashed(job, *output, exit_code=death.exit_code, signal=death.signal)
        entry.place = None
        self._owner.finished(
            entry,
            Outcome(
                Status.CRASHED,
                error=error,
                started_at=death.started_at,
                finished_at=time.time(),
                exit_code=death.exit_code,
                signal=death.signal,
                host=self._host,
                pid=worker.pid,
                stdout=death.stdout,
                stderr=death.stderr,
            ),
        )

    def _report_garbled(self, worker: WorkerProcess, reply: Reply) -> None:
        reply.entry.place = None
        outcome = Outcome(
            Status.CRASHED,
            error=messages.garbled(reply.entry.job),
            started_at=reply.started_at,
            finished_at=reply.finished_at,
            host=self._host,
            pid=worker.pid,
        )
        self._owner.finished(reply.entry, outcome)


_ANY = _Key()


def _loaded(reply: Reply, loads: Callable[..., Any] = payloads.loads) -> Outcome:
    """Return what a reply makes of its job.

    Raises:
        NotNow: It can't be loaded now.
    """
    if reply.kind != b"o":
        return messages.from_reply(reply.entry.job, reply.kind, reply.body, loads=loads)
    try:
        kind, body, files, *streams = pickle.loads(reply.body)  # noqa: S301 - by our worker
    except Exception:  # the call wrote to its worker's socket
        return Outcome(Status.CRASHED, error=messages.garbled(reply.entry.job))
    output = [stream.decode(errors="replace") for stream in streams]
    outcome = messages.from_reply(reply.entry.job, kind, body, files, *output, loads=loads)
    outcome.stdout, outcome.stderr = output
    return outcome


def _fetched(reply: Reply) -> Outcome:
    """Return the same of a reply that may lie in a file, which is removed."""
    if reply.kind != b"O":
        return _loaded(reply)
    kind, path = pickle.loads(reply.body)  # noqa: S301 - by our worker
    try:
        with open(path, "rb") as file:
            reply = reply._replace(kind=kind, body=memoryview(file.read()))
    except OSError as error:
        messages.retry_if_no_descriptor(error)
        raise
    outcome = _loaded(reply)
    os.unlink(path)
    return outcome


def resource_env(grant: Grant) -> dict[str, str]:
    """The variables that tell a job which of each resource it was given."""
    names = {"gpu": "CUDA_VISIBLE_DEVICES"}
    return {
        names.get(name, f"AIOHYPERTUNITY_{name.upper()}"): ",".join(map(str, indices))
        for name, indices in grant.others
    }


def available_cpus() -> int:
    """The CPUs that this process may use, by affinity and by its cgroup's quota; at least 1."""
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:
        n = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        n = min(n, math.ceil(int(quota) / int(period)))
    return max(n, 1)
