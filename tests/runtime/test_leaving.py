"""Leaving, however it happens: nothing of ours outlives us."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import tasks
from helpers import (
    PATIENCE,
    directories_of_runs,
    driver,
    is_alive,
    number_in,
    script,
    until,
    wait_until,
)

from aiohypertunity import Job, Scheduler, Status
from aiohypertunity._host import rundir as _rundir
from aiohypertunity._runtime import scheduler as _scheduler

DRIVER = """
    import asyncio, os, signal, sys
    sys.path.insert(0, {tests!r})
    import tasks
    from aiohypertunity import Job, Scheduler

    async def main(where):
        async with Scheduler(n_parallel=5, kill_grace=1) as scheduler:
            scheduler.dispatch([
                Job(tasks.announce, args=(where + "/callable",)),
                Job(tasks.spawn_grandchild, args={{"path": where + "/grandchild", "own_session": True}}),
                Job(where + "/script.sh", args=(where + "/script",)),
                Job(where + "/deaf.sh", args=(where + "/deaf",)),
                Job(tasks.forever),
            ])
            async for result in scheduler.collect():
                pass
    asyncio.run(main(sys.argv[1]))
"""
KINDS = ("callable", "grandchild", "script", "deaf")


def running_driver(tmp_path: Path):  # type: ignore[no-untyped-def]
    script(tmp_path / "script.sh", 'echo $$ > "$1"; sleep 600')
    script(tmp_path / "deaf.sh", "trap '' TERM INT\necho $$ > \"$1\"; while :; do sleep 0.05; done")
    text = DRIVER.format(tests=str(Path(__file__).parents[1]))
    return driver(text, tmp_path)


def pids(tmp_path: Path) -> dict[str, int]:
    return {kind: number_in(tmp_path / kind) for kind in KINDS}


def directories_of(pid: int) -> set[str]:
    """The run directories that a process holds open."""
    files = [os.path.realpath(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {str(Path(file).parent) for file in files if "/aiohypertunity-" in file}


@pytest.mark.parametrize("n_times", [1, 2])
def test_ctrl_c(tmp_path: Path, n_times: int) -> None:
    """Once, or twice: no orphan, no file, no traceback of a worker; just the driver's own."""
    with running_driver(tmp_path) as process:
        jobs = pids(tmp_path)
        directories = directories_of(process.pid)
        assert directories
        for _ in range(n_times):
            os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode in {-signal.SIGINT, 130, 1}
    wait_until(lambda: not any(map(is_alive, jobs.values())), 2)
    wait_until(lambda: not any(map(os.path.exists, directories)), 2)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert "tasks.py" not in stderr
    assert "never retrieved" not in stderr
    assert "was destroyed" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_the_driver_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """By a signal that it can't or doesn't catch: no orphan after two seconds, and no file."""
    with running_driver(tmp_path) as process:
        jobs = pids(tmp_path)
        directories = directories_of(process.pid)
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number
    wait_until(lambda: not any(map(is_alive, jobs.values())), 2)
    wait_until(lambda: not any(map(os.path.exists, directories)), 2)


