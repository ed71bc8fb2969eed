"""Odd input, and odd moments: each once left a job without an end, or gave a wrong answer."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import os
import sys
import threading
import weakref
from pathlib import Path

import pytest
import tasks
from helpers import driver, script, until

import aiohypertunity as ht
from aiohypertunity import Job, Scheduler
from aiohypertunity.sync import Scheduler as SyncScheduler

pytestmark = pytest.mark.anyio


async def run(scheduler: Scheduler, *args, **options) -> ht.Result:
    return await asyncio.wait_for(scheduler.dispatch(Job(*args, **options))[0], 30)


class TestStarting:
    """A worker starts whatever the driver's own state is; or its jobs say why it can't."""

    async def test_path_objects_in_sys_path(self, scheduler, monkeypatch, tmp_path):
        """Python ignores what is no string in sys.path, and so do we."""
        monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
        assert (await run(scheduler, tasks.double, (2,))).data == 4

    async def test_long_command_line(self, scheduler, monkeypatch):
        """`tune.py *.csv` may well have more arguments than one word can hold."""
        monkeypatch.setattr(sys, "argv", ["tune.py", *(f"{n}.csv" for n in range(40_000))])
        assert (await run(scheduler, lambda: len(sys.argv))).data == 40_001

    async def test_module_in_the_way(self, tmp_path, monkeypatch):
        """What lies in the present directory under the name of a module of Python's isn't run."""
        (tmp_path / "json.py").write_text("raise SystemExit('planted')")
        monkeypatch.chdir(tmp_path)
        async with Scheduler(n_parallel=1) as scheduler:
            assert (await run(scheduler, tasks.double, (2,))).data == 4

    def test_no_descriptors(self):
        """Jobs that find no descriptor left fail and say so; the others and the leaving go on."""
        text = """
            import asyncio, resource
            import aiohypertunity as ht
            async def main():
                async with ht.Scheduler(n_parallel=16) as scheduler:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
                    scheduler.dispatch([ht.Job(task=abs, args=(-1,)) for _ in range(32)])
                    results = [result async for result in scheduler.collect(timeout=20)]
                    print(len(results), {type(result.error).__name__ for result in results})
            asyncio.run(main())
        """
        with driver(text) as process:
            out, err = process.communicate(timeout=60)
        assert out.startswith("32 "), err
        assert "JobFailed" in out

    async def test_temporary_directory_is_removed(self, scheduler):
        """A job that can't be started any more fails."""
        import shutil

        assert scheduler._rundir is not None
        shutil.rmtree(scheduler._rundir.path)
        result = await run(scheduler, tasks.double, (2,))
        assert "could not be started" in str(result.error)


