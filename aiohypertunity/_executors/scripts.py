"""Scripts and programs, each in a session of its own.

Output goes to files, not pipes: a grandchild that keeps a pipe open can't keep us waiting, and nothing that
a script writes passes through the loop. The files are cut when they grow beyond a bound. Cancel is TERM to the
process group, a grace, then KILL; whatever of the tree outlives its script is killed with it. To look for it
among all processes takes some milliseconds: that is done at once for a script that was stopped, and once a
second for all that have ended by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._host.capture import Capture, log_files, open_log
from .._host.guardian import MARK, kill_tree, start_marked
from .._host.threads import in_thread
from .._model.errors import JobError, ResultLost
from .._model.results import Outcome, Status
from .._rules import messages
from .._wire.payloads import described
from .workers.loading import Loader, Reading
from .workers.pool import resource_env
from .workers.process import exit_status

if TYPE_CHECKING:
    from .._host.rundir import RunDirectory
    from .._model.jobs import Job
    from .._rules.ledger import Entry, Owner
    from .calls import ScriptCall

OUTPUT_VARIABLE = "AIOHYPERTUNITY_OUTPUT_FILE"
"""The environment variable with the path for a script's result."""


_GUARD_AFTER = 0.05
"""Seconds after which the guardian is told of a script's group: to wake it twice for each short script is
not worth it, since the mark does as well where there is a /proc to find it in."""

_SWEEP = 1.0
"""Seconds after which what ended scripts have left behind is looked for."""


class Scripts:
    """Runs scripts.

    Args:
        owner: To whom to report.
        rundir: Where files go.
        kill_grace: Seconds between TERM and KILL.
    """

    def __init__(self, owner: Owner, rundir: RunDirectory, kill_grace: float) -> None:
        self._owner = owner
        self._rundir = rundir
        self._kill_grace = kill_grace
        self._loop = asyncio.get_running_loop()
        self._host = socket.gethostname()
        self._loader = Loader()
        self._runs: set[_Run] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: list[str] = []
        self._sweeping: asyncio.TimerHandle | asyncio.Task[None] | None = None

    def start(self, entry: Entry) -> None:
        """Starts its process."""
        entry.place = run = _Run(entry, self._rundir, self._loader)
        self._runs.add(run)
        # An eager task (Python 3.12) may be over before this returns.
        task = self._loop.create_task(self._run(entry, run))
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        """Forget a task that is over. An interrupt that struck in it was raised by the loop itself."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            context = {"message": "a script's task failed", "exception": error, "task": task}
            self._loop.call_exception_handler(context)

    def stop(self, entry: Entry) -> None:
        """TERM, a grace, KILL."""
        run: _Run | None = entry.place
        if run is not None:
            run.stop(self._loop, self._kill_grace)

    def check_stop(self, entry: Entry) -> None:
        """A script can always be ended."""

    async def aclose(self) -> None:
        """Kills what still runs. What has outlived its script ends with the run's directory."""
        if isinstance(self._sweeping, asyncio.Task):
            await asyncio.wait([self._sweeping])
        if self._sweeping is not None:
            self._sweeping.cancel()
        for run in tuple(self._runs):
            run.stop(self._loop, 0)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, entry: Entry, run: _Run) -> None:
        try:
            outcome = await run.run(self._owner)
        except Exception as error:
            outcome = Outcome(Status.FAILED, error=messages.not_started(entry.job, error))
        finally:
            self._runs.discard(run)
        if not run.stopped:
            self._sweep_soon(run.mark)
        outcome.host = self._host
        entry.place = None
        self._owner.finished(entry, outcome)

    def _sweep_soon(self, mark: str) -> None:
        self._ended.append(mark)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_SWEEP, self._start_sweep)

    def _start_sweep(self) -> None:
        self._sweeping = self._loop.create_task(self._sweep())

    async def _sweep(self) -> None:
        """Ends what has outlived scripts that ended by themselves."""
        marks, self._ended = self._ended, []
        await in_thread(kill_tree, None, *marks)
        self._sweeping = self._loop.call_later(_SWEEP, self._start_sweep) if self._ended else None


