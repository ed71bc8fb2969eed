"""The blocking twin."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tasks
from helpers import PATIENCE, driver, is_alive, number_in, wait_until

import aiohypertunity
from aiohypertunity import (
    CollectTimeout,
    Finished,
    Job,
    JobFailed,
    NotEnoughJobs,
    Queued,
    Started,
    Status,
    sync,
)
from aiohypertunity._rules.ledger import Owner
from aiohypertunity.sync import Scheduler

DIFFERENCES = {
    ("Scheduler", "aclose"): "close",
    ("Scheduler", "stream"): "what `async for` over `collect` is there",
    ("Scheduler", "close"): "aclose",
    ("Batch", "stream"): "as the scheduler's",
    ("JobHandle", "result"): "instead of being awaited",
}
"""Names that are in one of the twins alone."""

OTHER_PARAMETERS = {
    ("Scheduler", "collect"): {"ordered": True},
    ("Batch", "collect"): {"ordered": True},
    ("JobHandle", "wait_started"): {"timeout": None},
}
"""Defaults that differ, and parameters that are in the twin alone: a list is in dispatch order, and who
blocks has no other way to stop waiting."""


def public(kind: type) -> dict[str, Any]:
    return {
        name: value
        for base in (object, kind)
        for name, value in vars(base).items()
        if not name.startswith("_")
        and (callable(value) or isinstance(value, property))
        and not (kind is aiohypertunity.Scheduler and name in vars(Owner))  # for its executors
    }


@pytest.mark.parametrize("name", ["Scheduler", "Batch", "JobHandle"])
def test_parity(name: str) -> None:
    """Same names, same parameters, same defaults; the differences are those listed above."""
    theirs, ours = public(getattr(aiohypertunity, name)), public(getattr(sync, name))
    alone = {(name, method) for method in theirs.keys() ^ ours.keys()}
    assert alone == {key for key in DIFFERENCES if key[0] == name}
    for method in theirs.keys() & ours.keys():
        if isinstance(theirs[method], property):
            continue
        wanted, found = (
            {p.name: (p.kind, p.default) for p in inspect.signature(f[method]).parameters.values()}
            for f in (theirs, ours)
        )
        for parameter, default in OTHER_PARAMETERS.get((name, method), {}).items():
            assert found.pop(parameter)[1] == default
            wanted.pop(parameter, None)
        assert found == wanted, method
    assert (
        inspect.signature(getattr(sync, "Scheduler")).parameters.keys()
        == inspect.signature(aiohypertunity.Scheduler).parameters.keys()
    )


def doubles(n: int) -> list[Job[float]]:
    return [Job(tasks.double, args=(i,)) for i in range(n)]


def blocked(tmp_path: Path) -> Job[Any]:
    return Job(tasks.gate, args=(str(tmp_path / "gate"), "gate"))


def test_a_list_in_the_order_of_dispatch(tmp_path: Path) -> None:
    """The ancestor's promise: `zip(samples, results)` is right."""
    with Scheduler(n_parallel=2) as scheduler:
        batch = scheduler.dispatch([blocked(tmp_path), *doubles(20)])
        batch[20].result()
        (tmp_path / "gate").touch()
        results = scheduler.collect(n_results=21, timeout=PATIENCE)
        assert [r.data for r in results] == ["gate", *(2 * i for i in range(20))]
        assert scheduler.collect() == []


def test_a_stream_in_the_order_of_completion(tmp_path: Path) -> None:
    """The first result is there when the first job is over."""
    with Scheduler(n_parallel=2) as scheduler:
        scheduler.dispatch([blocked(tmp_path), *doubles(5)])
        stream = scheduler.stream()
        assert sorted(r.data for r in itertools.islice(stream, 5)) == [0, 2, 4, 6, 8]
        (tmp_path / "gate").touch()
        assert [r.data for r in stream] == ["gate"]


def test_a_stream_that_is_left_loses_nothing() -> None:
    """What it had taken ahead is given back."""
    with Scheduler(n_parallel=1) as scheduler:
        batch = scheduler.dispatch(doubles(10))
        for handle in batch:
            handle.result()
        for result in scheduler.stream():
            assert result.ok
            break
        assert len(scheduler.collect()) == 9


