"""Where a job runs, and from where it may be dispatched."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys

import pytest

import aiohypertunity as ht

pytestmark = pytest.mark.anyio


async def only(scheduler: ht.Scheduler, job: ht.Job) -> object:
    return (await scheduler.dispatch(job)[0]).data


async def test_directory_of_dispatch(tmp_path, monkeypatch):
    """A job runs in the directory of its dispatch, also in a worker that was started elsewhere."""
    script = tmp_path / "where.sh"
    script.write_text("pwd")
    async with ht.Scheduler(n_parallel=1) as scheduler:
        before = os.getcwd()
        assert await only(scheduler, ht.Job(task=os.getcwd)) == before
        monkeypatch.chdir(tmp_path)
        batch = scheduler.dispatch([ht.Job(task=os.getcwd), ht.Job(task="where.sh")])
        monkeypatch.chdir("/")
        assert (await batch[0]).data == str(tmp_path)
        assert (await batch[1]).stdout.strip() == str(tmp_path)
        assert await only(scheduler, ht.Job(task=os.getcwd)) == "/"


async def test_directory_that_is_gone(tmp_path):
    """A job whose directory is removed before it runs fails, and no other does."""
    (tmp_path / "gone").mkdir()
    async with ht.Scheduler(n_parallel=1) as scheduler:
        jobs = [ht.Job(task=os.getcwd, cwd=tmp_path / "gone"), ht.Job(task=os.getcwd)]
        (tmp_path / "gone").rmdir()
        first, second = [await handle for handle in scheduler.dispatch(jobs)]
        assert isinstance(first.error, ht.JobFailed)
        assert isinstance(first.error.__cause__, FileNotFoundError)
        assert second.ok


async def test_module_from_a_new_place(tmp_path, monkeypatch):
    """What the driver learned to import after the workers started, they can import as well."""
    (tmp_path / "newly_found.py").write_text("def answer(): return 42\n")
    async with ht.Scheduler(n_parallel=1) as scheduler:
        await only(scheduler, ht.Job(task=os.getcwd))
        monkeypatch.syspath_prepend(str(tmp_path))
        module = importlib.import_module("newly_found")
        try:
            assert await only(scheduler, ht.Job(task=module.answer)) == 42
        finally:
            del sys.modules["newly_found"]


async def test_dispatch_from_a_thread():
    """Any thread may dispatch; its jobs are collected with all others."""
    async with ht.Scheduler(n_parallel=1) as scheduler:
        jobs = [ht.Job(task=abs, args=(-number,)) for number in range(3)]
        batch = await asyncio.to_thread(scheduler.dispatch, jobs)
        assert [handle.job for handle in batch] == jobs
        assert [result.data async for result in scheduler.collect(ordered=True)] == [0, 1, 2]


async def test_refused_from_a_thread():
    """What is refused there is an error in that thread."""
    scheduler = ht.Scheduler(n_parallel=1)
    async with scheduler:
        with pytest.raises(TypeError, match="is no Job"):
            await asyncio.to_thread(scheduler.dispatch, [len])
    with pytest.raises(RuntimeError, match="closed"):
        await asyncio.to_thread(scheduler.dispatch, ht.Job(task=os.getcwd))


def test_inline(tmp_path):
    """`job()` runs a callable in this very process, in its directory and environment."""
    here = os.getcwd()
    job = ht.Job(
        task=lambda: (os.getpid(), os.getcwd(), os.environ["X"]), cwd=tmp_path, env={"X": "1"}
    )
    assert job().data == (os.getpid(), str(tmp_path), "1")
    assert os.getcwd() == here
    assert "X" not in os.environ


def test_inline_failure():
    """A failure is a value there too, with the exception as its cause."""
    result = ht.Job(task=int, args=("x",))()
    assert isinstance(result.error, ht.JobFailed)
    assert isinstance(result.error.__cause__, ValueError)


def test_inline_script(tmp_path):
    """`job()` runs a script as a scheduler would."""
    script = tmp_path / "write.py"
    script.write_text("import json, sys; json.dump(sys.argv[1:-1], open(sys.argv[-1], 'w'))")
    result = ht.Job(task=script, args=("a", 1))()
    assert result.data == ["a", "1"]
    assert result.exit_code == 0