class _Run:
    """One attempt at a script.

    Attributes:
        mark: The mark of its process tree.
        stopped: Whether it was asked to end.
    """

    def __init__(self, entry: Entry, rundir: RunDirectory, loader: Loader) -> None:
        self._entry = entry
        self._loader = loader
        self._reading: Reading | None = None
        self._rundir = rundir
        self._call: ScriptCall = entry.call
        self._output = self._call.output or rundir.new_path("output")
        kept = entry.log_path
        paths = log_files(kept) if kept else map(rundir.new_path, ("stdout", "stderr"))
        self._capture = Capture([str(path) for path in paths])
        self._starts = (0, 0) if kept is None else self._capture.sizes()
        self.mark = rundir.new_mark()
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self._is_guarded = False
        self._killer: asyncio.TimerHandle | None = None

    def _guard(self, group: int) -> None:
        self._is_guarded = True
        self._rundir.guard(group)

    def stop(self, loop: asyncio.AbstractEventLoop, grace: float) -> None:
        """Asks its process group to end, and kills it after `grace` seconds."""
        if self._reading is not None:  # it has ended
            if self._entry.stop_status is Status.CANCELLED or not grace:
                self._reading.stop()
            return
        if self._killer is not None:
            self._killer.cancel()
        self.stopped = True
        self._signal(signal.SIGTERM if grace else signal.SIGKILL)
        self._killer = loop.call_later(grace, self._signal, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # A process that was not waited for keeps its number, so this can't hit another's group.
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def run(self, owner: Owner) -> Outcome:
        """Runs it to its end.

        Raises:
            OSError: It can't be started.
        """
        if self._call.output is not None:
            _move_away(self._output)
        started_at = time.time()
        process = self._process = self._start()
        loop = asyncio.get_running_loop()
        guarding = loop.call_later(_GUARD_AFTER, self._guard, process.pid)
        owner.started(self._entry, started_at)
        if self.stopped:  # while it was being started
            self._signal(signal.SIGKILL)
        if self._entry.log_path is None:
            self._capture.watch(loop)
        try:
            status = await exit_status(process)
        finally:
            guarding.cancel()
            self._capture.unwatch()
            if self._killer is not None:
                self._killer.cancel()
        finished_at = time.time()
        await self._end_tree(process.pid)
        outcome = await self._outcome(status)
        outcome.started_at, outcome.finished_at, outcome.pid = started_at, finished_at, process.pid
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as stack:
            stdout, stderr = (
                stack.enter_context(open(path, "ab", opener=open_log))
                for path in self._capture.paths
            )
            return start_marked(
                lambda: subprocess.Popen(
                    self._words(),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=self._env(),
                    cwd=self._call.cwd,
                    start_new_session=True,
                ),
                self.mark,
            )

    def _words(self) -> tuple[str, ...]:
        call = self._call
        return (
            call.words
            if call.output_words is None
            else (*call.words, *call.output_words, self._output)
        )

    def _env(self) -> dict[str, str]:
        grant = self._entry.grant
        given = resource_env(grant) if grant else {}
        return {
            **os.environ,
            **given,
            **(self._entry.job.env or {}),
            OUTPUT_VARIABLE: self._output,
            MARK: self.mark,
        }

    async def _end_tree(self, group: int) -> None:
        """Ends what the script left behind: its group always, and all of its tree if it was stopped."""
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
        if self.stopped:
            await in_thread(kill_tree, group, self.mark)
        if self._is_guarded:
            self._rundir.unguard(group)

    async def _outcome(self, status: int) -> Outcome:
        job = self._entry.job
        stdout, stderr = self._capture.tails(self._starts)
        if self._entry.log_path is None:
            self._capture.remove()
        if status == 0 and not (self.stopped and not os.path.exists(self._output)):
            outcome = await self._result(job)
        elif status > 0 and not self.stopped:
            hint = self._hint() if self._stumbled(stderr) else ""
            error: JobError = messages.exited(job, status, stdout, stderr, hint=hint)
            outcome = Outcome(Status.FAILED, error=error)
        else:
            how = {"signal": -status} if status < 0 else {"exit_code": status}
            error = messages.crashed(job, stdout, stderr, **how)
            outcome = Outcome(Status.CRASHED, error=error)
        outcome.exit_code, outcome.signal = (status, None) if status >= 0 else (None, -status)
        outcome.stdout, outcome.stderr = stdout, stderr
        return outcome

    def _stumbled(self, stderr: str) -> bool:
        """Whether a script says of the words that we appended to its own that it doesn't know them.

        Usage messages and lines of code in tracebacks name the option, too, and say nothing about it.
        """
        return self._call.output_words is not None and any(
            self._output in line
            or ("output_file" in line and not line.lower().startswith((" ", "usage")))
            for line in stderr.splitlines()
        )

    def _hint(self) -> str:
        words = " ".join((*(self._call.output_words or ()), self._output))
        return (
            f"\naiohypertunity appended {words!r}, the path for its result, to its arguments; "
            "meta={'output': 'env'} leaves that out"
        )

    async def _result(self, job: Job[Any]) -> Outcome:
        if not os.path.lexists(self._output):
            return Outcome(Status.SUCCEEDED)
        read = partial(read_result, job, self._output, self._call.output is None)
        loaded: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._reading = self._loader.start(job, "the result file", read, loaded.set_result)
        return await loaded


def read_result(job: Job[Any], path: str, remove: bool) -> Outcome:
    """Return what a script that ended well left as its result: a pickle, or JSON.

    Args:
        job: Whose result it is.
        path: The file. If its name ends in `.json` it can only be JSON.
        remove: Whether the file is ours to remove.

    Raises:
        NotNow: There is no file descriptor left to read it.
    """
    try:
        data = parse_result(Path(path).read_bytes(), path)
    except BaseException as error:  # loading a pickle runs code of the user
        messages.retry_if_no_descriptor(error)
        kind = "JSON" if path.endswith(".json") else "a pickle or JSON"
        lost = ResultLost(
            f"{messages.name(job)} exited with code 0, but its result file {path} can't be read as "
            f"{kind}: {described(error)}",
            job=job,
        )
        outcome = Outcome(Status.FAILED, error=lost)
    else:
        outcome = Outcome(Status.SUCCEEDED, data)
    if remove:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return outcome


def parse_result(content: bytes, path: str) -> object:
    """The value of a result file with this content, as `read_result` reads it."""
    if path.endswith(".json"):
        return json.loads(content)
    if not content.startswith(b"\x80"):  # as every pickle of protocol 2 and later does
        with contextlib.suppress(ValueError):
            return json.loads(content)
    return pickle.loads(content)  # noqa: S301 - out of our own directory, or named by the user


def _move_away(path: str) -> None:
    """Moves what lies at a result's path from before, so that it can't pass for a result."""
    for number in itertools.count(1):
        if not os.path.lexists(path):
            return
        elsewhere = f"{path}.before-{number}"
        if not os.path.lexists(elsewhere):
            os.rename(path, elsewhere)
