"""Jobs on a real Slurm of one machine, beside a bare `sbatch --wait --array` and those who do the same.

What is compared is what is added to Slurm's own time: each job imports cloudpickle, unpickles a call, calls,
and pickles a result, whoever has it do so.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import cloudpickle

import aiohypertunity as ht

from . import _tasks
from ._harness import Figures, Row, Stopwatch, amount, benchmark, in_turns

sys.path.append(str(Path(__file__).parent.parent / "tests"))

N_SHORT, N_LONG, N_LOOP = 100, 500, 1_000
N_TURNS, N_TURNS_OF_LONG_RUNS = 5, 3
_DIRECTORY = "AIOHYPERTUNITY_BENCH_SLURM"


@contextlib.contextmanager
def a_cluster() -> Iterator[None]:
    """A cluster that Slurm's commands of this process and its children talk to."""
    from slurm_cluster import SlurmCluster

    directory = Path(tempfile.mkdtemp(prefix="bench-slurm-"))
    try:
        with SlurmCluster(directory / "cluster") as cluster:
            os.environ.update(cluster.env)
            os.environ[_DIRECTORY] = str(directory)
            yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# A lambda travels by value, as what is written in a notebook does: so every job imports cloudpickle.
# executorlib names directories after it, which a shell then reads: hence the name.
double = lambda number: 2 * number  # noqa: E731
double.__name__ = "double_by_value"


def new_directory() -> Path:
    """A directory for one run."""
    return Path(tempfile.mkdtemp(dir=os.environ[_DIRECTORY]))


def submitit_executor(**parameters: Any) -> Any:
    """submitit's executor for Slurm; it complains at length where there's no accounting."""
    import submitit

    logging.getLogger("submitit").setLevel(logging.ERROR)
    executor = submitit.AutoExecutor(folder=new_directory(), cluster="slurm")
    executor.update_parameters(timeout_min=5, **parameters)
    return executor


def executorlib_executor() -> Any:
    """executorlib's executor that submits to Slurm; the script that it writes needs a partition's name."""
    import h5py
    import pysqa  # noqa: F401 - executorlib says that it's missing when it's too late
    from executorlib import SlurmClusterExecutor

    del h5py
    warnings.filterwarnings("ignore", module="executorlib")
    return SlurmClusterExecutor(
        cache_directory=str(new_directory()), resource_dict={"cores": 1, "partition": "main"}
    )


def settle() -> None:
    """Waits until Slurm has forgotten the run before: its epilogue isn't to be counted with the next."""
    while subprocess.check_output(["squeue", "-h"]):
        time.sleep(0.2)


def rpcs() -> dict[str, int]:
    """RPCs that slurmctld has served, by name; what this question costs left out."""
    text = subprocess.check_output(["sdiag"], text=True)
    text = text.partition("by message type")[2].partition("by user")[0]
    counts = re.findall(r"^\s*(\w+)\s*\(.*?count:(\d+)", text, re.MULTILINE)
    return {name: int(count) for name, count in counts if not name.startswith("REQUEST_STATS_")}


# --- throughput ----------------------------------------------------------------------------------


@benchmark
def slurm_arrays() -> list[Row]:
    """Callables as arrays: from dispatch to the last result."""
    with a_cluster():
        short = in_turns({"ours": ours_short, "bare": bare_short}, n_turns=N_TURNS, warm_up=True)
        peers = in_turns(
            {"ours": ours_short, "submitit": submitit_short, "executorlib": executorlib_short},
            n_turns=N_TURNS_OF_LONG_RUNS, warm_up=False,
        )  # fmt: skip
        long = in_turns(
            {"ours": ours_long, "bare": bare_long}, n_turns=N_TURNS_OF_LONG_RUNS, warm_up=False
        )
    what = "callables, from dispatch to the last result"
    return [
        short.row(f"{N_SHORT} {what}", "s", "≤", 1.10, unit="s"),
        peers.against("submitit").row(f"{N_SHORT} {what}", "s", "≤", 0.25, unit="s"),
        peers.against("executorlib").row(f"{N_SHORT} {what}", "s", "≤", 1, unit="s"),
        long.row(f"{N_LONG} {what}", "s", "≤", 1.10, unit="s"),
        long.row("requests to slurmctld per job, 500 jobs", "RPCs", "≤", 1.3, of_ratio=False),
        short.against().row("files in the work directory per job", "files", "≤", 3, of_ratio=False),
        long.against().row(
            "event-loop blocking time during 500 jobs: 99th percentile",
            "hold", "<", 5, unit="ms", of_ratio=False,
        ),
    ]  # fmt: skip


