"""Workers and their packets: both ends agree, no result goes astray, no state leaks into the next job."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import tasks
from helpers import PATIENCE, until
from hypothesis import given, settings
from hypothesis import strategies as st

from aiohypertunity import Job, JobCrashed, Result, Scheduler, Status
from aiohypertunity._executors.calls import Packer
from aiohypertunity._executors.workers.process import UNKNOWN, WorkerProcess
from aiohypertunity._host.rundir import RunDirectory
from aiohypertunity._rules.ledger import Entry, Pool
from aiohypertunity._rules.messages import from_reply


async def run(scheduler: Scheduler, task: Any, *args: Any, **kwargs: Any) -> Result[Any]:
    with anyio.fail_after(PATIENCE):
        return await scheduler.dispatch(Job(task, args=args, **kwargs))[0]


@pytest.fixture
async def one() -> AsyncIterator[Scheduler]:
    """A scheduler with one slot, so that a job follows another on the same worker."""
    async with Scheduler(n_parallel=1) as started:
        yield started


def numbered(number: int, size: int) -> Any:
    ballast = bytes(size)
    return lambda _: number + 0 * len(ballast)


class Conversation:
    """A worker process, and what became of each call that it was sent."""

    def __init__(self, rundir: RunDirectory) -> None:
        self.packer = Packer(rundir.write)
        self.sent: set[Any] = set()
        self.values: dict[Any, Any] = {}
        env = dict(os.environ)
        self.worker = WorkerProcess(None, env, rundir, lambda _: self.read(), lambda *_: None)

    def send(self, function: Any, *args: Any) -> bool:
        job = Job(function, args=args)
        entry: Any = Entry(job, self.packer.pack(job), None, None, Pool())  # type: ignore[arg-type]
        if self.worker.send(entry):
            self.sent.add(entry)
            return True
        return False

    def read(self) -> None:
        for reply in self.worker.read():
            self.sent.remove(reply.entry)
            if reply.kind != UNKNOWN:
                outcome = from_reply(reply.entry.job, reply.kind, reply.body, [])
                self.values[reply.entry] = outcome.error or outcome.data

    def take_back(self) -> None:
        self.sent -= set(self.worker.take_back())


bursts = st.tuples(
    st.lists(st.integers(0, 70), min_size=1, max_size=40),
    st.sampled_from([0, 30_000, 59_000]),
    st.integers(1, 60),
)
steps = st.one_of(bursts, st.sampled_from(["take back", "pause"]))


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 40_000, 70_000]), min_size=71, max_size=71),
    story=st.lists(steps, min_size=5, max_size=20),
)
def test_both_ends_agree_about_functions(sizes: list[int], story: list[Any]) -> None:
    """Whatever is sent, refused by a full socket or taken back, a call that is run gets its own function."""

    async def main(directory: str) -> None:
        rundir = RunDirectory()
        talk = Conversation(rundir)
        functions = [numbered(number, size) for number, size in enumerate(sizes)]
        for number, step in enumerate(story):
            if step == "take back":
                talk.take_back()
            elif step == "pause":
                talk.send(tasks.gate, f"{directory}/{number}", -1)
                asyncio.get_running_loop().call_later(0.02, Path(f"{directory}/{number}").touch)
            else:
                wanted, size, n = step
                for which in itertools.islice(itertools.cycle(wanted), n):
                    while not talk.send(functions[which], (which, bytes(size))):
                        await asyncio.sleep(0)
        await until(lambda: not talk.sent)
        for entry, value in talk.values.items():
            assert value == (-1 if len(entry.job.args) == 2 else entry.job.args[0][0])
        talk.worker.retire()
        await talk.worker.gone
        rundir.close()

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))


def f(_: bytes) -> str:
    return "f"


def g(_: bytes) -> str:
    return "g"


@pytest.mark.anyio
@pytest.mark.parametrize("size", [50_000, 20_000])
async def test_full_sockets_lose_no_function(one: Scheduler, size: int) -> None:
    """Two functions and arguments that fill the socket: each of thousands of jobs gets its own."""
    jobs = [Job((f, g, g, g)[i % 4], args=(bytes(size),)) for i in range(3000)]
    with anyio.fail_after(PATIENCE):
        results = [await handle for handle in one.dispatch(jobs)]
    assert Counter(str(r.error)[-60:] for r in results if not r.ok) == {}
    assert [r.data for r in results] == ["f", "g", "g", "g"] * 750


def fork_and(how: str, path: str) -> Any:
    """Return "parent"; its child comes back too, as `how` says, once there is a file at `path`."""
    if os.fork():
        return "parent"
    tasks.gate(path)
    if how == "raise":
        raise ValueError("child")
    if how == "exit":
        sys.exit(0)
    return "child"


def worker_socket() -> int:
    """Return the descriptor of the socket through which the worker answers."""
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) and os.readlink(path).startswith("socket:"):
            return int(name)
    raise AssertionError("no socket")


def shut_down() -> None:
    import socket

    socket.socket(fileno=os.dup(worker_socket())).shutdown(socket.SHUT_RDWR)


def close_range() -> None:
    os.closerange(3, 256)


def write_into_it() -> None:
    os.write(worker_socket(), b"hello")


def write_a_reply() -> None:
    os.write(worker_socket(), b"v" + bytes(24) + b"N.")


@pytest.mark.anyio
class TestAnswers:
    """Each goes to the job whose it is."""

    @pytest.mark.parametrize("how", ["return", "raise", "exit"])
    async def test_a_child_that_comes_back(self, one: Scheduler, tmp_path: Path, how: str) -> None:
        """A forked child that returns or raises ends, and answers nobody's call."""
        gate = tmp_path / "gate"
        assert (await run(one, fork_and, how, str(gate))).data == "parent"
        gate.touch()
        batch = one.dispatch([Job(tasks.double, args=(i,)) for i in range(500)])
        assert [(await handle).data for handle in batch] == [2 * i for i in range(500)]

    @pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 1), ("exit", 0)])
    async def test_the_status_of_such_a_child(
        self, one: Scheduler, tmp_path: Path, how: str, status: int
    ) -> None:
        """The job that forked it waits for it as for any child."""

        def fork_and_wait(path: str) -> Any:
            value = fork_and(how, path)
            return os.waitstatus_to_exitcode(os.wait()[1]) if value == "parent" else value

        (tmp_path / "gate").touch()
        assert (await run(one, fork_and_wait, str(tmp_path / "gate"))).data == status

    @pytest.mark.parametrize(
        "task",
        [write_into_it, write_a_reply, shut_down, close_range, tasks.close_socket_for_another],
    )
    async def test_a_job_that_meddles_with_the_socket(
        self, scheduler: Scheduler, task: Any
    ) -> None:
        """That job crashed, and the error says so; its neighbors are well and run once."""
        tiny = [Job(tasks.double, args=(i,)) for i in range(200)]
        batch = scheduler.dispatch([*tiny[:150], bad := Job(task), *tiny[150:]])
        with anyio.fail_after(PATIENCE):
            results = {(await handle).id: await handle for handle in batch}
        assert isinstance(results[bad.id].error, JobCrashed)
        assert "descriptors" in str(results[bad.id].error)
        assert [results[job.id].data for job in tiny] == [2 * i for i in range(200)]
        assert {result.attempts for result in results.values()} == {1}
        assert (await run(scheduler, tasks.double, 4)).data == 8

    async def test_what_an_idle_worker_sends(self, one: Scheduler, tmp_path: Path) -> None:
        """A process that a job left behind writes into the socket: the worker goes, and with it one job at most."""

        def leave_one_behind(path: str) -> int:
            if os.fork():
                return os.getpid()
            tasks.gate(path)
            write_into_it()
            os._exit(0)

        pid = (await run(one, leave_one_behind, str(tmp_path / "gate"))).data
        (tmp_path / "gate").touch()
        with anyio.fail_after(PATIENCE):
            while not (result := await run(one, tasks.pid)).ok or result.data == pid:
                assert result.ok or isinstance(result.error, JobCrashed)
                await asyncio.sleep(0.01)