def test_a_timeout_loses_nothing(tmp_path: Path) -> None:
    """Nothing is taken until the list is complete."""
    with Scheduler(n_parallel=2) as scheduler:
        batch = scheduler.dispatch([*doubles(5), blocked(tmp_path)])
        for handle in batch[:5]:
            handle.result()
        for limits in ({"timeout": 0.01}, {"deadline": 0.01}, {"n_results": 6, "timeout": 0.01}):
            with pytest.raises(CollectTimeout) as caught:
                scheduler.collect(**limits)  # type: ignore[arg-type]
            assert caught.value.pending == (batch[5].job,)
        (tmp_path / "gate").touch()
        assert [r.data for r in scheduler.collect()] == [0, 2, 4, 6, 8, "gate"]


def test_more_than_there_are() -> None:
    """`NotEnoughJobs`, and all of them are still there."""
    with Scheduler(n_parallel=1) as scheduler:
        scheduler.dispatch(doubles(3))
        with pytest.raises(NotEnoughJobs):
            scheduler.collect(n_results=4)
        assert [r.data for r in scheduler.collect(n_results=3)] == [0, 2, 4]


def test_failure_is_a_value() -> None:
    """As there."""
    with Scheduler(n_parallel=1) as scheduler:
        scheduler.dispatch(Job(tasks.fail, args=("no",)))
        (result,) = scheduler.collect()
        assert result.status is Status.FAILED
        with pytest.raises(JobFailed, match="no"):
            _ = result.data


def test_handles(tmp_path: Path) -> None:
    """Status, result with a timeout, cancel."""
    with Scheduler(n_parallel=1) as scheduler:
        first, second = scheduler.dispatch([blocked(tmp_path), Job(tasks.forever)])
        first.wait_started()
        assert (first.status, second.status) == (Status.RUNNING, Status.PENDING)
        with pytest.raises(TimeoutError):
            first.result(timeout=0.01)
        with pytest.raises(TimeoutError):
            second.wait_started(timeout=0.01)
        (tmp_path / "gate").touch()
        assert first.result().data == "gate"
        second.wait_started()
        second.cancel()
        assert second.result().status is Status.CANCELLED
        assert second.done()
        assert first.result() in scheduler.collect()


def test_a_job_that_takes_too_long() -> None:
    """Is named, and how it stands is said."""
    with Scheduler(n_parallel=1) as scheduler:
        first, second = scheduler.dispatch([Job(tasks.forever, id="slow"), Job(tasks.forever)])
        first.wait_started()
        with pytest.raises(
            TimeoutError, match=r"^job 'slow' \(forever\) isn't over after 0.01 s: .*running"
        ):
            first.result(timeout=0.01)
        with pytest.raises(TimeoutError, match=r"hasn't started after 0.01 s: it is pending"):
            second.wait_started(timeout=0.01)


def test_batches() -> None:
    """Private ones, and leaving one."""
    with Scheduler(n_parallel=2) as scheduler:
        private = scheduler.dispatch(doubles(3), private=True)
        assert scheduler.collect() == []
        assert [r.data for r in private.collect()] == [0, 2, 4]
        with scheduler.dispatch([Job(tasks.forever), *doubles(2)]) as batch:
            assert sorted(r.data for r in batch.stream(n_results=2)) == [0, 2]
        assert batch[0].status is Status.CANCELLED
        assert scheduler.collect() == []


def test_map() -> None:
    """Of endless inputs, and with an error."""
    with Scheduler(n_parallel=2) as scheduler:
        squares = scheduler.map(tasks.double, itertools.count(), ordered=True)
        assert list(itertools.islice(squares, 100)) == [2 * i for i in range(100)]
        squares.close()  # type: ignore[attr-defined]
        with pytest.raises(JobFailed):
            list(scheduler.map(tasks.fail, ["no"]))


def test_events_and_statistics() -> None:
    """As there; the events end with the scheduler."""
    with Scheduler(n_parallel=1) as scheduler:
        events = scheduler.events()
        scheduler.dispatch(doubles(1))[0].result()
        assert scheduler.statistics().n_succeeded == 1
        first = [next(events) for _ in range(3)]
    assert [type(event) for event in first] == [Queued, Started, Finished]
    assert list(events) == []


