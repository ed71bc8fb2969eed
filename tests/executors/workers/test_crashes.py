"""What bad things get: each harms one job at most, and says what happened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import tasks
from helpers import PATIENCE, is_alive, number_in, ticker, until

from aiohypertunity import (
    Job,
    JobCancelled,
    JobCrashed,
    JobFailed,
    JobTimeout,
    OutOfMemory,
    PayloadError,
    Result,
    Scheduler,
    Status,
)

pytestmark = pytest.mark.anyio


async def run(scheduler: Scheduler, task: Any, *args: Any, **kwargs: Any) -> Result[Any]:
    with anyio.fail_after(PATIENCE):
        return await scheduler.dispatch(Job(task, args=args, **kwargs))[0]


@pytest.fixture
async def one() -> AsyncIterator[Scheduler]:
    """A scheduler with one slot, so that a job follows another on the same worker."""
    async with Scheduler(n_parallel=1) as started:
        yield started


class TestDeadWorkers:
    """One worker dies among many jobs."""

    @pytest.mark.parametrize(
        ("how", "number", "exit_code"),
        [
            ("segfault", signal.SIGSEGV, None),
            ("abort", signal.SIGABRT, None),
            ("SIGKILL", signal.SIGKILL, None),
            ("os._exit", None, 7),
        ],
    )
    async def test_only_the_guilty_job_is_harmed(
        self,
        scheduler: Scheduler,
        tmp_path: Path,
        how: str,
        number: int | None,
        exit_code: int | None,
    ) -> None:
        """It crashed, with signal or exit code; every other job's result arrives and ran once."""

        def note(i: int) -> int:
            with open(tmp_path / str(i), "a") as file:
                file.write("x")
            return i

        jobs = [Job(note, args=(i,)) for i in range(120)]
        bad = [Job(tasks.end_as, args=(how,)) for _ in range(3)]
        scheduler.dispatch([*jobs[:40], bad[0], *jobs[40:60], *bad[1:], *jobs[60:]])
        results = {r.id: r async for r in scheduler.collect(timeout=PATIENCE)}
        for job in bad:
            error = results[job.id].error
            assert type(error) is JobCrashed
            assert (error.signal, error.exit_code) == (number, exit_code)
            assert results[job.id].status is Status.CRASHED
            assert results[job.id].attempts == 1
        assert [results[job.id].data for job in jobs] == list(range(120))
        assert {(tmp_path / str(i)).read_text() for i in range(120)} == {"x"}
        assert {results[job.id].attempts for job in jobs} == {1}

    async def test_a_running_neighbour_is_not_harmed(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """As it would be in a shared pool."""
        neighbour, bad = scheduler.dispatch(
            [
                Job(tasks.gate, args=(str(tmp_path / "gate"), 1)),
                Job(tasks.end_as, args=("segfault",)),
            ]
        )
        assert (await bad).status is Status.CRASHED
        (tmp_path / "gate").touch()
        assert ((await neighbour).data, (await neighbour).attempts) == (1, 1)

    async def test_last_words(self, scheduler: Scheduler) -> None:
        """The error has the last lines of its output; a segfault's traceback is among them."""

        def speak() -> None:
            print("loading")
            tasks.end_as("segfault")

        result = await run(scheduler, speak)
        assert "loading" in str(result.error)
        assert "SIGSEGV (11)" in str(result.error)
        assert "Segmentation fault" in result.stderr
        assert result.stdout == "loading\n"

    async def test_last_words_before_a_segfault(self, scheduler: Scheduler) -> None:
        """Are the job's own, and where in it that was; no frame of ours crowds them out."""

        def crash() -> None:
            print("\n".join(f"line {i}" for i in range(10)), file=sys.stderr)
            tasks.end_as("segfault")

        error = str((await run(scheduler, crash)).error)
        assert all(f"    line {i}\n" in error for i in range(10))
        assert "Segmentation fault" in error
        assert "in end_as" in error
        assert "workers/child.py" not in error

    async def test_somebody_kills_an_idle_worker(self, one: Scheduler) -> None:
        """Nobody notices."""
        os.kill((await run(one, tasks.pid)).data, signal.SIGKILL)
        batch = one.dispatch([Job(tasks.double, args=(i,)) for i in range(20)])
        assert [r.data async for r in batch.collect(ordered=True)] == [2 * i for i in range(20)]

    async def test_workers_that_never_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A machine on which workers die at birth gives errors, not a hang."""
        (tmp_path / "sitecustomize.py").write_text("import os; os._exit(5)")
        async with Scheduler(n_parallel=1) as scheduler:
            result = await run(scheduler, tasks.pid, env={"PYTHONPATH": str(tmp_path)})
            assert isinstance(result.error, JobCrashed)
            assert result.error.exit_code == 5
            assert (await run(scheduler, tasks.pid)).ok


@pytest.fixture
def cgroup() -> Iterator[str]:
    """A memory cgroup of 64 MiB."""
    path = Path("/sys/fs/cgroup/memory") / f"test-{os.getpid()}"
    limit, swap = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    if not path.parent.is_dir():
        path = Path("/sys/fs/cgroup") / f"test-{os.getpid()}"
        limit, swap = "memory.max", "memory.swap.max"
    try:
        path.mkdir()
        (path / limit).write_text(str(64 << 20))
        with contextlib.suppress(OSError):
            (path / swap).write_text("0" if limit == "memory.max" else str(64 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield str(path)
    end = PATIENCE
    while end > 0 and (path / "cgroup.procs").read_text():
        end -= 0.01
        subprocess.run(["sleep", "0.01"], check=True)
    path.rmdir()


async def test_the_kernel_kills_a_worker_for_memory(scheduler: Scheduler, cgroup: str) -> None:
    """The job that hoarded is told so; the others' results arrive."""
    bad, *others = scheduler.dispatch(
        [
            Job(tasks.join_cgroup_and, args=(tasks.fill_memory, cgroup)),
            *(Job(tasks.double, args=(i,)) for i in range(20)),
        ]
    )
    with anyio.fail_after(PATIENCE):
        error = (await bad).error
        assert [(await handle).data for handle in others] == [2 * i for i in range(20)]
    if error is not None and "No space" in str(error):
        pytest.skip("a process can't join the cgroup here")
    assert isinstance(error, JobCrashed)
    assert error.signal == signal.SIGKILL
    if "oom_kill " in Path("/proc/vmstat").read_text():
        assert isinstance(error, OutOfMemory)
        assert "run fewer at a time" in str(error)


class TestUnpicklable:
    """A call, a result or an exception that can't be pickled or unpickled."""

    @pytest.mark.parametrize(
        ("task", "args", "part", "attempts"),
        [
            (tasks.double, ({},), None, 1),  # a control: this one only fails
            (tasks.double, ({"a": [1, (i for i in ())]},), "argument[0]['a'][1] (generator)", 0),
            (tasks.double, (tasks.Unloadable(),), "the arguments", 1),
            (tasks.return_lock, (), "the return value['lock'] (lock)", 1),
            (tasks.return_unloadable, (), "the return value", 1),
            (tasks.raise_lock, (), "the exception (ValueError)", 1),
            (tasks.raise_awkward, (), "the exception", 1),
        ],
    )
    async def test_it_is_that_jobs_error(
        self, scheduler: Scheduler, task: Any, args: Any, part: str | None, attempts: int
    ) -> None:
        """Naming the part; its neighbours in the same dispatch are well."""
        jobs = [Job(tasks.double, args=(1,)), Job(task, args=args), Job(tasks.double, args=(2,))]
        batch = scheduler.dispatch(jobs)
        with anyio.fail_after(PATIENCE):
            first, result, last = [await handle for handle in batch]
        assert (first.data, last.data) == (2, 4)
        if part is None:
            assert isinstance(result.error, JobFailed)
        else:
            assert isinstance(result.error, PayloadError)
            assert result.error.part == part
            assert part in str(result.error)
        assert result.attempts == attempts

    @pytest.mark.parametrize(
        ("task", "said"),
        [
            (tasks.raise_awkward, "it was Awkward: awkward"),
            (tasks.raise_lock, "it was ValueError: <"),
        ],
    )
    async def test_what_was_raised_is_told_all_the_same(
        self, scheduler: Scheduler, task: Any, said: str
    ) -> None:
        """In the words of an exception that doesn't come back, and with its traceback."""
        error = (await run(scheduler, task)).error
        assert said in str(error)
        assert isinstance(error, PayloadError)
        assert f"in {task.__name__}" in str(error.__cause__)

    async def test_a_function_that_cannot_be_pickled(self, scheduler: Scheduler) -> None:
        """The variable that it drags along is named."""
        stream = (i for i in ())
        result = await run(scheduler, lambda: next(stream))
        assert isinstance(result.error, PayloadError)
        assert result.error.part == "the function, its variable 'stream' (generator)"

    async def test_a_result_whose_reading_wants_us_to_exit(self, scheduler: Scheduler) -> None:
        """Doesn't end the program that reads it: it may import a script that has no main guard."""
        result = await run(scheduler, tasks.return_unloadable, SystemExit)
        assert isinstance(result.error, PayloadError)
        assert (await run(scheduler, tasks.pid)).ok

    async def test_arguments_that_kill_who_reads_them(self, scheduler: Scheduler) -> None:
        """Are that job's crash: it had been taken before anything of it was read."""
        bad, *others = scheduler.dispatch(
            [
                Job(tasks.double, args=(tasks.DiesUnpickled(),)),
                *(Job(tasks.double, args=(i,)) for i in range(9)),
            ]
        )
        with anyio.fail_after(PATIENCE):
            assert (await bad).status is Status.CRASHED
            assert (await bad).exit_code == 11
            assert [(await handle).data for handle in others] == [2 * i for i in range(9)]


@pytest.mark.parametrize("how", ["sys.exit", "KeyboardInterrupt"])
async def test_exits_raised_inside_a_job(one: Scheduler, how: str) -> None:
    """That job failed; nothing else, not even its worker."""
    before = (await run(one, tasks.pid)).data
    result = await run(one, tasks.end_as, how)
    assert isinstance(result.error, JobFailed)
    assert type(result.error.__cause__) in (SystemExit, KeyboardInterrupt)
    assert not str(result.error).endswith(": ")
    assert "\n\n\n" not in "".join(traceback.format_exception(result.error))
    assert (await run(one, tasks.pid)).data == before


class TestHangs:
    """A job that never ends, and what it has started."""

    async def test_a_timeout_ends_it_with_its_last_words(self, scheduler: Scheduler) -> None:
        """`JobTimeout`, which is a TimeoutError, with the last output."""

        def speak_and_hang() -> None:
            print("still here", flush=True)
            tasks.forever()

        result = await run(scheduler, speak_and_hang, timeout=0.5)
        assert isinstance(result.error, JobTimeout)
        assert isinstance(result.error, TimeoutError)
        assert "0.5 s" in str(result.error)
        assert "still here" in str(result.error)
        assert result.status is Status.TIMED_OUT

    async def test_a_job_that_ignores_signals(self, scheduler: Scheduler) -> None:
        """Is ended all the same."""

        def deaf() -> None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            tasks.forever()

        assert isinstance((await run(scheduler, deaf, timeout=0.3)).error, JobTimeout)

    @pytest.mark.parametrize("own_session", [False, True])
    @pytest.mark.parametrize("how", ["timeout", "cancel"])
    async def test_grandchildren_go_with_it(
        self, scheduler: Scheduler, tmp_path: Path, own_session: bool, how: str
    ) -> None:
        """Those too that made a session of their own: gone when the result is there."""
        task = lambda: tasks.spawn_grandchild(str(tmp_path / "pid"), own_session=own_session)  # noqa: E731
        (handle,) = scheduler.dispatch(Job(task, timeout=1.0 if how == "timeout" else None))
        grandchild = await asyncio.to_thread(number_in, tmp_path / "pid")
        assert is_alive(grandchild)
        if how == "cancel":
            handle.cancel()
        with anyio.fail_after(PATIENCE):
            result = await handle
        assert isinstance(result.error, JobTimeout if how == "timeout" else JobCancelled)
        assert not is_alive(grandchild)
        assert result.pid is not None
        assert not is_alive(result.pid)

    async def test_the_next_job_runs_in_its_place(self, one: Scheduler) -> None:
        """On another worker."""
        running, waiting = one.dispatch([Job(tasks.forever), Job(tasks.pid)])
        await running.wait_started()
        running.cancel()
        assert (await waiting).data != (await running).pid

    async def test_cancelling_what_was_just_dispatched(self, scheduler: Scheduler) -> None:
        """In whatever state it is: while its worker starts, while it starts, while it ends."""
        for turns in range(60):
            (handle,) = scheduler.dispatch(Job(tasks.double, args=(1,)))
            for _ in range(turns // 3):
                await asyncio.sleep(0)
            handle.cancel()
            with anyio.fail_after(PATIENCE):
                assert (await handle).status in {Status.CANCELLED, Status.SUCCEEDED}
        assert scheduler.statistics().n_running == 0
        assert (await run(scheduler, tasks.double, 1)).data == 2


class TestWhatAJobLeavesBehind:
    """The next job on that worker starts clean."""

    async def test_directory_environment_handlers_alarm(
        self, one: Scheduler, tmp_path: Path
    ) -> None:
        """All as in a fresh worker."""
        fresh = (await run(one, tasks.surroundings)).data
        wrecked = (await run(one, tasks.wreck_surroundings, str(tmp_path))).data
        after = (await run(one, tasks.surroundings)).data
        assert after["pid"] == wrecked
        assert after == fresh

    async def test_after_a_failure_too(self, one: Scheduler, tmp_path: Path) -> None:
        """Not only after a success."""

        def wreck_and_fail() -> None:
            tasks.wreck_surroundings(str(tmp_path))
            raise ValueError

        fresh = (await run(one, tasks.surroundings)).data
        assert not (await run(one, wreck_and_fail)).ok
        assert (await run(one, tasks.surroundings)).data == fresh

    async def test_a_directory_that_is_removed_under_it(
        self, one: Scheduler, tmp_path: Path
    ) -> None:
        """The next job isn't left in nowhere."""

        def enter_and_remove(path: str) -> None:
            os.mkdir(path)
            os.chdir(path)
            os.rmdir(path)

        assert (await run(one, enter_and_remove, str(tmp_path / "gone"))).ok
        assert (await run(one, os.getcwd)).data == os.getcwd()

    async def test_an_endless_thread(self, one: Scheduler) -> None:
        """Doesn't keep the worker from the next job, nor the scheduler from leaving."""
        with anyio.fail_after(PATIENCE):
            pid = (await run(one, tasks.start_endless_thread)).data
            assert (await run(one, tasks.pid)).data == pid
            await one.aclose()
        assert not is_alive(pid)


@pytest.mark.parametrize(
    ("task", "value"),
    [
        (tasks.start_process, 42),
        (tasks.start_pool, [2, 4, 6]),
        (tasks.start_executor, [2, 4, 6]),
        (tasks.start_joblib, [2, 4, 6]),
    ],
)
async def test_jobs_that_start_processes(one: Scheduler, task: Any, value: Any) -> None:
    """A Process, a Pool, a ProcessPoolExecutor, a joblib.Parallel: work, and disturb nobody."""
    assert (await run(one, task)).data == value
    assert (await run(one, task)).data == value
    assert (await run(one, tasks.double, 2)).data == 4


async def test_processes_that_a_job_leaves_running_go_with_the_scheduler() -> None:
    """loky keeps its workers for the next call; they don't outlive us."""
    async with Scheduler(n_parallel=1) as scheduler:
        pid = (await run(scheduler, tasks.start_joblib_and_leave_it)).data
        threads = Path(f"/proc/{pid}/task").glob("*/children")
        children = [child for thread in threads for child in thread.read_text().split()]
        assert children
    await until(lambda: not any(is_alive(int(child)) for child in children), 2)


class TestFullPipes:
    """A write to a worker whose pipe is full doesn't hold the loop."""

    async def test_many_long_calls_behind_a_long_job(self, tmp_path: Path) -> None:
        """Tiny jobs make workers be given calls ahead; then long payloads queue up behind a long job."""
        async with Scheduler(n_parallel=1) as scheduler:
            tiny = scheduler.dispatch([Job(tasks.double, args=(i,)) for i in range(300)])
            await tiny[-1]
            text = "x" * 50_000
            jobs = [Job(len, args=(text,)) for _ in range(200)]
            async with ticker() as holds:
                gate = Job(tasks.gate, args=(str(tmp_path / "gate"),))
                batch = scheduler.dispatch([*jobs[:20], gate, *jobs[20:]])
                await batch[20].wait_started()
                (tmp_path / "gate").touch()
                with anyio.fail_after(PATIENCE):
                    assert [r.data async for r in batch.collect()].count(50_000) == 200
            assert max(holds) < 1


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of 4 MiB, and no shared memory beside it."""
    (disk := tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk: {mounted.stderr.decode()}")
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    monkeypatch.setattr("aiohypertunity._host.rundir._SHARED_MEMORY", str(disk))
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


class TestFullDisk:
    """A clear error, and the scheduler lives."""

    async def test_arguments_values_and_output(self, full_disk: Path) -> None:
        """Whatever doesn't fit is that job's error, with what to do about it."""
        async with Scheduler(n_parallel=1) as scheduler:
            large = np.zeros(1 << 20)
            for result in (
                await run(scheduler, np.sum, large),
                await run(scheduler, lambda: np.zeros(1 << 20)),
                await run(scheduler, lambda: "x" * (8 << 20)),
            ):
                assert isinstance(result.error, PayloadError)
                assert "TMPDIR" in str(result.error)
            error = (await run(scheduler, tasks.print_much, 8 << 20)).error
            assert isinstance(error, JobFailed)
            assert "No space left" in str(error)
            assert (await run(scheduler, tasks.double, 2)).data == 4
            used = os.statvfs(full_disk)
            assert used.f_bavail > used.f_blocks / 2

    async def test_nothing_is_left_at_the_start(self, full_disk: Path) -> None:
        """A scheduler says where it needs room, or works without it."""
        with contextlib.suppress(OSError), open(full_disk / "hog", "wb") as hog:
            while True:
                hog.write(b"x" * 4096)
        async with Scheduler(n_parallel=1) as scheduler:
            assert (await run(scheduler, tasks.double, 2)).data == 4
            error = (await run(scheduler, np.sum, np.zeros(1 << 20))).error
            assert "TMPDIR" in str(error)


async def test_an_unwritable_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is an error of `start` that says where a directory is needed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="nowhere") as caught:
        await Scheduler(n_parallel=1).start()
    assert "set TMPDIR" in str(caught.value.__notes__)
