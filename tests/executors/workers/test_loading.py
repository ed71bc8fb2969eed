"""Loading a result in the driver, which runs code of the user."""

from __future__ import annotations

import asyncio
import textwrap
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import tasks
from helpers import PATIENCE, driver, script

from aiohypertunity import Job, PayloadError, ResultLost, Scheduler, Status
from aiohypertunity._executors.workers import loading as _loading

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

KINDS = [
    asyncio.CancelledError,
    BaseException,
    GeneratorExit,
    KeyboardInterrupt,
    StopIteration,
    SystemExit,
]


class Wicked(Exception):
    """An exception whose loading raises another."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__("wicked")
        self.kind = kind

    def __reduce__(self) -> Any:
        return tasks._raise, (self.kind,)


class Endless:
    """A value whose loading takes 20 s: long enough for a test, and its thread ends."""

    def __reduce__(self) -> Any:
        return time.sleep, (20,)


class EndlessError(Exception):
    """An exception of this kind."""

    def __reduce__(self) -> Any:
        return time.sleep, (20,)


class UnreducibleError(Exception):
    """An exception that raises when it is pickled."""

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def raise_wicked(kind: type[BaseException]) -> None:
    raise Wicked(kind)


def raise_endless() -> None:
    raise EndlessError


def raise_unreducible() -> None:
    raise UnreducibleError


async def outcomes(jobs: list[Job[Any]], **options: Any) -> list[Any]:
    """The results of some jobs and of one more; the scheduler is left before."""
    with anyio.fail_after(PATIENCE):
        async with Scheduler(n_parallel=2, **options) as scheduler:
            batch = scheduler.dispatch([*jobs, Job(tasks.double, args=(4,))])
            results = [await handle for handle in batch]
    assert results.pop().data == 8
    return results


@pytest.mark.parametrize("backend", ["isolated", "threading", "loky"])
async def test_values_and_exceptions_that_raise(backend: str) -> None:
    """Whatever loading raises, its job fails with `PayloadError` and the others go on."""
    jobs = [Job(f, args=(kind,)) for kind in KINDS for f in (tasks.return_unloadable, raise_wicked)]
    results = await outcomes(jobs, backend=backend)
    assert [type(result.error) for result in results] == len(jobs) * [PayloadError]
    assert "KeyboardInterrupt: while unpickling" in str(results[6].error)
    assert "it was Wicked: wicked" in str(results[7].error)


@pytest.mark.parametrize("backend", ["isolated", "threading", "loky"])
async def test_an_exception_whose_reduce_raises(backend: str) -> None:
    """It fails its own job and no other."""
    (result,) = await outcomes([Job(raise_unreducible)], backend=backend)
    assert isinstance(result.error, PayloadError)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_script_whose_output_raises(kind: type[BaseException], tmp_path: Path) -> None:
    """A script's pickle may raise anything, too."""
    text = f"""
        import asyncio, os, pickle, sys
        sys.path.append({str(tasks.__file__).rpartition("/")[0]!r})
        import tasks
        with open(os.environ["AIOHYPERTUNITY_OUTPUT_FILE"], "wb") as file:
            pickle.dump(tasks.Unloadable({kind.__module__}.{kind.__name__}), file)
    """.replace("builtins.", "")
    path = script(tmp_path / "job.py", text)
    (result,) = await outcomes([Job(path, meta={"output": "env"})])
    assert isinstance(result.error, ResultLost)


@pytest.mark.parametrize("backend", ["isolated", "threading"])
async def test_loading_that_does_not_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails within a bound, and neither the others nor leaving wait for it."""
    monkeypatch.setattr(_loading, "_LOAD_WITHIN", 0.5)
    began = time.monotonic()
    results = await outcomes([Job(Endless), Job(raise_endless)], backend=backend)
    assert [type(result.error) for result in results] == 2 * [PayloadError]
    assert "did not finish loading within 0.5 s" in str(results[0].error)
    assert time.monotonic() - began < 15


async def test_leaving_while_a_result_is_loaded() -> None:
    """It waits a second for it, not a minute."""
    began = time.monotonic()
    async with Scheduler(n_parallel=1) as scheduler:
        handle = scheduler.dispatch(Job(Endless))[0]
        await handle.wait_started()
        await asyncio.sleep(0.5)
    assert (await handle).status is Status.CANCELLED
    assert time.monotonic() - began < 15


RUNS_OUT = """
    import asyncio, os, resource, sys
    sys.path.append(sys.argv[1])
    import numpy as np
    from aiohypertunity import Job, Scheduler
    import tasks

    async def main():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        async with Scheduler(n_parallel=1) as scheduler:
            await scheduler.dispatch(Job(np.zeros, args=(200_000,)))[0]
            gate, end = sys.argv[2], sys.argv[2] + ".end"
            handle = scheduler.dispatch(Job(tasks.gate, args=(gate, np.ones(200_000))))[0]
            await handle.wait_started()
            open(gate, "x").close()
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
            await asyncio.sleep(0.5)
            assert not handle.done()
            for descriptor in held:
                os.close(descriptor)
            print((await handle).data.sum())
            arrays = {str(i): np.full(140_000, i) for i in range(300)}
            result = await scheduler.dispatch(Job(dict, args=(arrays,)))[0]
            print(sum(int(array[0]) for array in result.data.values()))

    asyncio.run(main())
"""


def test_results_wait_for_descriptors(tmp_path: Path) -> None:
    """What can't be read for lack of descriptors arrives once there are some."""
    with driver(textwrap.dedent(RUNS_OUT), tasks.__file__.rpartition("/")[0], tmp_path / "g") as it:
        out, err = it.communicate(timeout=PATIENCE)
    assert out.split() == ["200000.0", "44850"], err