def ours_short() -> AsyncIterator[Figures]:
    return _ours(N_SHORT)


def ours_long() -> AsyncIterator[Figures]:
    return _ours(N_LONG)


def bare_short() -> Iterator[Figures]:
    return _bare(N_SHORT)


def bare_long() -> Iterator[Figures]:
    return _bare(N_LONG)


async def _ours(n_jobs: int) -> AsyncIterator[Figures]:
    while True:
        await asyncio.to_thread(settle)
        before = sum(rpcs().values())
        work = new_directory()
        async with ht.Scheduler(slurm=ht.Slurm(workdir=work)) as scheduler:
            holds = Holds()
            most = Most(work)
            with Stopwatch() as watch:
                scheduler.dispatch([ht.SlurmJob(double, (i,)) for i in range(n_jobs)])
                data = [result.data async for result in scheduler.collect()]
            await most.stop()
        assert sorted(data) == [2 * i for i in range(n_jobs)]
        yield {
            "s": watch.seconds,
            "RPCs": (sum(rpcs().values()) - before) / n_jobs,
            "files": most.files / n_jobs,
            "hold": holds.stop(),
        }


class Holds:
    """How long the loop's callbacks take, one by one.

    Less the time that the thread was ready to run and had no CPU: the jobs' nodes are this machine, and
    a search on a cluster doesn't share its driver's CPUs with a hundred jobs that start.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        # Closed with us: the callback that calls `stop` is still to be timed.
        self._schedule = open("/proc/thread-self/schedstat", "rb", buffering=0)  # noqa: SIM115
        self._run = asyncio.Handle._run
        run, times = self._run, self._times

        def timed(handle: asyncio.Handle) -> None:
            since, waited = time.perf_counter(), self._waited()
            run(handle)
            times.append(time.perf_counter() - since - (self._waited() - waited))

        asyncio.Handle._run = timed  # type: ignore[method-assign]

    def _waited(self) -> float:
        """Seconds that this thread has waited for a CPU."""
        return int(os.pread(self._schedule.fileno(), 64, 0).split()[1]) / 1e9

    def stop(self) -> float:
        """The 99th percentile, in milliseconds."""
        asyncio.Handle._run = self._run  # type: ignore[method-assign]
        return 1e3 * statistics.quantiles(self._times, n=100)[-1]


class Most:
    """The most files that were in a spool at a time."""

    def __init__(self, directory: Path) -> None:
        self.files = 0
        self._directory = directory
        self._task = asyncio.ensure_future(self._count())

    async def _count(self) -> None:
        while True:
            found = await asyncio.to_thread(lambda: len(list(self._directory.glob("*/s*/[!c]*"))))
            self.files = max(self.files, found)
            await asyncio.sleep(0.5)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


BARE = """\
import cloudpickle, os, pickle, sys
directory, index = sys.argv[1], int(os.environ["SLURM_ARRAY_TASK_ID"])
with open(f"{directory}/calls", "rb") as file:
    file.seek(8 * index)
    offset, end = (int.from_bytes(file.read(4), "little") for _ in range(2))
    file.seek(offset)
    function, args = pickle.loads(file.read(end - offset))
with open(f"{directory}/result.{index}", "wb") as file:
    file.write(cloudpickle.dumps(function(*args)))