@pytest.mark.anyio
class TestRestored:
    """The next job on a worker finds everything as in a fresh one."""

    @pytest.mark.parametrize("name", sorted(tasks.LEAKS))
    async def test_nothing_leaks_into_the_next_job(self, one: Scheduler, name: str) -> None:
        """Not timers, handlers, the signal mask, the umask, limits or the recursion limit."""
        fresh = (await run(one, tasks.state)).data
        assert (await run(one, tasks.leak, name)).data == fresh["pid"]
        assert (await run(one, tasks.state)).data == fresh
        assert (await run(one, tasks.burn, 0.3)).stderr == ""
        assert (await run(one, tasks.state)).data == fresh

    async def test_what_cannot_be_restored(self, one: Scheduler) -> None:
        """A worker whose hard limit was lowered, without the right to raise it, answers and retires."""
        fresh = (await run(one, tasks.state)).data
        pid = (await run(one, tasks.lower_a_hard_limit)).data
        assert pid == fresh["pid"]
        after = (await run(one, tasks.state)).data
        assert after["pid"] != pid
        assert {**after, "pid": pid} == fresh

    async def test_many_workers_that_retire(self, scheduler: Scheduler) -> None:
        """Workers that retire after each call are not taken for workers that never start."""
        batch = scheduler.dispatch([Job(tasks.lower_a_hard_limit) for _ in range(12)])
        with anyio.fail_after(PATIENCE):
            results = [await handle for handle in batch]
        assert [r.error for r in results] == [None] * 12
        assert {r.attempts for r in results} == {1}

    async def test_a_handler_that_raises(self, one: Scheduler) -> None:
        """An alarm of a job that has returned hits no other job."""

        def set_alarm() -> None:
            signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

        for _ in range(20):
            assert (await run(one, set_alarm)).ok
            assert (await run(one, tasks.burn, 0.01)).ok

    async def test_what_an_import_sets_lasts(self, one: Scheduler, tmp_path: Path) -> None:
        """A script that raises the recursion limit works for its second job, too."""
        text = "import sys, os\nsys.setrecursionlimit(4321)\n"
        path = tmp_path / "deep_script.py"
        path.write_text(text + "def f(): return os.getpid(), sys.getrecursionlimit()")
        first = (await run(one, f"{path}:f")).data
        assert first[1] == 4321
        assert (await run(one, f"{path}:f")).data == first


