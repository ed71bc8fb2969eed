"""What slurmctld forgets, cannot launch or brings back is neither lost, nor run twice, nor left behind."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tasks
from helpers import until
from slurm_cluster import SlurmCluster
from slurm_kit import needs_slurm, slurm_fixture  # noqa: F401 - fixtures are found by their names

import aiohypertunity as ht
from aiohypertunity import SlurmJob, Status
from aiohypertunity._executors.slurm import executor, rescue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_slurm


@pytest.fixture(name="bad_nodes", scope="module")
def bad_nodes_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of names of nodes whose prolog fails."""
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(name="cluster", scope="module")
def cluster_fixture(
    tmp_path_factory: pytest.TempPathFactory, bad_nodes: Path
) -> Iterator[SlurmCluster]:
    prolog = bad_nodes.parent / "prolog"
    prolog.write_text(f"#!/bin/sh\n[ ! -e {bad_nodes}/$SLURMD_NODENAME ]\n")
    prolog.chmod(0o755)
    settings = {"Prolog": str(prolog), "SlurmdTimeout": "60"}
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), settings=settings) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def tidy(cluster: SlurmCluster, bad_nodes: Path) -> Iterator[None]:
    yield
    for path in bad_nodes.iterdir():
        path.unlink()
    cluster.run("scancel", "--user=root")
    for node in cluster.nodes:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    cluster.wait_idle(60)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def note(directory: str, number: int) -> int:
    """Notes that it ran."""
    with open(f"{directory}/{number}", "a") as file:
        file.write("x")
    return number


def note_and_wait(directory: str, gate: str, number: int = 0) -> int:
    note(directory, number)
    tasks.gate(gate)
    return number


def beat_once(directory: str) -> float:
    """Notes the time ten times a second without an end; a second start returns its own."""
    path = Path(directory) / "beats"
    if path.exists():
        return time.time()
    while True:
        with path.open("a") as file:
            file.write(f"{time.time()}\n")
        time.sleep(0.1)


def in_slurm(cluster: SlurmCluster, what: str = "%i %T %r") -> list[str]:
    return cluster.run("squeue", "-h", "-o", what).splitlines()


async def change(cluster: SlurmCluster, *words: str) -> None:
    await asyncio.to_thread(cluster.run, "scontrol", *words)


async def lose_state(cluster: SlurmCluster) -> None:
    await asyncio.to_thread(cluster.lose_state)
    await asyncio.to_thread(cluster.start_controller)


# --- what is forgotten ---------------------------------------------------------------------------


async def test_a_running_job_is_forgotten_on_a_node_that_is_cut_off(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, notes: Path
) -> None:
    """It is alive, and stopped through the spool before its retry begins elsewhere."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(beat_once, (str(notes),), retries=1))
        await until(lambda: (notes / "beats").exists() and handle.node)
        node = str(handle.node)
        cluster.kill_slurmd(node)
        try:
            await lose_state(cluster)
            result = await asyncio.wait_for(handle, 60)
        finally:
            await asyncio.to_thread(cluster.start_slurmd, node)
    last = float((notes / "beats").read_text().split()[-1])
    assert last < result.data < time.time()
    assert result.attempts == 2


async def test_running_jobs_are_forgotten(
    slurm: Callable[..., ht.Slurm],
    cluster: SlurmCluster,
    notes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """slurmd kills what slurmctld has forgotten, which leaves no end: NodeFailed, and retried."""
    monkeypatch.setattr(rescue, "_LAST_WORD", 5.0)
    gate = tmp_path / "gate"
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch(
            [SlurmJob(note_and_wait, (str(notes), str(gate), i), retries=i) for i in range(2)]
        )
        await until(lambda: len(list(notes.iterdir())) == 2)
        await lose_state(cluster)
        lost = await asyncio.wait_for(batch[0], 60)
        gate.touch()
        again = await asyncio.wait_for(batch[1], 60)
    assert isinstance(lost.error, ht.NodeFailed)
    assert "slurmctld lost its state" in str(lost.error)
    assert (again.data, again.attempts) == (1, 2)


async def test_waiting_jobs_are_forgotten(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, notes: Path
) -> None:
    """They are submitted again, and run once; what the user cancelled is not."""
    options = {"begin": "now+5"}
    async with ht.Scheduler(slurm=slurm(options=options)) as scheduler:
        batch = scheduler.dispatch([SlurmJob(note, (str(notes), i)) for i in range(6)])
        await until(lambda: all(handle.slurm_id for handle in batch))
        await asyncio.to_thread(cluster.lose_state)
        batch[5].cancel()
        await asyncio.to_thread(cluster.start_controller)
        results = [await asyncio.wait_for(handle, 60) for handle in batch]
        assert [result.data for result in results[:5]] == list(range(5))
        assert results[5].status is Status.CANCELLED
    assert Counter(path.read_text() for path in notes.iterdir()) == {"x": 5}


async def test_a_forgotten_id_is_given_to_somebody_else(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster
) -> None:
    """Neither a cancel nor leaving touches the other's jobs."""
    await lose_state(cluster)  # ids begin anew
    async with ht.Scheduler(slurm=slurm(options={"hold": True})) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever))
        await until(lambda: handle.slurm_id)
        await lose_state(cluster)
        other = await asyncio.to_thread(
            cluster.run, "sbatch", "--parsable", "--hold", "--array=0-1", "--wrap=true"
        )
        assert str(handle.slurm_id).startswith(f"{other}_")
        handle.cancel()
        assert (await asyncio.wait_for(handle, 30)).status is Status.CANCELLED
    assert in_slurm(cluster, "%F %T") == [f"{other} PENDING"]


