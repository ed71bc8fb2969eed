"""Callables in isolated workers: what works."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
from helpers import PATIENCE, driver, script, until

from aiohypertunity import Job, JobFailed, PayloadError, Result, Scheduler, Status

pytestmark = pytest.mark.anyio

GLOBAL = 1


async def run(scheduler: Scheduler, task: Any, *args: Any, **kwargs: Any) -> Result[Any]:
    return await scheduler.dispatch(Job(task, args=args, **kwargs))[0]


class Counter:
    def __init__(self, start: int) -> None:
        self.start = start

    def up(self, n: int) -> int:
        return self.start + n


def closure(base: int) -> Any:
    return lambda x: base + x


async def wait_and_add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


@pytest.mark.parametrize(
    ("task", "args", "value"),
    [
        (tasks.add, (1, 2), 3),
        (tasks.add, {"a": 1, "b": 5}, 6),
        (lambda x: x * 2, (4,), 8),
        (closure(40), (2,), 42),
        (functools.partial(tasks.add, 5), (), 5),
        (Counter(3).up, (4,), 7),
        (sorted, ([3, 1],), [1, 3]),
        (np.sum, ([1, 2],), 3),
        (wait_and_add, (1, 2), 3),
        ("os.path:join", ("a", "b"), "a/b"),
    ],
)
async def test_callables_of_every_kind(
    scheduler: Scheduler, task: Any, args: Any, value: Any
) -> None:
    """Lambdas, closures, partials, bound methods, builtins, ufuncs, coroutine functions, names."""
    (handle,) = scheduler.dispatch(Job(task, args=args))
    assert (await handle).data == value


async def test_things_from_main() -> None:
    """What a script defines works as it does where it was defined, classes and results included."""
    text = """
        import asyncio, dataclasses
        from aiohypertunity import Job, Scheduler
        @dataclasses.dataclass
        class Sample:
            x: int
        factor = 3
        def scale(sample): return Sample(sample.x * factor)
        async def main():
            async with Scheduler(n_parallel=1) as scheduler:
                scheduler.dispatch(Job(scale, args=(Sample(2),)))
                async for result in scheduler.collect():
                    assert type(result.data) is Sample
                    print(result.data)
        asyncio.run(main())
        """
    with driver(text) as process:
        assert process.communicate(timeout=PATIENCE) == ("Sample(x=6)\n", "")


async def test_a_result_says_where_and_when(scheduler: Scheduler) -> None:
    """Times in order, the worker's pid, the host, one attempt."""
    result = await run(scheduler, tasks.pid)
    assert result.data == result.pid != os.getpid()
    assert result.started_at is not None
    assert result.queued_at <= result.started_at <= result.finished_at
    assert (result.attempts, result.status, result.host) == (
        1,
        Status.SUCCEEDED,
        os.uname().nodename,
    )


async def test_a_failure_carries_its_cause_and_traceback(scheduler: Scheduler) -> None:
    """The exception that was raised, and where."""
    result = await run(scheduler, tasks.fail, "no")
    with pytest.raises(JobFailed, match="raised ValueError: no") as caught:
        _ = result.data
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in fail" in str(caught.value.__cause__.__cause__)
    assert caught.value.job is result.job


