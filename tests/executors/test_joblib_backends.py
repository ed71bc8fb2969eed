"""Callables through joblib backends by name: what works, and what is refused."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import joblib
import pytest
import tasks
from helpers import PATIENCE, until

from aiohypertunity import Job, JobCrashed, JobFailed, PayloadError, Scheduler, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


def thread_name() -> str:
    return threading.current_thread().name


@pytest.fixture(params=["loky", "threading"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    if request.param == "loky":
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)


async def test_results_failures_and_payloads(backend: str) -> None:
    """As with our own workers: values, errors with their causes, what can't be pickled."""
    async with Scheduler(n_parallel=2, backend=backend) as scheduler:
        jobs = [Job(tasks.double, args=(i,)) for i in range(12)]
        bad = [
            Job(tasks.fail, args=("no",)),
            Job(tasks.end_as, args=("sys.exit",)),
            Job(tasks.return_lock),
        ]
        scheduler.dispatch([*jobs, *bad])
        with anyio.fail_after(PATIENCE):
            results = {r.id: r async for r in scheduler.collect()}
        assert [results[job.id].data for job in jobs] == [2 * i for i in range(12)]
        failed, left, unsent = (results[job.id].error for job in bad)
        assert isinstance(failed, JobFailed)
        assert isinstance(failed.__cause__, ValueError)
        assert isinstance(left, JobFailed)
        assert isinstance(unsent, PayloadError)


async def test_results_come_as_they_are_done(backend: str, tmp_path: Path) -> None:
    """A job that waits holds up nobody, and jobs dispatched later don't wait for a group to end."""
    async with Scheduler(n_parallel=2, backend=backend) as scheduler:
        gate = Job(tasks.gate, args=(str(tmp_path / "gate"), "open"))
        scheduler.dispatch([gate, *(Job(tasks.double, args=(i,)) for i in range(4))])
        with anyio.fail_after(PATIENCE):
            got = [r.data async for r in scheduler.collect(n_results=4)]
            assert sorted(got) == [0, 2, 4, 6]
            assert (await scheduler.dispatch(Job(tasks.double, args=(9,)))[0]).data == 18
            (tmp_path / "gate").touch()
            assert [r.data async for r in scheduler.collect(n_results=1, ordered=True)] == ["open"]


async def test_where_it_runs() -> None:
    """loky in another process, threading in this one."""
    for backend, same in (("threading", True), ("loky", False)):
        async with Scheduler(n_parallel=1, backend=backend) as scheduler:
            result = await scheduler.dispatch(Job(tasks.pid))[0]
            assert (result.data == os.getpid()) is same
            assert result.data == result.pid


async def test_functions_and_scripts(backend: str, tmp_path: Path) -> None:
    """Lambdas and maps go through it; scripts are subprocesses as ever."""
    async with Scheduler(n_parallel=2, backend=backend) as scheduler:
        assert (await scheduler.dispatch(Job(lambda: 5))[0]).data == 5
        assert (await scheduler.dispatch(Job("true"))[0]).ok
        with anyio.fail_after(PATIENCE):
            found = [v async for v in scheduler.map(tasks.double, range(20), ordered=True)]
        assert found == [2 * i for i in range(20)]


@pytest.mark.filterwarnings("ignore:.apply_async. is deprecated:DeprecationWarning")  # joblib 1.5's
async def test_dask() -> None:
    """Against a real cluster: the road past one machine."""
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)

    def start() -> Any:
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        )
        return cluster, Client(cluster)

    cluster, client = await asyncio.to_thread(start)
    try:
        async with Scheduler(n_parallel=2, backend="dask") as scheduler:
            batch = scheduler.dispatch(
                [*(Job(tasks.double, args=(i,)) for i in range(10)), Job(tasks.fail, args=("no",))]
            )
            with anyio.fail_after(2 * PATIENCE):
                results = [r async for r in batch.collect(ordered=True)]
        assert [r.data for r in results[:10]] == [2 * i for i in range(10)]
        assert isinstance(results[10].error, JobFailed)
        assert {r.pid for r in results}.isdisjoint({os.getpid()})
    finally:
        await asyncio.to_thread(client.close)
        await asyncio.to_thread(cluster.close)


class TestWhatIsRefused:
    """And said."""

    async def test_multiprocessing(self) -> None:
        """Can't give results one by one: refused by name, where the scheduler is made."""
        with pytest.raises(ValueError, match="'loky'"):
            Scheduler(backend="multiprocessing")

    async def test_what_joblib_does_not_know(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refused where the scheduler is made; what was registered with it isn't."""
        with pytest.raises(ValueError, match="'lokky': joblib knows dask, loky,"):
            Scheduler(backend="lokky")
        monkeypatch.setitem(joblib.parallel.BACKENDS, "mine", object)
        Scheduler(backend="mine")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match="pip install distributed"):
            Scheduler(backend="dask")

    @pytest.mark.parametrize("given", [{"timeout": 1}, {"env": {"A": "1"}}, {"cwd": "/"}])
    async def test_what_it_cannot_keep(self, given: dict[str, Any]) -> None:
        """A timeout, an environment, a directory: refused at dispatch, not ignored."""
        async with Scheduler(n_parallel=1, backend="threading") as scheduler:
            with pytest.raises(ValueError, match=next(iter(given))):
                scheduler.dispatch(Job(tasks.pid, **given))
            assert scheduler.dispatch(Job("true", **given))

    async def test_the_schedulers_timeout(self) -> None:
        """Is refused just so."""
        async with Scheduler(n_parallel=1, backend="threading", timeout=3) as scheduler:
            with pytest.raises(ValueError, match="timeout"):
                scheduler.dispatch(Job(tasks.pid))

    async def test_cancelling_what_runs(self, tmp_path: Path) -> None:
        """Is refused; what waits can be cancelled; leaving waits."""
        async with Scheduler(n_parallel=1, backend="threading") as scheduler:
            running, waiting = scheduler.dispatch(
                [Job(tasks.gate, args=(str(tmp_path / "gate"), 1)), Job(tasks.pid)]
            )
            await until(lambda: running.status is not Status.PENDING or running._entry.grant)
            with pytest.raises(RuntimeError, match="can't stop a running call"):
                running.cancel()
            waiting.cancel()
            assert (await waiting).status is Status.CANCELLED
            assert not running.done()
            threading.Timer(0.1, (tmp_path / "gate").touch).start()
        assert running.status is Status.SUCCEEDED


async def test_a_crash_may_take_neighbours() -> None:
    """But nothing hangs, each is told, and the scheduler goes on."""
    async with Scheduler(n_parallel=2, backend="loky") as scheduler:
        batch = scheduler.dispatch(
            [Job(tasks.end_as, args=("os._exit",)), Job(tasks.double, args=(1,))]
        )
        with anyio.fail_after(2 * PATIENCE):
            first, second = [await handle for handle in batch]
            assert isinstance(first.error, JobCrashed)
            assert second.ok or isinstance(second.error, JobCrashed)
            assert "isolated" in str(first.error)
            assert (await scheduler.dispatch(Job(tasks.double, args=(2,)))[0]).data == 4