def test_after_leaving() -> None:
    """What had finished can be collected, and statistics asked."""
    with Scheduler(n_parallel=1) as scheduler:
        (handle,) = scheduler.dispatch(doubles(1))
        handle.result()
    assert handle.result().data == 0
    assert [r.data for r in scheduler.collect()] == [0]
    assert scheduler.statistics().n_succeeded == 1
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.dispatch(doubles(1))


def test_start_and_close() -> None:
    """Where a `with` can't span; closing twice is harmless, and so is closing what never began."""
    scheduler = Scheduler(n_parallel=1).start()
    assert scheduler.dispatch(doubles(1))[0].result().data == 0
    scheduler.close()
    scheduler.close()
    Scheduler(n_parallel=1).close()


def test_an_exception_arrives_bare() -> None:
    """And cancels."""
    with pytest.raises(LookupError, match="mine"):
        with Scheduler(n_parallel=1, on_exit="wait") as scheduler:
            (handle,) = scheduler.dispatch(Job(tasks.forever))
            handle.wait_started()
            raise LookupError("mine")
    assert handle.status is Status.CANCELLED


def test_threads_share_one() -> None:
    """Any thread may use it; each result goes to one of them."""
    with Scheduler(n_parallel=2) as scheduler, ThreadPoolExecutor(4) as threads:

        def use(k: int) -> list[float]:
            jobs = [Job(tasks.add, args=(100 * k, i)) for i in range(10)]
            return [r.data for r in scheduler.dispatch(jobs, private=True).collect()]

        assert list(threads.map(use, range(4))) == [
            [100 * k + i for i in range(10)] for k in range(4)
        ]


def test_schedulers_in_many_threads() -> None:
    """One in each."""

    def use(k: int) -> float:
        with Scheduler(n_parallel=1) as scheduler:
            scheduler.dispatch(Job(tasks.double, args=(k,)))
            return scheduler.collect()[0].data  # type: ignore[no-any-return]

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(use, range(3))) == [0, 2, 4]
    assert not [t for t in threading.enumerate() if "portal" in t.name.lower()]


def test_under_a_running_loop() -> None:
    """It has a loop of its own."""

    async def main() -> list[float]:
        with Scheduler(n_parallel=1) as scheduler:
            scheduler.dispatch(doubles(3))
            return [r.data for r in scheduler.collect()]

    assert asyncio.run(main()) == [0, 2, 4]


def test_under_trio() -> None:
    """There, too."""
    import trio

    async def main() -> list[float]:
        with Scheduler(n_parallel=1) as scheduler:
            scheduler.dispatch(doubles(3))
            return [r.data for r in scheduler.collect()]

    assert trio.run(main) == [0, 2, 4]


