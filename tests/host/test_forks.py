"""A forked child of the driver has a copy of its schedulers: it cannot use them, and does not harm them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tasks
from helpers import PATIENCE, driver, script

from aiohypertunity import Job, Scheduler, sync
from aiohypertunity._host import guardian

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

RUN = "00000000deadbeef"
BELONGS = "this scheduler belongs to process"

CHILD_EXITS = """
    import atexit, os, sys
    sys.path.insert(0, {tests!r})
    import tasks
    from aiohypertunity import Job, sync

    def leave():
        if {how!r} == "atexit":
            atexit._run_exitfuncs()
            os._exit(7)
        elif {how!r} == "sys.exit":
            sys.exit(7)
        raise KeyError("of the child")

    with sync.Scheduler(n_parallel=1) as scheduler:
        args = {gate!r}, bytes(2_000_000)
        scheduler.dispatch([Job(tasks.gate, args=args) for _ in range(20)])
        pid = os.fork()
        if not pid:
            leave()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        open({gate!r}, "x").close()
        print(sum(result.ok for result in scheduler.collect()))
"""
"""A driver whose child leaves while jobs run or wait."""


@pytest.mark.parametrize(("how", "code"), [("atexit", "7"), ("sys.exit", "7"), ("raise", "1")])
def test_a_child_that_leaves(tmp_path: Path, how: str, code: str) -> None:
    """All jobs of the parent succeed, and the child leaves `with` at once, with the error of its body."""
    text = CHILD_EXITS.format(
        how=how, gate=str(tmp_path / "gate"), tests=str(Path(__file__).parents[1])
    )
    with driver(text) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert stdout.split() == [code, "20"]
    assert ("of the child" in stderr) == (how == "raise")
    assert "ignored" not in stderr


def in_child(function: Callable[[], object]) -> str:
    """Return what a function returns or raises in a forked child, as text."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(function())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    end = time.monotonic() + PATIENCE / 2
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    with open(ours, "rb") as file:
        return file.read().decode()


def of_twin(scheduler: sync.Scheduler, batch: sync.Batch[Any]) -> dict[str, Callable[[], object]]:
    return {
        "start": scheduler.start,
        "dispatch": lambda: scheduler.dispatch(Job(tasks.pid)),
        "map": lambda: next(scheduler.map(tasks.double, [1])),
        "collect": scheduler.collect,
        "stream": scheduler.stream,
        "events": scheduler.events,
        "statistics": scheduler.statistics,
        "batch.collect": batch.collect,
        "batch.cancel": batch.cancel,
        "cancel": batch[0].cancel,
        "result": batch[0].result,
        "close": scheduler.close,
    }


def of_scheduler(scheduler: Scheduler, batch: Any) -> dict[str, Callable[[], object]]:
    return {
        "start": lambda: scheduler.start().send(None),
        "dispatch": lambda: scheduler.dispatch(Job(tasks.pid)),
        "map": lambda: scheduler.map(tasks.double, [1]),
        "collect": scheduler.collect,
        "events": scheduler.events,
        "batch.collect": batch.collect,
        "batch.cancel": batch.cancel,
        "cancel": batch[0].cancel,
        "aclose": lambda: scheduler.aclose().send(None),
    }


def test_the_twin_in_a_child() -> None:
    """Whatever is asked of it raises at once, and says in which process it can be asked."""
    with sync.Scheduler(n_parallel=1) as scheduler:
        batch = scheduler.dispatch([Job(tasks.forever), Job(tasks.pid)])
        batch[0].wait_started(PATIENCE)
        said = {name: in_child(call) for name, call in of_twin(scheduler, batch).items()}
        with scheduler.dispatch(Job(tasks.pid)) as leaving:
            assert in_child(lambda: leaving.__exit__(None, None, None)) == "None"
        assert in_child(lambda: scheduler.__exit__(None, None, None)) == "None"
        batch[0].cancel()
        assert batch[1].result(PATIENCE).ok
    expected = f"RuntimeError: {BELONGS} {os.getpid()}: "
    assert {name: words[: len(expected)] for name, words in said.items()} == dict.fromkeys(
        said, expected
    )


@pytest.mark.anyio
async def test_the_scheduler_in_a_child() -> None:
    """The same of the async one, which goes on in the parent."""
    async with Scheduler(n_parallel=1) as scheduler:
        batch = scheduler.dispatch([Job(tasks.forever), Job(tasks.pid)])
        await batch[0].wait_started()
        said = {name: in_child(call) for name, call in of_scheduler(scheduler, batch).items()}
        leave = (scheduler.__aexit__, batch.__aexit__)
        ended = [in_child(lambda e=e: e(None, None, None).send(None)) for e in leave]
        batch[0].cancel()
        assert (await asyncio.wait_for(batch[1]._result(), PATIENCE)).ok
    assert all(
        words.startswith(f"RuntimeError: {BELONGS} {os.getpid()}: ") for words in said.values()
    )
    assert ended == ["StopIteration: ", "StopIteration: "]


def test_a_scheduler_of_its_own(tmp_path: Path) -> None:
    """A child can make a scheduler, while its parent's starts scripts in another thread."""
    path = script(tmp_path / "s.sh", "exit 0")

    def run_one() -> int:
        with sync.Scheduler(n_parallel=1) as own:
            own.dispatch([Job(path), Job(tasks.double, args=(2,))])
            return sum(result.ok for result in own.collect())

    with sync.Scheduler(n_parallel=2) as scheduler:
        scheduler.dispatch([Job(path) for _ in range(200)])
        assert [in_child(run_one) for _ in range(3)] == ["2"] * 3
        assert all(result.ok for result in scheduler.collect())


def test_marks_do_not_stay() -> None:
    """Threads that start trees at once, and a child that is forked meanwhile, keep no mark of any."""
    own = guardian._limit(0)

    def start() -> None:
        for number in range(20):
            process = guardian.start_marked(lambda: subprocess.Popen(["true"]), f"{RUN}.{number}.")
            process.wait()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    limits = set()
    while any(thread.is_alive() for thread in threads):
        limits.add(in_child(lambda: guardian._limit(0)))
    for thread in threads:
        thread.join()
    assert limits == {repr(own)}
    assert guardian._limit(0) == own