"""


def _bare(n_jobs: int) -> Iterator[Figures]:
    """The floor: Slurm's own time, and Python's."""
    while True:
        settle()
        before = sum(rpcs().values())
        directory = new_directory()
        with Stopwatch() as watch:
            calls = [cloudpickle.dumps((double, (i,))) for i in range(n_jobs)]
            ends = [8 * n_jobs + sum(map(len, calls[:i])) for i in range(n_jobs + 1)]
            spans = b"".join(
                a.to_bytes(4, "little") + b.to_bytes(4, "little")
                for a, b in itertools.pairwise(ends)
            )
            (directory / "calls").write_bytes(spans + b"".join(calls))
            (directory / "run.py").write_text(BARE)
            root = Path(__file__).parent.parent
            script = f"#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} {directory}/run.py {directory}\n"
            command = [
                "sbatch",
                "--wait",
                f"--array=0-{n_jobs - 1}",
                f"--output={directory}/log.%a",
            ]
            subprocess.run(command, input=script, text=True, check=True, stdout=subprocess.DEVNULL)
            data = [pickle.loads((directory / f"result.{i}").read_bytes()) for i in range(n_jobs)]
        assert data == [2 * i for i in range(n_jobs)]
        yield {
            "s": watch.seconds,
            "RPCs": (sum(rpcs().values()) - before) / n_jobs,
        }


def submitit_short() -> Iterator[Figures]:
    """submitit's `map_array`."""
    while True:
        settle()
        executor = submitit_executor(slurm_array_parallelism=N_SHORT)
        with Stopwatch() as watch:
            jobs = executor.map_array(double, range(N_SHORT))
            data = [job.result() for job in jobs]
        assert data == [2 * i for i in range(N_SHORT)]
        yield {"s": watch.seconds}


def executorlib_short() -> Iterator[Figures]:
    """executorlib: an `sbatch` a call."""
    while True:
        settle()
        with Stopwatch() as watch, executorlib_executor() as executor:
            futures = [executor.submit(double, i) for i in range(N_SHORT)]
            data = [future.result() for future in futures]
        assert data == [2 * i for i in range(N_SHORT)]
        yield {"s": watch.seconds}


# --- latency -------------------------------------------------------------------------------------


@benchmark
def slurm_latency() -> list[Row]:
    """From what happens on a node to its being known."""
    with a_cluster():
        ends = in_turns(
            {"ours": ours_ends, "submitit": submitit_ends, "executorlib": executorlib_ends},
            n_turns=N_TURNS_OF_LONG_RUNS,
            warm_up=False,
        )
        kills = in_turns(
            {"ours": ours_killed, "submitit": submitit_killed, "executorlib": executorlib_killed},
            n_turns=N_TURNS_OF_LONG_RUNS,
            warm_up=False,
        )
    return [
        ends.row("from the end of a job to its result", "s", "<", 0.3, unit="s", of_ratio=False),
        kills.row("from `kill -9` of a job's Python to `JobCrashed`", "s", "<", 3, unit="s", of_ratio=False),
    ]  # fmt: skip


async def ours_ends() -> AsyncIterator[Figures]:
    while True:
        async with ht.Scheduler(slurm=ht.Slurm(workdir=new_directory())) as scheduler:
            scheduler.dispatch([ht.SlurmJob(_tasks.end_after, (0.5 + 0.3 * i,)) for i in range(16)])
            lags = [time.time() - result.data async for result in scheduler.collect()]
        yield {"s": statistics.median(lags)}


def submitit_ends() -> Iterator[Figures]:
    import submitit

    while True:
        executor = submitit_executor()
        jobs = executor.map_array(_tasks.end_after, [0.5 + 0.3 * i for i in range(16)])
        lags = [time.time() - job.result() for job in submitit.helpers.as_completed(jobs)]
        yield {"s": statistics.median(lags)}


def executorlib_ends() -> Iterator[Figures]:
    while True:
        with executorlib_executor() as executor:
            calls = [executor.submit(_tasks.end_after, 0.5 + 0.3 * i) for i in range(16)]
            lags = [time.time() - call.result() for call in concurrent.futures.as_completed(calls)]
        yield {"s": statistics.median(lags)}