def test_a_plain_script() -> None:
    """With functions of its own, and no main guard needed: workers are no children of multiprocessing."""
    text = """
        from aiohypertunity import Job
        from aiohypertunity.sync import Scheduler
        offset = 40
        def shift(x): return x + offset
        with Scheduler(n_parallel=2) as scheduler:
            scheduler.dispatch([Job(shift, args=(x,)) for x in range(3)])
            print([r.data for r in scheduler.collect()])
        """
    with driver(text) as process:
        assert process.communicate(timeout=PATIENCE) == ("[40, 41, 42]\n", "")


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    """Pressed while `collect` waits, it leaves all results collectable."""
    text = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import tasks
        from aiohypertunity import Job
        from aiohypertunity.sync import Scheduler
        gate = sys.argv[1] + "/gate"
        with Scheduler(n_parallel=2) as scheduler:
            batch = scheduler.dispatch(
                [Job(tasks.gate, args=(gate, "gate")), *(Job(tasks.double, args=(i,)) for i in range(5))])
            for handle in batch[1:]:
                handle.result()
            try:
                print("waiting", flush=True)
                scheduler.collect()
            except KeyboardInterrupt:
                open(gate, "w").close()
                print([r.data for r in scheduler.collect()])
        """
    with driver(text, tmp_path, Path(__file__).parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (stdout, stderr) == ("['gate', 0, 2, 4, 6, 8]\n", "")


def test_ctrl_c_at_any_point_of_a_collect_loses_nothing(tmp_path: Path) -> None:
    """Not even where it has just asked for what it will wait for."""

    def is_interrupted_at(point: int, batch: sync.Batch[Any], gate: Path) -> bool:
        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal point
            if not frame.f_code.co_filename.endswith(("sync.py", "from_thread.py")):
                return None
            point -= event == "line" and not gate.exists()
            if point < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            batch.collect()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    with Scheduler(n_parallel=1) as scheduler:
        for point in itertools.count():
            gate = tmp_path / str(point)
            batch = scheduler.dispatch(Job(tasks.gate, args=(str(gate), point)))
            opening = threading.Timer(0.05, gate.touch)
            opening.start()
            interrupted = is_interrupted_at(point, batch, gate)
            opening.join()
            if not interrupted:
                break
            assert [result.data for result in batch.collect()] == [point]
    assert point > 9


@pytest.mark.parametrize("n_times", [1, 2])
def test_ctrl_c_ends_a_script(tmp_path: Path, n_times: int) -> None:
    """Once or twice: no orphan, no directory, and a `KeyboardInterrupt` that is the script's own."""
    text = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import tasks
        from aiohypertunity import Job
        from aiohypertunity.sync import Scheduler
        with Scheduler(n_parallel=1) as scheduler:
            scheduler.dispatch(Job(tasks.announce, args=(sys.argv[1] + "/pid",)))
            print(scheduler._scheduler._rundir.path, flush=True)
            scheduler.collect()
        """
    with driver(text, tmp_path, Path(__file__).parent) as process:
        assert process.stdout is not None
        directory = process.stdout.readline().strip()
        worker = number_in(tmp_path / "pid")
        for _ in range(n_times):
            os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    wait_until(lambda: not is_alive(worker), 2)
    wait_until(lambda: not os.path.exists(directory), 2)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert "tasks.py" not in stderr


def test_ctrl_c_at_any_point_of_the_start() -> None:
    """Wherever it strikes, in our own code or in AnyIO's, the start ends with it; and so does the script."""
    text = """
        import sys
        from aiohypertunity.sync import Scheduler

        def is_interrupted_at(point):
            def trace(frame, event, _):
                nonlocal point
                if not frame.f_code.co_filename.endswith(("sync.py", "from_thread.py", "contextlib.py")):
                    return None
                point -= event == "line"
                if point < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace

            scheduler = Scheduler(n_parallel=1)
            sys.settrace(trace)
            try:
                scheduler.start()
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(None)
            scheduler.close()
            return False

        point = 0
        while is_interrupted_at(point):
            point += 1
        print(point > 9)
        """
    with driver(text) as process:
        assert process.communicate(timeout=PATIENCE) == ("True\n", "")


def test_ctrl_c_in_a_stream() -> None:
    """Its traceback tells of nothing else."""
    text = """
        from aiohypertunity import Job
        from aiohypertunity.sync import Scheduler
        import time
        with Scheduler(n_parallel=1) as scheduler:
            scheduler.dispatch(Job(time.sleep, args=(600,)))[0].wait_started()
            stream = scheduler.stream()
            print("streaming", flush=True)
            next(stream)
        """
    with driver(text) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)
    assert stderr.count("Traceback") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_a_real_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in one cell, use it in others, close it in the last; functions defined in cells."""
    import nbformat
    from nbclient import NotebookClient

    cells = [
        (
            "from aiohypertunity import Job\nfrom aiohypertunity.sync import Scheduler\n"
            "scheduler = Scheduler(n_parallel=2).start()"
        ),
        "offset = 40\ndef shift(x):\n    print('shifting')\n    return x + offset",
        "batch = scheduler.dispatch([Job(shift, args=(x,)) for x in range(3)])",
        "[r.data for r in scheduler.collect(timeout=30)]",
        (
            "import aiohypertunity\n"
            "async with aiohypertunity.Scheduler(n_parallel=1) as other:\n"
            "    other.dispatch(Job(shift, args=(5,)))\n"
            "    async for result in other.collect():\n        print(result.data)"
        ),
        "scheduler.close()",
    ]
    monkeypatch.setenv("PYTHONPATH", str(Path(aiohypertunity.__file__).parent.parent))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    assert notebook.cells[3].outputs[0]["data"]["text/plain"] == "[40, 41, 42]"
    assert notebook.cells[4].outputs[0]["text"] == "45\n"
