"""What a job needs, and what it's given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
import tasks
from helpers import PATIENCE, script

from aiohypertunity import Job, Scheduler, Status

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

ONE_GPU = {"resources": {"gpu": 1}}


def visible() -> Any:
    return tasks.environ("CUDA_VISIBLE_DEVICES")[0]


async def test_callables_see_their_gpus() -> None:
    """In CUDA_VISIBLE_DEVICES, from the start of their process; others see none of it."""
    async with Scheduler(n_parallel=2, resources={"gpu": [4, 7]}) as scheduler:
        both = Job(visible, meta={"resources": {"gpu": 2}})
        one = Job(visible, meta=ONE_GPU)
        assert (await scheduler.dispatch(both)[0]).data == "4,7"
        assert (await scheduler.dispatch(one)[0]).data == "4"
        assert (await scheduler.dispatch(Job(visible))[0]).data is None


async def test_no_gpu_is_given_twice(tmp_path: Path) -> None:
    """Two that run together have one each; the third waits."""
    gate = tmp_path / "gate"

    def look(path: str) -> Any:
        tasks.gate(path)
        return visible()

    async with Scheduler(n_parallel=4, resources={"gpu": ["0", "1"]}) as scheduler:
        batch = scheduler.dispatch([Job(look, args=(str(gate),), meta=ONE_GPU) for _ in range(3)])
        free = scheduler.dispatch(Job(tasks.pid))[0]
        await batch[0].wait_started()
        await batch[1].wait_started()
        assert (await free).ok
        assert batch[2].status is Status.PENDING
        gate.touch()
        assert sorted([(await batch[0]).data, (await batch[1]).data]) == ["0", "1"]
        assert (await batch[2]).ok


async def test_scripts_see_them_too(tmp_path: Path) -> None:
    """And resources of any other name."""
    path = script(tmp_path / "s.sh", "echo $CUDA_VISIBLE_DEVICES $AIOHYPERTUNITY_LICENCE")
    async with Scheduler(n_parallel=1, resources={"gpu": [3], "licence": ["a", "b"]}) as scheduler:
        job = Job(path, meta={"resources": {"gpu": 1, "licence": 2}})
        assert (await scheduler.dispatch(job)[0]).stdout == "3 a,b\n"


async def test_gpus_come_back_whatever_happens() -> None:
    """After a crash, a cancel, a timeout."""
    async with Scheduler(n_parallel=1, resources={"gpu": [0]}) as scheduler:
        await scheduler.dispatch(Job(tasks.end_as, args=("segfault",), meta=ONE_GPU))[0]
        await scheduler.dispatch(Job(tasks.forever, meta=ONE_GPU, timeout=0.2))[0]
        (handle,) = scheduler.dispatch(Job(tasks.forever, meta=ONE_GPU))
        await handle.wait_started()
        handle.cancel()
        await handle
        with anyio.fail_after(PATIENCE):
            assert (await scheduler.dispatch(Job(visible, meta=ONE_GPU))[0]).data == "0"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"cpu": 3}, "3 cpu, and this scheduler has 2: raise n_parallel"),
        ({"gpu": 2}, "2 gpu, and this scheduler has 1: give it more"),
        ({"fpga": 1}, r"only cpu, gpu, licence: give it resources=\{'fpga': \[...\]\}"),
        (
            {"tpu": 1},
            "give it resources=",
        ),  # a name like any other, though but a letter from two known ones
        ({"cpus": 1}, "only cpu, gpu, licence: did you mean 'cpu'?"),
        ({"gpus": 1}, "did you mean 'gpu'?"),
        ({"license": 1}, "did you mean 'licence'?"),
        ({"memory": 8}, "only cpu, gpu, licence: memory is for a SlurmJob"),
    ],
)
async def test_what_there_never_is_is_refused(wanted: dict[str, int], words: str) -> None:
    """At dispatch, with the job's name, what there is, and what would help."""
    async with Scheduler(n_parallel=2, resources={"gpu": [0], "licence": ["a"]}) as scheduler:
        with pytest.raises(ValueError, match=r"job 'greedy' \(pid\) asks for .*" + words):
            scheduler.dispatch(Job(tasks.pid, id="greedy", meta={"resources": wanted}))


async def test_a_gpu_where_there_is_none() -> None:
    """Isn't taken for a CPU misspelt."""
    async with Scheduler(n_parallel=1) as scheduler:
        with pytest.raises(ValueError, match="has only cpu: give it resources={'gpu'"):
            scheduler.dispatch(Job(tasks.pid, meta=ONE_GPU))
        with pytest.raises(ValueError, match="did you mean 'gpu'"):
            scheduler.dispatch(Job(tasks.pid, meta={"resources": {"gpus": 1}}))


async def test_more_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of two CPUs runs alone on two slots, is not starved by small ones, and may use more threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # dask sets it, and leaves it
    async with Scheduler(n_parallel=2) as scheduler:
        gates = [Job(tasks.gate, args=(str(tmp_path / f"gate{i}"),)) for i in range(2)]
        first, second = scheduler.dispatch(gates)
        big = Job(tasks.environ, args=("OMP_NUM_THREADS",), meta={"resources": {"cpu": 2}})
        (wide,) = scheduler.dispatch(big)
        small = scheduler.dispatch(
            [Job(tasks.environ, args=("OMP_NUM_THREADS",)) for _ in range(5)]
        )
        await first.wait_started()
        (tmp_path / "gate0").touch()
        await first
        assert wide.status is Status.PENDING
        assert {handle.status for handle in small} == {Status.PENDING}
        (tmp_path / "gate1").touch()
        (threads,) = (await wide).data
        (others,) = (await small[0]).data
        assert int(threads) == 2 * int(others)
        assert all([(await handle).ok for handle in small])