class TestExceptions:
    """What a task raises can't hurt its driver."""

    async def test_broken_str(self, scheduler):
        """An exception whose words can't be had is still the cause."""

        class Broken(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no words")

        def fail() -> None:
            raise Broken

        result = await run(scheduler, fail)
        assert type(result.error.__cause__).__name__ == "Broken"

    async def test_frozen(self, scheduler):
        """An exception that lets nobody set an attribute is still the cause."""

        @dataclasses.dataclass(frozen=True)
        class Frozen(Exception):
            pass

        def fail() -> None:
            raise Frozen

        result = await run(scheduler, fail)
        assert isinstance(result.error, ht.JobFailed)
        assert type(result.error.__cause__).__name__ == "Frozen"
        with pytest.raises(ht.JobFailed):
            _ = result.data

    async def test_short_names(self, scheduler):
        """A message names a partial by its function, whatever it carries."""
        result = await run(scheduler, functools.partial(int, "x" * 100_000))
        assert len(str(result.error).partition("raised")[0]) < 100

    async def test_empty_cell(self, scheduler):
        """A closure over something that isn't there yet fails as one job."""

        def outer():
            def inner():
                return later, lock

            lock = threading.Lock()
            return inner
            later = 1

        with pytest.raises(ht.PayloadError, match="lock"):
            _ = (await run(scheduler, outer())).data


class TestScripts:
    """What a script is given, and how it ends."""

    @pytest.mark.parametrize("word", ["a\0b", "\ud800"])
    def test_words(self, word):
        """A word that no command line can hold is refused where the job is made."""
        with pytest.raises(ValueError, match="no command line"):
            Job("/bin/echo", (word,))

    async def test_ends_well_on_term(self, scheduler, tmp_path):
        """A script that is told to end and then exits with 0 has run into its timeout all the same."""
        path = script(tmp_path / "s.sh", "trap 'exit 0' TERM\nsleep 30 & wait")
        result = await run(scheduler, path, timeout=0.5)
        assert isinstance(result.error, ht.JobTimeout)

    async def test_result_that_exits(self, scheduler, tmp_path):
        """A result that ends whoever reads it is lost, and nothing else is."""
        path = script(
            tmp_path / "s.py",
            """
            import pickle, sys
            class Bomb:
                def __reduce__(self): return sys.exit, ("boom",)
            open(sys.argv[-1], "wb").write(pickle.dumps(Bomb()))
            """,
        )
        assert isinstance((await run(scheduler, path, (1,))).error, ht.ResultLost)


class TestSurroundings:
    """What is current at dispatch is what a job finds."""

    async def test_environment(self, scheduler, monkeypatch):
        """A variable that the driver sets between two jobs is there for the second."""
        read = lambda: os.environ.get("HT_TEST")
        assert (await run(scheduler, read)).data is None
        monkeypatch.setenv("HT_TEST", "new")
        assert (await run(scheduler, read)).data == "new"

    async def test_env_is_fixed(self, scheduler):
        """What is done to the dict afterwards changes nothing."""
        env = {"HT_TEST": "before"}
        job = Job(lambda: os.environ["HT_TEST"], env=env)
        env["HT_TEST"] = "after"
        assert (await scheduler.dispatch(job)[0]).data == "before"

    async def test_cwd_of_a_script(self, scheduler, tmp_path):
        """A script is imported in the directory of its job."""
        (tmp_path / "data.txt").write_text("here")
        (tmp_path / "needs.py").write_text("text = open('data.txt').read()\ndef f(): return text")
        assert (await run(scheduler, f"{tmp_path}/needs.py:f", cwd=tmp_path)).data == "here"

    async def test_edited_package(self, scheduler, tmp_path):
        """A module in a package beside a script is seen as it is, too."""
        (tmp_path / "lib").mkdir()
        (tmp_path / "main.py").write_text("from lib.u import value\ndef f(): return value")
        for value in (1, 22):
            (tmp_path / "lib" / "u.py").write_text(f"value = {value}")
            assert (await run(scheduler, f"{tmp_path}/main.py:f")).data == value

    def test_edited_inline(self, tmp_path):
        """`job()` runs the script as it is, and leaves sys.path and sys.modules alone."""
        before = sys.path[:]
        for value in (1, 22):
            (tmp_path / "inline_script.py").write_text(f"def f(): return {value}")
            assert Job(f"{tmp_path}/inline_script.py:f")().data == value
        assert sys.path == before
        assert "inline_script" not in sys.modules

    def test_wrapper(self):
        """A decorator may bring an argument of its own."""

        def wrapped(rng, rate):
            return rng, rate

        @functools.wraps(wrapped)
        def wrapper(rate):
            return wrapped("rng", rate)

        assert Job(wrapper, (0.1,))().data == ("rng", 0.1)

    async def test_no_retries(self):
        """A job may say that it is not to be tried again."""
        async with Scheduler(n_parallel=1, retries=3) as scheduler:
            assert (await run(scheduler, int, ("x",), retries=0)).attempts == 1
            assert (await run(scheduler, int, ("x",))).attempts == 4


class TestCollecting:
    """Nothing is lost between two who collect."""

    async def test_one_job_from_two_threads(self, scheduler):
        """A job that two threads dispatch at once runs once."""
        job = Job(tasks.double, (2,))
        barrier = threading.Barrier(2)

        def dispatch():
            barrier.wait()
            return scheduler.dispatch(job)

        tries = [asyncio.to_thread(dispatch) for _ in range(2)]
        got = await asyncio.gather(*tries, return_exceptions=True)
        assert len([each for each in got if isinstance(each, ValueError)]) == 1
        assert [result.data async for result in scheduler.collect(timeout=20)] == [4]

    def test_paused_stream(self):
        """What a stream has and doesn't deliver, the next collect does; once each."""
        with SyncScheduler(n_parallel=2) as scheduler:
            batch = scheduler.dispatch([Job(tasks.double, (n,)) for n in range(5)])
            for handle in batch:
                handle.result(30)
            stream = scheduler.stream()
            first = next(stream)
            rest = scheduler.collect()
            assert sorted(r.data for r in (first, *rest)) == [0, 2, 4, 6, 8]
            assert list(stream) == []

    def test_stream_alive_at_the_end(self):
        """A program with an unfinished stream ends."""
        text = """
            from aiohypertunity import Job
            from aiohypertunity.sync import Scheduler
            with Scheduler(n_parallel=1) as scheduler:
                scheduler.dispatch([Job(task=abs, args=(-n,)) for n in range(4)])
                stream = scheduler.stream()
                print(next(stream).ok)
        """
        with driver(text) as process:
            out, err = process.communicate(timeout=60)
        assert (out, err) == ("True\n", "")

    async def test_left_map(self, scheduler):
        """Who breaks out of a map leaves no task behind."""
        async for _ in scheduler.map(tasks.double, range(1000), chunk=1):
            break
        gc.collect()
        await until(lambda: not scheduler.statistics().n_pending)
        assert not [t for t in asyncio.all_tasks() if t.get_coro().__qualname__ == "_Source.feed"]

    async def test_cancelled_jobs_are_let_go(self, scheduler, tmp_path):
        """Jobs that are cancelled while they wait don't wait for their turn to be forgotten."""
        gate = tmp_path / "gate"
        blocking = scheduler.dispatch(
            [Job(tasks.gate, args=(str(gate),), id=f"g{n}") for n in (1, 2)]
        )
        batch = scheduler.dispatch(
            [Job(tasks.double, (n,), id=f"x{n}") for n in range(500)], private=True
        )
        jobs = [weakref.ref(handle.job) for handle in batch]
        batch.cancel()
        del batch
        for _ in range(500):  # many are cancelled in slices, between which the loop runs
            await asyncio.sleep(0)
        gc.collect()
        assert not [job for job in jobs if job() is not None]
        gate.touch()
        await blocking[0]

    async def test_large_functions_leave_nothing(self, scheduler):
        """The file of a long function is gone with the jobs that needed it."""
        for _ in range(3):
            data = os.urandom(300_000)
            assert (await run(scheduler, lambda data=data: len(data))).data == 300_000
        assert scheduler._rundir is not None
        gc.collect()
        left = [p for d in scheduler._rundir.buffer_directories for p in Path(d).glob("buffer-*")]
        assert left == []

    async def test_slow_inputs(self, scheduler):
        """Inputs that take their time don't hold the loop for a whole chunk."""
        import time

        turns = 0
        seen = []

        def slowly():
            for n in range(200):
                time.sleep(0.0005)
                seen.append(turns)
                yield n

        async def turn():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        turning = asyncio.get_running_loop().create_task(turn())
        values = [value async for value in scheduler.map(tasks.double, slowly(), chunk=200)]
        turning.cancel()
        assert sorted(values) == [2 * n for n in range(200)]
        assert seen[-1] > seen[0]