class TestWhatAJobWasGiven:
    """Is fixed at dispatch."""

    async def test_arguments(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Small and large ones; changed afterwards, the job sees what was there."""
        small, large = [1], np.zeros(1 << 20)
        gate = tmp_path / "gate"

        def look(path: str, a: Any, b: Any) -> Any:
            tasks.gate(path)
            return a, float(b.sum())

        (handle,) = scheduler.dispatch(Job(look, args=(str(gate), small, large)))
        small.append(2)
        large += 1
        gate.touch()
        assert (await handle).data == ([1], 0.0)

    async def test_globals(self, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a function that travels by value; and the next dispatch sees the new ones."""
        space: dict[str, Any] = {"__name__": "__main__", "GLOBAL": 1}
        exec("def read(): return GLOBAL", space)  # noqa: S102
        (before,) = scheduler.dispatch(Job(space["read"]))
        space["GLOBAL"] = 2
        (after,) = scheduler.dispatch(Job(space["read"]))
        assert ((await before).data, (await after).data) == (1, 2)

    async def test_arrays_can_be_written_to(self, scheduler: Scheduler) -> None:
        """Large ones as small ones; no job sees what another wrote."""

        def increment(array: Any) -> float:
            array += 1
            return float(array[0])

        array = np.zeros(1 << 18)
        batch = scheduler.dispatch([Job(increment, args=(array,)) for _ in range(4)])
        assert [r.data async for r in batch.collect()] == [1.0] * 4
        assert array[0] == 0

    async def test_large_arrays_come_back(self, scheduler: Scheduler) -> None:
        """Whole, and writable."""
        result = await run(scheduler, lambda n: np.arange(n), 1 << 19)
        assert (result.data == np.arange(1 << 19)).all()
        result.data[0] = 5

    async def test_long_arguments_and_values(self, scheduler: Scheduler) -> None:
        """That aren't arrays: just long pickles."""
        text = "x" * (3 << 20)
        assert (await run(scheduler, lambda t: t + "y", text)).data == text + "y"

    async def test_one_array_is_written_once_and_then_gone(self, scheduler: Scheduler) -> None:
        """For any number of jobs one file, which goes with the last of them."""
        rundir = scheduler._rundir
        assert rundir is not None

        def buffers() -> list[str]:
            return [n for d in rundir.buffer_directories for n in os.listdir(d) if "buffer" in n]

        array = np.zeros(1 << 18)
        batch = scheduler.dispatch([Job(np.sum, args=(array,)) for _ in range(20)])
        assert len(buffers()) == 1
        async for _ in batch.collect():
            pass
        del batch
        gc.collect()
        await until(lambda: not buffers())


class TestOutput:
    """Each job's own, at C level too."""

    async def test_streams_are_told_apart(self, scheduler: Scheduler) -> None:
        """From Python, C, descriptors and children; of one job, not of its neighbours."""
        batch = scheduler.dispatch([Job(tasks.print_from_everywhere, args=(w,)) for w in "abc"])
        for word, handle in zip("abc", batch, strict=True):
            result = await handle
            assert sorted(result.stdout.splitlines()) == [
                f"c {word}",
                f"child {word}",
                f"python {word}",
            ]
            assert sorted(result.stderr.splitlines()) == [
                f"descriptor {word}",
                f"python err {word}",
            ]

    async def test_a_flood_is_bounded(self, scheduler: Scheduler) -> None:
        """A result has the last 64 KiB; the disk never much more than what is looked at in between."""
        rundir = scheduler._rundir
        assert rundir is not None
        (handle,) = scheduler.dispatch(Job(tasks.print_much, args=(1 << 30,)))
        most = 0
        while not handle.done():
            sizes = [entry.stat().st_size for entry in os.scandir(rundir.path)]
            most = max(most, sum(sizes))
            await asyncio.sleep(0.01)
        result = await handle
        assert result.ok
        assert result.stdout.endswith("x\nthe end\n")
        assert len(result.stdout) <= 65_536
        assert most < 1 << 29

    async def test_a_job_that_closes_its_streams(self) -> None:
        """Harms only itself: the next job's output is there."""
        async with Scheduler(n_parallel=1) as scheduler:
            first = await run(scheduler, tasks.close_streams)
            result = await run(scheduler, tasks.print_from_everywhere, "later")
            assert first.ok
            assert first.pid == result.pid
            assert len(result.stdout.splitlines()) == 3
            assert len(result.stderr.splitlines()) == 2

    async def test_logs_keep_everything(self, tmp_path: Path) -> None:
        """One directory a job, by its id; an older run's is left alone."""
        for n in range(2):
            async with Scheduler(n_parallel=1, logs=tmp_path / "logs") as scheduler:
                job = Job(tasks.print_much, args=(1 << 20,), id=f"loud/{n}")
                result = await scheduler.dispatch(job.replace(id="loud"))[0]
                assert [r.id async for r in scheduler.collect()] == ["loud"]
            assert result.log_path == tmp_path / "logs" / ("loud" if n == 0 else "loud.1")
            assert (result.log_path / "stdout").stat().st_size > 1 << 20
            assert len(result.stdout) <= 65_536
            del result

    async def test_logs_that_cannot_be(self, tmp_path: Path) -> None:
        """Are refused at the start; else their directory is made, whether there are jobs or not."""
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="logs=.*can't be written to"):
            await Scheduler(n_parallel=1, logs=tmp_path / "file" / "logs").start()
        async with Scheduler(n_parallel=1, logs=tmp_path / "a" / "logs"):
            assert os.listdir(tmp_path / "a" / "logs") == []

    async def test_unwritable_logs(self, tmp_path: Path) -> None:
        """Fail each job with a clear error, however many there are; the scheduler lives."""
        logs = tmp_path / "logs"
        async with Scheduler(n_parallel=2, logs=logs) as scheduler:
            logs.rmdir()
            logs.touch()
            scheduler.dispatch([Job(tasks.pid) for _ in range(3000)])
            errors = [r.error async for r in scheduler.collect()]
        assert len(errors) == 3000
        assert all("no place for its output" in str(error) for error in errors)