async def ours_killed() -> AsyncIterator[Figures]:
    while True:
        path = new_directory() / "pid"
        async with ht.Scheduler(slurm=ht.Slurm(workdir=new_directory())) as scheduler:
            [handle] = scheduler.dispatch(
                ht.SlurmJob(_tasks.announce_and_sleep, (str(path), 300.0))
            )
            while not path.exists():
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)
            os.kill(int(path.read_text()), signal.SIGKILL)
            with Stopwatch() as watch:
                result = await handle
        assert isinstance(result.error, ht.JobCrashed)
        yield {"s": watch.seconds}


def submitit_killed() -> Iterator[Figures]:
    while True:
        path = new_directory() / "pid"
        executor = submitit_executor()
        job: Any = executor.submit(_tasks.announce_and_sleep, str(path), 300.0)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(1)
        os.kill(int(path.read_text()), signal.SIGKILL)
        with Stopwatch() as watch:
            assert job.exception() is not None
        yield {"s": watch.seconds}


def executorlib_killed() -> Iterator[Figures]:
    while True:
        path = new_directory() / "pid"
        with executorlib_executor() as executor:
            call = executor.submit(_tasks.announce_and_sleep, str(path), 300.0)
            while not path.exists():
                time.sleep(0.01)
            time.sleep(1)
            os.kill(int(path.read_text()), signal.SIGKILL)
            with Stopwatch() as watch:
                assert call.exception() is not None
        yield {"s": watch.seconds}


# --- calls ---------------------------------------------------------------------------------------


@benchmark
def slurm_calls() -> list[Row]:
    """What a loop of dispatches costs Slurm, and waiting."""
    with a_cluster():
        runs = in_turns({"ours": ours_loop}, n_turns=1, warm_up=False)
        few, many = (
            in_turns({"ours": waiting}, n_turns=1, warm_up=False).medians("looks")["ours"]
            for waiting in (ours_waiting_few, ours_waiting_many)
        )
    return [
        runs.row(f"calls of `sbatch` for {N_LOOP:,} jobs dispatched one by one", "sbatch", "≤", 3, of_ratio=False),
        Row(
            figure="status queries per minute while 10 and 1,000 jobs wait",
            ours=f"{amount(few)}; {amount(many)}",
            against="-",
            ratio=many / few,
            # Two looks: the one before the first and the one after the last may fall in or out.
            must_be="≤ 3 more",
            met=many - few <= 3,
        ),
    ]  # fmt: skip


async def ours_loop() -> AsyncIterator[Figures]:
    while True:
        before = rpcs().get("REQUEST_SUBMIT_BATCH_JOB", 0)
        async with ht.Scheduler(
            slurm=ht.Slurm(workdir=new_directory(), options={"hold": True})
        ) as scheduler:
            for i in range(N_LOOP):
                [handle] = scheduler.dispatch(ht.SlurmJob(_tasks.double, (i,)))
                await asyncio.sleep(0)
            while handle.slurm_id is None:
                await asyncio.sleep(0.05)
        yield {"sbatch": float(rpcs()["REQUEST_SUBMIT_BATCH_JOB"] - before)}


def ours_waiting_few() -> AsyncIterator[Figures]:
    return _ours_waiting(10)


def ours_waiting_many() -> AsyncIterator[Figures]:
    return _ours_waiting(1_000)


async def _ours_waiting(n_jobs: int) -> AsyncIterator[Figures]:
    while True:
        async with ht.Scheduler(
            slurm=ht.Slurm(workdir=new_directory(), options={"hold": True})
        ) as scheduler:
            batch = scheduler.dispatch([ht.SlurmJob(_tasks.double, (i,)) for i in range(n_jobs)])
            while batch[-1].slurm_id is None:
                await asyncio.sleep(0.05)
            await asyncio.sleep(20)
            before = rpcs()["REQUEST_JOB_INFO"]
            await asyncio.sleep(40)
            looks = 1.5 * (rpcs()["REQUEST_JOB_INFO"] - before)
        yield {"looks": looks}
