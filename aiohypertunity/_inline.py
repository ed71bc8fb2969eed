"""`job()`: runs a job here and now, for a debugger or a doctest, and waits for it.

A callable runs in this process and thread, so that a breakpoint in it works; a script as a scheduler would
run it, in a session of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

import cloudpickle

from ._model.jobs import FunctionRef, Job, ScriptRef, SlurmJob
from ._model.results import Outcome, Result, Status
from ._rules import messages
from ._wire import payloads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

T = TypeVar("T")


def run_inline(job: Job[T]) -> Result[T]:
    """Runs a job here and now.

    Raises:
        TypeError: It is a `SlurmJob`, which has to be submitted.
    """
    if isinstance(job, SlurmJob):
        raise TypeError(f"{messages.name(job)} is Slurm's to run: dispatch it with a Scheduler")
    target = job.target
    if isinstance(target, ScriptRef):
        from .sync import Scheduler

        with Scheduler(n_parallel=(job.meta or {}).get("resources", {}).get("cpu", 1)) as scheduler:
            scheduler.dispatch([job])
            return scheduler.collect(n_results=1)[0]
    began = time.time()
    with _surroundings(job):
        outcome = _call(job, target)
    outcome.started_at, outcome.finished_at = began, time.time()
    outcome.host, outcome.pid = socket.gethostname(), os.getpid()
    return Result.of(job, outcome, attempts=1, queued_at=began, finished_at=outcome.finished_at)


def _call(job: Job[Any], target: Callable[..., Any] | FunctionRef) -> Outcome:
    try:
        if isinstance(target, FunctionRef):
            with _as_it_was():
                return _call_named(job, target)
        return Outcome(Status.SUCCEEDED, payloads.call(target, job.args))
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        failed = messages.raised(job, error, traceback.format_exc())
        return Outcome(Status.FAILED, error=failed)


def _call_named(job: Job[Any], target: FunctionRef) -> Outcome:
    blob = payloads.name_function(target.name, path=target.path, module=target.module)
    try:
        function = payloads.load_function(blob)
    except (Exception, SystemExit) as error:
        failed = messages.not_imported(job, error, traceback.format_exc())
        return Outcome(Status.FAILED, error=failed)
    return Outcome(Status.SUCCEEDED, payloads.call(function, job.args))


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Lets a script be loaded afresh each time, and leaves none of it behind."""
    path, modules = sys.path[:], dict(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in tuple(sys.modules.items()):
            if modules.get(name) is not module and _is_beside_a_script(module, path):
                del sys.modules[name]
                with contextlib.suppress(ValueError):
                    cloudpickle.unregister_pickle_by_value(module)


def _is_beside_a_script(module: ModuleType, path: list[str]) -> bool:
    """Whether a module came from a directory that only the script's loading put on the path."""
    file = getattr(module, "__file__", None)
    return file is not None and not any(entry and file.startswith(entry) for entry in path)


@contextlib.contextmanager
def _surroundings(job: Job[Any]) -> Iterator[None]:
    """The job's environment and directory, for as long as it runs."""
    cwd, environ = os.getcwd(), dict(os.environ)
    os.environ.update(job.env or {})
    try:
        if job.cwd is not None:
            os.chdir(job.cwd)
        yield
    finally:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environ)
