"""Process trees end whole, whatever their members do to get away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import tasks
from helpers import PATIENCE, driver, is_alive, number_in, script, until, wait_until

from aiohypertunity import Job, JobCancelled, JobCrashed, JobTimeout, Scheduler, Status, sync
from aiohypertunity._host import rundir as _rundir
from aiohypertunity._host.guardian import MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="needs the process marks of Linux"),
]

DAEMON = 'exec 0<&- 1>&- 2>&-; cd /; (setsid env -i /bin/sh -c \'echo $$ > "$0"; exec sleep 600\' "$1" &)'
"""Shell commands that start a daemon: another session, an orphan, no environment, no open files."""


def leave_daemon(path: str) -> None:
    subprocess.run(["/bin/sh", "-c", DAEMON, "sh", path], check=True)
    number_in(Path(path))


def leave_daemon_and(path: str, how: str) -> None:
    leave_daemon(path)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if how != "return":
        tasks.forever()


def nested(path: str) -> None:
    with sync.Scheduler(n_parallel=1) as scheduler:
        scheduler.dispatch(Job(leave_daemon_and, args=(path, "hang")))
        scheduler.collect()


def children_of(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def guardian_of(pid: int) -> int:
    def guardians() -> list[int]:
        lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children_of(pid)}
        return [child for child, line in lines.items() if b"guardian.py" in line]

    wait_until(guardians)  # in the middle of its exec a process has no command line
    (guardian,) = guardians()
    return guardian


def directories_of(pid: int) -> set[str]:
    """The directories of runs in which a process has the lock open."""
    files = [os.path.realpath(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return {os.path.dirname(file) for file in files if file.endswith("/lock")}


@pytest.fixture
def pid_file(tmp_path: Path) -> Iterator[Path]:
    """The file to which a daemon writes its pid; the daemon is killed if the test fails."""
    path = tmp_path / "pid"
    yield path
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "error"), [("cancel", JobCancelled), ("timeout", JobTimeout), ("crash", JobCrashed)]
)
async def test_a_daemon_of_a_callable(pid_file: Path, how: str, error: type[Exception]) -> None:
    """A daemon without environment, session and files is gone when the result of its job is there."""
    async with Scheduler(n_parallel=1) as scheduler:
        timeout = 3.0 if how == "timeout" else None
        job = Job(leave_daemon_and, args=(str(pid_file), how), timeout=timeout)
        (handle,) = scheduler.dispatch(job)
        daemon = await asyncio.to_thread(number_in, pid_file)
        if how == "cancel":
            handle.cancel()
        with anyio.fail_after(PATIENCE):
            result = await handle
        assert not is_alive(daemon)
        assert isinstance(result.error, error)


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_a_daemon_of_a_stopped_script(tmp_path: Path, pid_file: Path, how: str) -> None:
    """A daemon that a script starts first of all is gone when the result of the script is there."""
    path = script(tmp_path / "s.sh", f"({DAEMON})\nsleep 600")
    async with Scheduler(n_parallel=1, kill_grace=0.1) as scheduler:
        timeout = 1.0 if how == "timeout" else None
        (handle,) = scheduler.dispatch(Job(path, args=(pid_file,), timeout=timeout))
        daemon = await asyncio.to_thread(number_in, pid_file)
        if how == "cancel":
            handle.cancel()
        with anyio.fail_after(PATIENCE):
            await handle
        assert not is_alive(daemon)


async def test_a_daemon_of_a_script_that_ends(tmp_path: Path, pid_file: Path) -> None:
    """A daemon that a script leaves behind ends soon after it, also while the scheduler goes on."""
    path = script(tmp_path / "s.sh", f"({DAEMON})\nwhile [ ! -s $1 ]; do sleep 0.01; done")
    async with Scheduler(n_parallel=1) as scheduler:
        (handle,) = scheduler.dispatch(Job(path, args=(pid_file,)))
        with anyio.fail_after(PATIENCE):
            assert (await handle).ok
        daemon = number_in(pid_file)
        await until(lambda: not is_alive(daemon), 10)


async def test_a_stopped_guardian(tmp_path: Path) -> None:
    """More orders than its pipe holds do not block the loop."""
    rundir = _rundir.RunDirectory()
    os.kill(guardian_of(os.getpid()), signal.SIGSTOP)
    orders = asyncio.to_thread(lambda: [rundir.guard(10**9) for _ in range(10_000)])
    with anyio.fail_after(PATIENCE):
        assert len(await orders) == 10_000
    rundir.unguard(10**9)
    await asyncio.to_thread(rundir.close)


async def test_a_scheduler_inside_a_job(pid_file: Path) -> None:
    """Cancelling a job ends what the scheduler inside it has started, and removes its directories."""
    async with Scheduler(n_parallel=1) as scheduler:
        directories = directories_of(os.getpid())
        (handle,) = scheduler.dispatch(Job(nested, args=(str(pid_file),)))
        daemon = await asyncio.to_thread(number_in, pid_file)
        (inner,) = (pid for pid in children_of(os.getpid()) if directories_of(pid) - directories)
        inner_directories = directories_of(inner) - directories
        handle.cancel()
        with anyio.fail_after(PATIENCE):
            await handle
        assert not is_alive(daemon)
        assert not any(map(os.path.exists, inner_directories))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_leaving_without_a_guardian(pid_file: Path, number: signal.Signals) -> None:
    """Leaving ends everything and removes all directories though the guardian is dead or stopped."""
    async with Scheduler(n_parallel=1) as scheduler:
        (handle,) = scheduler.dispatch(Job(leave_daemon_and, args=(str(pid_file), "return")))
        await handle
        daemon, guardian = number_in(pid_file), guardian_of(os.getpid())
        directories = directories_of(os.getpid())
        os.kill(guardian, number)
        left_at = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - left_at < 4
    assert not is_alive(daemon)
    assert not is_alive(guardian)
    assert directories
    assert not any(map(os.path.exists, directories))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_driver_is_killed(pid_file: Path, number: signal.Signals) -> None:
    """A daemon that was left by a finished job ends with the driver, however that ends."""
    text = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from test_trees import Job, leave_daemon_and, sync
        with sync.Scheduler(n_parallel=1) as scheduler:
            scheduler.dispatch(Job(leave_daemon_and, args=({str(pid_file)!r}, "return")))
            scheduler.collect()
            print("done", flush=True)
            sys.stdin.read()
    """
    with driver(text) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "done\n"
        process.send_signal(number)
        process.wait(PATIENCE)
    await until(lambda: not is_alive(number_in(pid_file)), 2)