def test_driver_and_guardian_are_killed(tmp_path: Path) -> None:
    """The next start removes what was left in temporary directories."""
    with running_driver(tmp_path) as process:
        jobs = pids(tmp_path)
        directories = directories_of(process.pid)
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [pid for thread in threads for pid in thread.read_text().split()]
        (guardian,) = [
            int(pid)
            for pid in children
            if b"guardian.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(guardian, signal.SIGSTOP)
        process.kill()
        process.wait(PATIENCE)
        assert all(map(os.path.exists, directories))
        for pid in {*map(int, children), *jobs.values()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    async def start_another() -> None:
        async with Scheduler(n_parallel=1):
            assert not any(map(os.path.exists, directories))

    asyncio.run(start_another())


def test_an_exception_in_the_driver(tmp_path: Path) -> None:
    """Prints as it is, with nothing of ours beside it; and there is no orphan."""
    text = """
        import asyncio, sys
        from aiohypertunity import Job, Scheduler
        async def main():
            async with Scheduler(n_parallel=1) as scheduler:
                handle = scheduler.dispatch(Job("sleep", args=(600,), meta={"output": "env"}))[0]
                await handle.wait_started()
                raise LookupError("mine")
        asyncio.run(main())
        """
    with driver(text) as process:
        _, stderr = process.communicate(timeout=PATIENCE)
    assert stderr.count("Traceback") == 1
    assert stderr.rstrip().endswith("LookupError: mine")


def test_a_loop_that_is_simply_dropped() -> None:
    """A program that never leaves its scheduler ends all the same, and leaves nothing."""
    text = """
        import asyncio, os
        from aiohypertunity import Job, Scheduler
        async def main():
            scheduler = await Scheduler(n_parallel=1).start()
            handle = scheduler.dispatch(Job(os.getpid))[0]
            print((await handle).data)
            print(scheduler._rundir.path)
        asyncio.run(main())
        """
    with driver(text) as process:
        stdout, _ = process.communicate(timeout=PATIENCE)
    pid, directory = stdout.split()
    wait_until(lambda: not is_alive(int(pid)), 2)
    wait_until(lambda: not os.path.exists(directory), 2)


def test_a_loop_that_never_ends(tmp_path: Path) -> None:
    """In `python -m asyncio`, as in a notebook, nobody closes the scheduler or the loop: it ends all the same."""
    text = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import tasks
        from aiohypertunity import Job, Scheduler
        scheduler = await Scheduler(n_parallel=1).start()
        handle = scheduler.dispatch(Job(tasks.announce, args=({str(tmp_path / "pid")!r},)))[0]
        await handle.wait_started()
        """
    done = subprocess.run(
        [sys.executable, "-m", "asyncio"],
        input=textwrap.dedent(text),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "Traceback" not in done.stderr
    pid = number_in(tmp_path / "pid")
    wait_until(lambda: not is_alive(pid), 2)


@pytest.mark.anyio
class TestLeavingTheBlock:
    """`on_exit`, and errors."""

    async def test_cancel_is_the_default(self) -> None:
        """What runs is ended, what waits never runs."""
        with anyio.fail_after(PATIENCE):
            async with Scheduler(n_parallel=1) as scheduler:
                running, waiting = scheduler.dispatch([Job(tasks.forever), Job(tasks.forever)])
                await running.wait_started()
        assert (running.status, waiting.status) == (Status.CANCELLED, Status.CANCELLED)

    async def test_wait(self, tmp_path: Path) -> None:
        """All jobs get to their ends."""
        async with Scheduler(n_parallel=2, on_exit="wait") as scheduler:
            gate = Job(tasks.gate, args=(str(tmp_path / "gate"), 1))
            batch = scheduler.dispatch([gate, *(Job(tasks.double, args=(i,)) for i in range(20))])
            (tmp_path / "gate").touch()
        assert all(handle.status is Status.SUCCEEDED for handle in batch)

    async def test_an_exception_arrives_bare(self) -> None:
        """In no group; and cancels, also where leaving would have waited."""
        with anyio.fail_after(PATIENCE):
            with pytest.raises(LookupError, match="mine"):
                async with Scheduler(n_parallel=1, on_exit="wait") as scheduler:
                    (handle,) = scheduler.dispatch(Job(tasks.forever))
                    await handle.wait_started()
                    raise LookupError("mine")
        assert handle.status is Status.CANCELLED

    async def test_cancelled_while_it_waits(self) -> None:
        """It cancels the jobs, and is done when they are gone."""

        async def leave() -> None:
            async with Scheduler(n_parallel=1, on_exit="wait") as scheduler:
                handles.extend(scheduler.dispatch(Job(tasks.forever)))
                await handles[0].wait_started()

        handles: list = []  # type: ignore[type-arg]
        leaving = asyncio.ensure_future(leave())
        await until(lambda: handles and handles[0].status is Status.RUNNING)
        await asyncio.sleep(0)
        leaving.cancel()
        with anyio.fail_after(PATIENCE), pytest.raises(asyncio.CancelledError):
            await leaving
        assert handles[0].status is Status.CANCELLED

    async def test_in_a_cancelled_scope(self) -> None:
        """As in a service whose task group is cancelled: everything is gone when it's left."""
        with anyio.CancelScope() as scope:
            async with Scheduler(n_parallel=1) as scheduler:
                (handle,) = scheduler.dispatch(Job(tasks.pid))
                pid = (await handle).data
                scope.cancel()
        assert scope.cancelled_caught or handle.done()
        assert not is_alive(pid)

    async def test_a_start_that_is_cancelled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it had begun to make is removed once it's made."""
        made = []
        begun, cancelled = threading.Event(), threading.Event()

        class Noted(_rundir.RunDirectory):
            def __init__(self) -> None:
                begun.set()
                cancelled.wait(PATIENCE)
                super().__init__()
                made.append(self)

        monkeypatch.setattr(_scheduler, "RunDirectory", Noted)
        starting = asyncio.ensure_future(Scheduler(n_parallel=1).start())
        await until(begun.is_set)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        cancelled.set()
        await until(lambda: made and not any(map(os.path.exists, made[0].buffer_directories)))

    async def test_nothing_is_left(self, tmp_path: Path) -> None:
        """No process that carries our mark, no directory, no file."""
        before = directories_of_runs()
        async with Scheduler(n_parallel=2) as scheduler:
            rundir = scheduler._rundir
            assert rundir is not None
            run, mine = rundir.run, set(rundir.buffer_directories)
            assert mine <= directories_of_runs() - before
            [r async for r in scheduler.dispatch([Job(tasks.pid), Job("true")]).collect()]
        assert not mine & directories_of_runs()
        processes = subprocess.run(["ps", "axe"], capture_output=True, text=True, check=True).stdout
        assert f"AIOHYPERTUNITY_TREE={run}" not in processes


@pytest.mark.parametrize("call", ["mkdtemp", "open", "flock", "rename"])
def test_a_directory_in_the_making_is_not_taken_for_stale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    """Whatever another run that starts meanwhile sees of it, after each of its steps."""
    module = {"mkdtemp": tempfile, "flock": fcntl}.get(call, os)
    original = getattr(module, call)
    seen: list[str] = []

    def then_another_starts(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        done = original(*args, **kwargs)
        _rundir._remove_stale(str(tmp_path))
        seen.extend(os.listdir(tmp_path))
        return done

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(_rundir, "_shared_memory", lambda: str(tmp_path))
    monkeypatch.setattr(module, call, then_another_starts)
    run = _rundir.RunDirectory()
    try:
        assert seen == [os.path.basename(run.path)]
        _rundir._remove_stale(str(tmp_path))
        assert os.listdir(tmp_path) == seen
    finally:
        run.close()
    assert os.listdir(tmp_path) == []