class TestSurroundings:
    """Environment and directory are a job's own."""

    async def test_env(self, scheduler: Scheduler) -> None:
        """On top of the present one, for this job alone, and from the start of its process."""
        results = [
            await run(scheduler, tasks.environ, "A", "HOME", env={"A": "1"}),
            await run(scheduler, tasks.environ, "A", "HOME"),
        ]
        assert [r.data for r in results] == [["1", os.environ["HOME"]], [None, os.environ["HOME"]]]

    async def test_env_is_there_before_any_import(self, scheduler: Scheduler) -> None:
        """OMP_NUM_THREADS and the like are read once: a worker is only used for the same ones."""
        first = await run(scheduler, tasks.environ, "OMP_NUM_THREADS", env={"OMP_NUM_THREADS": "7"})
        second = await run(scheduler, tasks.environ, "OMP_NUM_THREADS")
        assert first.data == ["7"]
        assert second.data != ["7"]
        assert first.pid != second.pid

    async def test_cwd(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Of this job alone."""
        assert (await run(scheduler, os.getcwd, cwd=tmp_path)).data == str(tmp_path)
        assert (await run(scheduler, os.getcwd)).data == os.getcwd()

    async def test_a_cwd_that_is_gone(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Is this job's error; the next one runs."""
        (gone := tmp_path / "gone").mkdir()
        job = Job(os.getcwd, cwd=gone)
        gone.rmdir()
        error = (await scheduler.dispatch(job)[0]).error
        assert str(gone) in str(error)
        assert (await run(scheduler, tasks.pid)).ok

    async def test_argv_is_the_drivers(self, scheduler: Scheduler) -> None:
        """So that a script's functions that read it see what they'd see inline."""
        assert (await run(scheduler, lambda: sys.argv)).data == sys.argv


class TestFunctionsInScripts:
    """`script.py:function`."""

    async def test_siblings_can_be_imported(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """And the script is a module of its name, whose classes come back."""
        script(tmp_path / "friend.py", "NAME = 'friend'")
        happy = script(
            tmp_path / "happy.py",
            """
            import dataclasses, friend
            @dataclasses.dataclass
            class Answer:
                name: str
                friend: str
            def ask(): return Answer(__name__, friend.NAME)
            """,
        )
        for spelling in (f"{happy}:ask", f"{happy}::ask"):
            data = (await run(scheduler, spelling)).data
            assert (data.name, data.friend) == ("happy", "friend")
        assert "happy" not in sys.modules

    async def test_two_utils(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Two scripts in two directories with a `utils.py` each: each its own, many times over."""
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            script(tmp_path / name / "utils.py", f"NAME = {name!r}")
            script(tmp_path / name / "main_script.py", "import utils\ndef f(): return utils.NAME")
        jobs = [Job(f"{tmp_path / name}/main_script.py:f") for name in ("one", "two") * 4]
        batch = scheduler.dispatch(jobs)
        assert [(await handle).data for handle in batch] == ["one", "two"] * 4

    @pytest.mark.parametrize("edited", ["main_script.py", "utils.py"])
    async def test_an_edited_script(
        self, scheduler: Scheduler, tmp_path: Path, edited: str
    ) -> None:
        """The next dispatch sees the new text, of the script or of its sibling."""
        script(tmp_path / "utils.py", "X = 1")
        path = script(tmp_path / "main_script.py", "import utils\ndef f(): return utils.X + 0")
        assert (await run(scheduler, f"{path}:f")).data == 1
        texts = {"utils.py": "X = 2", "main_script.py": "import utils\ndef f(): return utils.X + 1"}
        script(tmp_path / edited, texts[edited])
        assert (await run(scheduler, f"{path}:f")).data == 2

    @pytest.mark.parametrize("inline", [False, True])
    @pytest.mark.parametrize(
        ("text", "kind", "words"),
        [
            (
                "import no_such_thing",
                ModuleNotFoundError,
                "importing broken_script.py for job .* raised",
            ),
            ("import sys; sys.exit(3)", SystemExit, r"broken_script.py exited with 3 .*__main__"),
            ("del f", AttributeError, "has no attribute 'f'"),
        ],
    )
    async def test_a_script_that_fails_to_load(
        self, scheduler: Scheduler, tmp_path: Path, text: str, kind: type, words: str, inline: bool
    ) -> None:
        """Is that job's failure, with what was raised for its cause; the scheduler lives."""
        path = script(tmp_path / "broken_script.py", f"def f(): pass\n{text}")
        job = Job(f"{path}:f")
        result = job() if inline else await scheduler.dispatch(job)[0]
        assert isinstance(result.error, JobFailed)
        assert re.search(words, str(result.error))
        assert type(result.error.__cause__) is kind
        if not inline:
            assert "aiohypertunity" not in str(result.error.__cause__.__cause__)
            assert (await run(scheduler, tasks.pid)).ok

    async def test_a_script_without_a_main_guard(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """The error has the last words of the script."""
        text = "import argparse\nargparse.ArgumentParser().parse_args(['--lr=1'])\ndef f(): pass"
        result = await run(scheduler, f"{script(tmp_path / 'no_guard.py', text)}:f")
        assert "unrecognized arguments: --lr=1" in str(result.error)

    async def test_a_script_that_is_gone(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Removed between the making of the job and its dispatch, directory and all."""
        (tmp_path / "d").mkdir()
        path = script(tmp_path / "d" / "gone_script.py", "def f(): pass")
        job = Job(f"{path}:f")
        path.unlink()
        path.parent.rmdir()
        result = await scheduler.dispatch(job)[0]
        assert isinstance(result.error, JobFailed)
        assert "gone_script.py" in str(result.error)


class TestTimeAndRetries:
    """Per job, or the scheduler's."""

    async def test_a_retry_that_helps(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """A crash or a failure is tried again; the result says how often."""
        for how in ("raise", "os._exit"):
            job = Job(tasks.count_then, args=(str(tmp_path / how), how), retries=2)
            result = await scheduler.dispatch(job)[0]
            assert (result.data, result.attempts) == (2, 2)

    async def test_retries_run_out(self, scheduler: Scheduler) -> None:
        """Then the last error is the result."""
        result = await run(scheduler, tasks.fail, "no", retries=2)
        assert (result.status, result.attempts) == (Status.FAILED, 3)

    async def test_a_timeout_is_for_one_attempt(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """And is retried."""
        job = Job(tasks.count_then, args=(str(tmp_path / "n"), "hang"), timeout=0.3, retries=1)
        result = await scheduler.dispatch(job)[0]
        assert (result.data, result.attempts) == (2, 2)

    async def test_what_is_not_retried(self, scheduler: Scheduler) -> None:
        """What can't be pickled won't be better next time; who cancelled doesn't want it again."""
        unsent = await run(scheduler, tasks.return_lock, retries=3)
        assert (unsent.attempts, type(unsent.error)) == (1, PayloadError)
        (handle,) = scheduler.dispatch(Job(tasks.forever, retries=3))
        await handle.wait_started()
        handle.cancel()
        assert ((await handle).status, (await handle).attempts) == (Status.CANCELLED, 1)

    async def test_the_schedulers_defaults(self, tmp_path: Path) -> None:
        """For jobs that don't say."""
        async with Scheduler(n_parallel=1, timeout=0.2, retries=1) as scheduler:
            result = await run(scheduler, tasks.forever)
            assert (result.status, result.attempts) == (Status.TIMED_OUT, 2)
            other = Job(tasks.gate, args=(str(tmp_path / "gate"),), timeout=60)
            (handle,) = scheduler.dispatch(other)
            await handle.wait_started()
            (tmp_path / "gate").touch()
            assert (await handle).ok

    async def test_waiting_does_not_count(self, tmp_path: Path) -> None:
        """A timeout begins with the attempt, not with the dispatch."""
        async with Scheduler(n_parallel=1) as scheduler:
            first, second = scheduler.dispatch(
                [Job(tasks.forever, timeout=0.5), Job(tasks.pid, timeout=0.4)]
            )
            assert (await first).status is Status.TIMED_OUT
            assert (await second).ok


class TestSlots:
    """No more at once than `n_parallel`, and no short job behind a long one."""

    async def test_no_more_at_once_than_slots(self, tmp_path: Path) -> None:
        """Whatever gets ahead."""
        async with Scheduler(n_parallel=2) as scheduler:
            gates = [Job(tasks.gate, args=(str(tmp_path / "gate"),)) for _ in range(5)]
            batch = scheduler.dispatch(gates)
            await batch[0].wait_started()
            await batch[1].wait_started()
            assert scheduler.statistics().n_running == 2
            (tmp_path / "gate").touch()
            assert len([r async for r in batch.collect()]) == 5

    async def test_a_short_job_never_waits_behind_a_long_one(self, tmp_path: Path) -> None:
        """After many tiny ones, with workers that get calls ahead, one long job holds up nobody."""
        async with Scheduler(n_parallel=2) as scheduler:
            tiny = [Job(tasks.double, args=(i,)) for i in range(400)]
            long = Job(tasks.gate, args=(str(tmp_path / "gate"),))
            batch = scheduler.dispatch([*tiny[:200], long, *tiny[200:]])
            for n, handle in enumerate(batch):
                if n != 200:
                    assert (await asyncio.wait_for(handle, PATIENCE)).ok
            assert batch[200].status is Status.RUNNING
            (tmp_path / "gate").touch()

    async def test_negative_numbers_count_from_the_end(self) -> None:
        """As joblib's do; None leaves one CPU."""
        cpus = len(os.sched_getaffinity(0))
        wanted = {None: max(cpus - 1, 1), -1: cpus, -2: max(cpus - 1, 1), -99: 1, 3: 3}
        for given, n in wanted.items():
            assert Scheduler(n_parallel=given).statistics().n_parallel == n

    async def test_a_function_is_pickled_once_a_dispatch(self, scheduler: Scheduler) -> None:
        """Not once a job."""
        pickled = []

        class Function:
            def __call__(self, x: int) -> int:
                return x

            def __reduce__(self) -> Any:
                pickled.append(1)
                return int, ()

        function = Function()
        try:
            scheduler.dispatch([Job(function, args=(i,)) for i in range(50)])
        finally:
            [r async for r in scheduler.collect()]
        assert len(pickled) <= 2  # plain pickle, then cloudpickle

    async def test_more_functions_than_a_worker_keeps(self) -> None:
        """Each call still gets its own."""
        async with Scheduler(n_parallel=1) as scheduler:
            for _ in range(2):
                batch = scheduler.dispatch([Job(closure(n), args=(1,)) for n in range(300)])
                values = [r.data async for r in batch.collect(ordered=True)]
                assert values == [n + 1 for n in range(300)]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_driver_in_a_child_of_multiprocessing(method: str, tmp_path: Path) -> None:
    """It can use functions and classes of its main script, which it knows as `__mp_main__`."""
    text = f"""
        import multiprocessing
        from aiohypertunity import Job, sync

        class Point:
            def __init__(self, x):
                self.x = x

        def point(x):
            return Point(x)

        def drive():
            with sync.Scheduler(n_parallel=1) as scheduler:
                scheduler.dispatch([Job(task=point, args=(3,))])
                result = scheduler.collect(n_results=1)[0]
            assert type(result.data) is Point, result
            assert result.data.x == 3

        if __name__ == "__main__":
            child = multiprocessing.get_context({method!r}).Process(target=drive)
            child.start()
            child.join()
            raise SystemExit(child.exitcode)
        """
    path = script(tmp_path / "main.py", text)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