async def test_what_is_not_ours_is_left_alone(tmp_path: Path, pid_file: Path) -> None:
    """A daemon that the driver itself starts outlives jobs, a cancel and the scheduler."""
    path = script(tmp_path / "s.sh", "sleep 600")
    async with Scheduler(n_parallel=2, kill_grace=0.1) as scheduler:
        batch: list[Any] = [*scheduler.dispatch([Job(path), Job(tasks.forever)])]
        leave_daemon(str(pid_file))
        assert MARK not in os.environ
        for handle in batch:
            await handle.wait_started()
            handle.cancel()
            await handle
    assert is_alive(number_in(pid_file))


async def test_what_another_thread_starts_at_the_same_time(tmp_path: Path) -> None:
    """Processes that a thread of the driver starts while scripts start do not end with the scripts."""
    path = script(tmp_path / "s.sh", "sleep 600")
    others: list[subprocess.Popen[bytes]] = []
    is_over = threading.Event()

    def start_others() -> None:
        while not is_over.is_set():
            others.append(subprocess.Popen(["sleep", "600"]))

    starting = asyncio.create_task(asyncio.to_thread(start_others))
    async with Scheduler(n_parallel=50, kill_grace=0.1) as scheduler:
        batch = scheduler.dispatch([Job(path) for _ in range(50)])
        for handle in batch:
            await handle.wait_started()
        is_over.set()
        await starting
        batch.cancel()
        assert {r.status async for r in scheduler.collect()} == {Status.CANCELLED}
    codes = [other.poll() for other in others]
    for other in others:
        with other:
            other.kill()
    assert codes
    assert set(codes) == {None}