class SlowToLoad:
    """A value that takes its time to be loaded, in the driver."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return wait_for_gate, (self.path,)


def wait_for_gate(path: str) -> str:
    Path(f"{path}.loading").touch()
    tasks.gate(path)
    return "loaded"


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["cancel", "leave"])
async def test_a_stop_while_the_result_is_loaded(tmp_path: Path, how: str) -> None:
    """The worker has died meanwhile: nothing is raised, and the job ends once, with its true outcome."""
    gate = tmp_path / "gate"
    async with Scheduler(n_parallel=1) as scheduler:
        (handle,) = scheduler.dispatch(Job(SlowToLoad, args=(str(gate),)))
        await until(Path(f"{gate}.loading").exists)
        worker = next(worker for worker in scheduler._callables._workers if worker.used)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await worker.gone
        if how == "cancel":
            handle.cancel()
        else:
            leaving = asyncio.create_task(scheduler.aclose())
            await asyncio.sleep(0)
        gate.touch()
        result = await handle
        if how == "leave":
            await leaving
    assert (result.status, result.data, result.attempts) == (Status.SUCCEEDED, "loaded", 1)


@pytest.mark.anyio
async def test_a_retired_worker_that_is_stopped_does_not_outlive_the_scheduler() -> None:
    """A worker that was let go and cannot end, being stopped from outside, is killed at the end."""
    async with Scheduler(n_parallel=1) as scheduler:
        first = (await run(scheduler, tasks.pid, env={"NUMBER": "1"})).data
        os.kill(first, signal.SIGSTOP)
        for number in "23":  # the second one of these needs room
            await run(scheduler, tasks.pid, env={"NUMBER": number})
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