# --- what cannot be launched ---------------------------------------------------------------------


async def test_a_node_that_launches_nothing(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, bad_nodes: Path, notes: Path
) -> None:
    """Jobs that it could not launch are submitted again, and each runs once."""
    (bad_nodes / cluster.nodes[0]).touch()
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        batch = scheduler.dispatch([SlurmJob(note, (str(notes), i)) for i in range(16)])
        data = [(await asyncio.wait_for(handle, 60)).data for handle in batch]
    assert data == list(range(16))
    assert Counter(path.read_text() for path in notes.iterdir()) == {"x": 16}


async def test_no_node_launches_anything(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, bad_nodes: Path
) -> None:
    """After three launches that failed it is NodeFailed, in Slurm's words."""
    for node in cluster.nodes:
        (bad_nodes / node).touch()

    async def resume() -> None:
        while True:  # nodes are drained when their prolog fails
            await change(cluster, "update", f"NodeName={','.join(cluster.nodes)}", "State=RESUME")
            await asyncio.sleep(0.5)

    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.double, (1,)))
        await until(lambda: handle.pending_reason == "launch failed requeued held")
        resuming = asyncio.create_task(resume())
        result = await asyncio.wait_for(handle, 60)
        resuming.cancel()
        await asyncio.wait([resuming])
    assert isinstance(result.error, ht.NodeFailed)
    assert "launch failed requeued held" in str(result.error)
    assert str(handle.slurm_id) in str(result.error)


# --- what people hold ----------------------------------------------------------------------------


async def test_a_hold_waits(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path, notes: Path
) -> None:
    """A job that somebody holds, waiting or running, waits with an event until it is released."""
    gate = tmp_path / "gate"
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        events = scheduler.events()
        [handle] = scheduler.dispatch(SlurmJob(note_and_wait, (str(notes), str(gate))))
        await handle.wait_started()
        await change(cluster, "requeuehold", str(handle.slurm_id))
        held = await asyncio.wait_for(anext(e async for e in events if isinstance(e, ht.Held)), 30)
        assert held.reason == "job requeued in held state"
        with pytest.raises(ht.CollectTimeout, match="1 jobs: job requeued in held state"):
            async for _ in scheduler.collect(timeout=3):
                pass
        gate.touch()
        await change(cluster, "release", str(handle.slurm_id))
        await change(cluster, "update", f"JobId={handle.slurm_id}", "StartTime=now")
        result = await asyncio.wait_for(handle, 60)
    assert (result.data, result.attempts) == (0, 2)


async def test_queue_timeout_counts_each_wait(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster
) -> None:
    """A job that waits again after it had started is taken out of the queue as well."""
    async with ht.Scheduler(slurm=slurm()) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(tasks.forever, queue_timeout=4))
        await handle.wait_started()
        await asyncio.sleep(4.5)
        assert handle.status is Status.RUNNING
        await change(cluster, "requeuehold", str(handle.slurm_id))
        result = await asyncio.wait_for(handle, 40)
    assert result.status is Status.TIMED_OUT
    assert "queue_timeout" in str(result.error)


# --- leaving -------------------------------------------------------------------------------------


async def test_nothing_comes_back_after_leaving(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, tmp_path: Path, notes: Path
) -> None:
    """Jobs end while slurmctld is down, which then has them again: leaving waits and cancels them."""
    gate = tmp_path / "gate"
    async with ht.Scheduler(slurm=slurm(options={"hold": True})) as scheduler:
        batch = scheduler.dispatch(
            [SlurmJob(note_and_wait, (str(notes), str(gate), i)) for i in range(8)]
        )
        await until(lambda: batch[7].slurm_id)
        array = str(batch[0].slurm_id).partition("_")[0]
        await asyncio.to_thread(cluster.save_state, array)
        # It saves again after five seconds at the earliest, and so comes back with jobs that wait.
        await change(cluster, "release", array)
        await until(lambda: len(list(notes.iterdir())) == 8)
        cluster.kill_controller()
        gate.touch()
        assert [(await handle).data for handle in batch] == list(range(8))
        starting = asyncio.create_task(asyncio.to_thread(cluster.start_controller))
    await starting
    await until(lambda: not in_slurm(cluster), 30)
    await asyncio.sleep(3)
    assert not in_slurm(cluster)


async def test_leaving_warns_where_slurm_is_down(
    slurm: Callable[..., ht.Slurm], cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Slurm that does not answer is waited for, with a bound; then a warning has the command."""
    monkeypatch.setattr(executor, "_CONTACT_WITHIN", 3.0)
    scheduler = ht.Scheduler(slurm=slurm())
    await scheduler.start()
    [handle] = scheduler.dispatch(SlurmJob(tasks.double, (1,)))
    assert (await handle).data == 2
    cluster.kill_controller()
    try:
        began = time.monotonic()
        with pytest.warns(ResourceWarning, match="scancel --name=ht-"):
            await scheduler.aclose()
        assert time.monotonic() - began < 20
    finally:
        await asyncio.to_thread(cluster.start_controller)
