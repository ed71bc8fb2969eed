"""`collect`: every rule of it."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import tasks
from helpers import PATIENCE, until

from aiohypertunity import (
    CollectTimeout,
    Job,
    JobCancelled,
    NotEnoughJobs,
    PayloadError,
    Result,
    Scheduler,
    Status,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def doubles(n: int) -> list[Job[float]]:
    return [Job(tasks.double, args=(i,)) for i in range(n)]


def blocked(tmp_path: Path, name: str = "gate") -> Job[Any]:
    """A job that ends once a file of this name is there."""
    return Job(tasks.gate, args=(str(tmp_path / name), name))


async def test_everything_is_collected_once(scheduler: Scheduler) -> None:
    """With nothing said, `collect` ends when nothing is outstanding; another one has nothing more."""
    scheduler.dispatch(doubles(50))
    assert sorted([r.data async for r in scheduler.collect()]) == [2 * i for i in range(50)]
    assert [r async for r in scheduler.collect()] == []


async def test_jobs_dispatched_meanwhile_count(scheduler: Scheduler) -> None:
    """A job dispatched in the body of the loop is collected by that loop."""
    scheduler.dispatch(Job(tasks.double, args=(0,)))
    values = []
    async for result in scheduler.collect():
        values.append(result.data)
        if len(values) < 5:
            scheduler.dispatch(Job(tasks.double, args=(len(values),)))
    assert values == [0, 2, 4, 6, 8]


async def test_results_come_as_they_are_done(scheduler: Scheduler, tmp_path: Path) -> None:
    """The first result is there when the first job is over, whatever was dispatched before it."""
    scheduler.dispatch([blocked(tmp_path), *doubles(3)])
    collector = scheduler.collect()
    assert sorted([(await anext(collector)).data for _ in range(3)]) == [0, 2, 4]
    (tmp_path / "gate").touch()
    assert [r.data async for r in collector] == ["gate"]


async def test_in_order_of_dispatch(scheduler: Scheduler, tmp_path: Path) -> None:
    """`ordered=True` holds back what overtook."""
    batch = scheduler.dispatch([blocked(tmp_path), *doubles(3)])
    await batch[3]
    with pytest.raises(CollectTimeout):
        await anext(scheduler.collect(timeout=0, ordered=True))
    (tmp_path / "gate").touch()
    assert [r.data async for r in scheduler.collect(ordered=True)] == ["gate", 0, 2, 4]


async def test_exactly_as_many_as_asked(scheduler: Scheduler) -> None:
    """And the rest are there for the next one."""
    scheduler.dispatch(doubles(5))
    assert len([r async for r in scheduler.collect(n_results=2)]) == 2
    assert len([r async for r in scheduler.collect(n_results=3)]) == 3


async def test_more_than_there_are(scheduler: Scheduler) -> None:
    """`NotEnoughJobs` after what came was delivered; never a hang."""
    scheduler.dispatch(doubles(2))
    values = []
    with anyio.fail_after(PATIENCE):
        with pytest.raises(NotEnoughJobs, match="asked for 3 results, gave 2") as caught:
            async for result in scheduler.collect(n_results=3):
                values.append(result.data)
    assert sorted(values) == [0, 2]
    assert caught.value.n_collected == 2


async def test_whatever_is_ready(scheduler: Scheduler, tmp_path: Path) -> None:
    """0 or less takes what is ready and waits for nothing."""
    batch = scheduler.dispatch([*doubles(1), blocked(tmp_path)])
    await batch[0]
    for n_results in (0, -5):
        found = [r.data async for r in scheduler.collect(n_results=n_results)]
        assert found == ([0] if n_results == 0 else [])


async def test_without_end() -> None:
    """`math.inf` outlives its producers: it waits while there's nothing, and ends with the scheduler."""
    values = []

    async def consume() -> None:
        async for result in scheduler.collect(n_results=math.inf):
            values.append(result.data)

    async with asyncio.TaskGroup() as group:
        async with Scheduler(n_parallel=1) as scheduler:
            consumer = group.create_task(consume())
            for n in range(3):
                await scheduler.dispatch(Job(tasks.double, args=(n,)))[0]
                await until(lambda n=n: len(values) == n + 1)  # type: ignore[misc]
                assert not consumer.done()
    assert values == [0, 2, 4]


async def test_a_timeout_is_for_the_next_result(scheduler: Scheduler, tmp_path: Path) -> None:
    """What is finished comes first; then an error says how many came and which jobs are pending."""
    batch = scheduler.dispatch([*doubles(3), blocked(tmp_path)])
    for handle in batch[:3]:
        await handle
    values = []
    with pytest.raises(CollectTimeout, match="3 came before, 1 jobs are pending") as caught:
        async for result in scheduler.collect(timeout=0):
            values.append(result.data)
    assert sorted(values) == [0, 2, 4]
    assert caught.value.n_collected == 3
    assert caught.value.pending == (batch[3].job,)
    assert isinstance(caught.value, TimeoutError)


async def test_a_timeout_cancels_nothing(scheduler: Scheduler, tmp_path: Path) -> None:
    """The same collector, or the next one, goes on where it stopped."""
    scheduler.dispatch(blocked(tmp_path))
    collector = scheduler.collect(timeout=0.01)
    for _ in range(2):
        with pytest.raises(CollectTimeout):
            await anext(collector)
    (tmp_path / "gate").touch()
    assert [r.data async for r in scheduler.collect(timeout=PATIENCE)] == ["gate"]


async def test_a_slow_consumer_is_not_timed_out(scheduler: Scheduler) -> None:
    """The time its body takes doesn't count."""
    scheduler.dispatch(doubles(3))
    n = 0
    async for _ in scheduler.collect(timeout=5):
        n += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.02)
    assert n == 3


async def test_a_deadline_is_for_all_of_them(scheduler: Scheduler, tmp_path: Path) -> None:
    """However often something comes; finished results are still delivered after it."""
    (tmp_path / "open").touch()
    batch = scheduler.dispatch([*doubles(2), blocked(tmp_path)])
    await batch[0]
    await batch[1]
    collector = scheduler.collect(timeout=PATIENCE, deadline=0)
    assert {(await anext(collector)).data, (await anext(collector)).data} == {0, 2}
    with pytest.raises(CollectTimeout):
        await anext(collector)


async def test_a_break_loses_nothing(scheduler: Scheduler) -> None:
    """Nor does letting go of a collector that was never asked."""
    scheduler.dispatch(doubles(5))
    scheduler.collect()
    values = []
    async for result in scheduler.collect():
        values.append(result.data)
        if len(values) == 2:
            break
    values += [r.data async for r in scheduler.collect()]
    assert sorted(values) == [0, 2, 4, 6, 8]


async def test_an_error_in_the_body_loses_nothing(scheduler: Scheduler) -> None:
    """The result that was being looked at was delivered; no other is gone."""
    scheduler.dispatch(doubles(3))
    with pytest.raises(ZeroDivisionError):
        async for _ in scheduler.collect():
            1 / 0
    assert len([r async for r in scheduler.collect()]) == 2


async def test_a_cancelled_wait_loses_nothing(scheduler: Scheduler, tmp_path: Path) -> None:
    """Not even when the result comes in the very moment of the cancel."""
    batch = scheduler.dispatch(blocked(tmp_path))
    waiting = asyncio.ensure_future(anext(scheduler.collect()))
    await asyncio.sleep(0)
    (tmp_path / "gate").touch()
    await batch[0]  # wakes both; the other's turn comes after this
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        assert (await waiting).data == "gate"
        return
    assert [r.data async for r in scheduler.collect()] == ["gate"]


async def test_cancelling_in_every_turn_of_the_loop(scheduler: Scheduler) -> None:
    """Whenever an `anext` is cancelled, each result comes exactly once."""
    n = 60
    scheduler.dispatch(doubles(n))
    values: list[float] = []
    turns = 0
    while len(values) < n:
        waiting = asyncio.ensure_future(anext(scheduler.collect()))
        for _ in range(turns % 4):
            await asyncio.sleep(0)
        turns += 1
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            values.append((await waiting).data)
    assert sorted(values) == [2 * i for i in range(n)]


async def test_two_collectors_share(scheduler: Scheduler) -> None:
    """Each result goes to exactly one of them."""
    scheduler.dispatch(doubles(40))
    halves: tuple[list[float], list[float]] = ([], [])

    async def consume(values: list[float]) -> None:
        async for result in scheduler.collect():
            values.append(result.data)

    async with asyncio.TaskGroup() as group:
        for half in halves:
            group.create_task(consume(half))
    assert sorted(halves[0] + halves[1]) == [2 * i for i in range(40)]


async def test_two_collectors_end_when_one_takes_the_last(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    """The one that gets nothing doesn't hang: it ends, or says that it can't have as many."""
    scheduler.dispatch(blocked(tmp_path))
    first, second = (asyncio.ensure_future(anext(scheduler.collect(), None)) for _ in range(2))
    third = asyncio.ensure_future(anext(scheduler.collect(n_results=1)))
    await asyncio.sleep(0)
    (tmp_path / "gate").touch()
    with anyio.fail_after(PATIENCE):
        done = await asyncio.gather(first, second, third, return_exceptions=True)
    assert len([r for r in done if isinstance(r, Result)]) == 1
    assert isinstance(done[2], Result | NotEnoughJobs)


async def test_a_collector_is_an_iterator_object(scheduler: Scheduler) -> None:
    """No generator: it needs no closing, and can be asked again after its end."""
    collector = scheduler.collect()
    assert not hasattr(collector, "aclose")
    with pytest.raises(StopAsyncIteration):
        await anext(collector)
    scheduler.dispatch(doubles(1))
    assert (await anext(collector)).data == 0


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"n_results": 1.5}, TypeError),
        ({"n_results": "3"}, TypeError),
        ({"n_results": True}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"timeout": math.nan}, ValueError),
        ({"deadline": "1"}, TypeError),
    ],
)
async def test_wrong_arguments(
    scheduler: Scheduler, kwargs: dict[str, Any], kind: type[Exception]
) -> None:
    """Are errors in the line of the call, not in the loop's."""
    with pytest.raises(kind):
        scheduler.collect(**kwargs)


async def test_collecting_after_leaving() -> None:
    """What had finished can be collected; what was cancelled is there as that."""
    async with Scheduler(n_parallel=1) as scheduler:
        batch = scheduler.dispatch([*doubles(1), Job(tasks.forever), Job(tasks.forever)])
        await batch[1].wait_started()
    results = [r async for r in scheduler.collect(ordered=True)]
    assert [r.status for r in results] == [Status.SUCCEEDED, Status.CANCELLED, Status.CANCELLED]
    assert [r.attempts for r in results] == [1, 1, 0]
    with pytest.raises(JobCancelled, match="before it ran"):
        _ = results[2].data


class TestBatches:
    """A batch collects its own."""

    async def test_a_batch_claims_its_results(self, scheduler: Scheduler) -> None:
        """When `collect` is called, not when it's first asked; the scheduler gives them no more."""
        mine = scheduler.dispatch(doubles(3))
        scheduler.dispatch([Job(tasks.add, args=(100,))])
        collector = mine.collect()
        assert [r.data async for r in scheduler.collect()] == [100]
        assert sorted([r.data async for r in collector]) == [0, 2, 4]

    async def test_what_was_taken_is_not_claimed(self, scheduler: Scheduler) -> None:
        """Only undelivered results are the batch's."""
        batch = scheduler.dispatch(doubles(3))
        taken = [r.data async for r in scheduler.collect(n_results=2)]
        rest = [r.data async for r in batch.collect()]
        assert sorted(taken + rest) == [0, 2, 4]
        with pytest.raises(NotEnoughJobs):
            await anext(batch.collect(n_results=1))

    async def test_claiming_frees_who_waits_in_vain(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """A scheduler's collector that waits for what is claimed away ends."""
        batch = scheduler.dispatch(blocked(tmp_path))
        waiting = asyncio.ensure_future(anext(scheduler.collect(), "ended"))
        await asyncio.sleep(0)
        collector = batch.collect()
        with anyio.fail_after(PATIENCE):
            assert await waiting == "ended"
        (tmp_path / "gate").touch()
        assert [r.data async for r in collector] == ["gate"]

    async def test_a_private_batch_is_its_own(self, scheduler: Scheduler) -> None:
        """Never offered to `scheduler.collect()`."""
        private = scheduler.dispatch(doubles(2), private=True)
        assert [r async for r in scheduler.collect()] == []
        assert sorted([r.data async for r in private.collect()]) == [0, 2]

    async def test_a_private_batch_is_not_kept(self, scheduler: Scheduler) -> None:
        """Once its handles are gone so are its results: nothing piles up."""
        batch = scheduler.dispatch(Job(bytearray, args=(10,)), private=True)
        result = weakref.ref(await batch[0])
        assert result() is not None
        del batch
        gc.collect()
        assert result() is None

    async def test_a_batch_is_a_sequence_of_handles(self, scheduler: Scheduler) -> None:
        """In the order of dispatch; an empty one is one too."""
        jobs = doubles(3)
        batch = scheduler.dispatch(jobs)
        assert [handle.job for handle in batch] == jobs
        assert batch[-1].id == jobs[-1].id
        assert [handle.id for handle in batch[:2]] == [job.id for job in jobs[:2]]
        assert len(scheduler.dispatch([])) == 0

    async def test_leaving_a_batch_cancels_the_rest(self, scheduler: Scheduler) -> None:
        """And lets go of what nobody collected."""
        async with scheduler.dispatch([*doubles(1), Job(tasks.forever)]) as batch:
            assert (await anext(batch.collect())).data == 0
        assert batch[1].status is Status.CANCELLED
        assert [r async for r in scheduler.collect()] == []
        assert [r async for r in batch.collect()] == []

    async def test_leaving_a_batch_in_a_cancelled_scope(self, scheduler: Scheduler) -> None:
        """Jobs are gone and their results let go of although the way out is cancelled, too."""
        with anyio.CancelScope() as scope:
            async with scheduler.dispatch(Job(tasks.forever)) as batch:
                await batch[0].wait_started()
                scope.cancel()
                await anyio.sleep_forever()
        assert batch[0].status is Status.CANCELLED
        assert [r async for r in scheduler.collect()] == []

    async def test_nothing_starts_after_a_batch_was_cancelled(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """Not even what waited in a worker; and all statuses say so at once."""
        started = tmp_path / "started"
        first = Job(tasks.gate, args=(str(tmp_path / "gate"),))
        jobs = [Job(tasks.count_then, args=(str(started), "well")) for _ in range(20_000)]
        blocking = scheduler.dispatch([first, first.replace()])
        await blocking[1].wait_started()
        batch = scheduler.dispatch(jobs)
        batch.cancel()
        assert {h.status for h in batch} <= {Status.CANCELLING, Status.CANCELLED}
        (tmp_path / "gate").touch()
        assert (await scheduler.dispatch(Job(tasks.double, args=(1,)))[0]).data == 2
        assert {(await handle).status for handle in batch} == {Status.CANCELLED}
        assert not started.exists()

    async def test_a_full_collector_lets_all_who_wait_for_it_go(self, scheduler: Scheduler) -> None:
        """Several tasks may share a collector: none waits on when another has had the last result."""
        scheduler.dispatch([Job(tasks.double, args=(1,)), Job(tasks.forever)])
        collector = scheduler.collect(n_results=1)

        async def collect() -> int:
            return len([result async for result in collector])

        with anyio.fail_after(PATIENCE):
            assert sum(await asyncio.gather(*(collect() for _ in range(50)))) == 1

    async def test_cancelling_a_batch(self, scheduler: Scheduler) -> None:
        """Cancels those that wait and those that run; each gives a result that says so."""
        batch = scheduler.dispatch([Job(tasks.forever) for _ in range(4)])
        await batch[0].wait_started()
        batch.cancel()
        results = [r async for r in batch.collect(timeout=PATIENCE)]
        assert {r.status for r in results} == {Status.CANCELLED}
        assert sorted(r.attempts for r in results) in ([0, 0, 0, 1], [0, 0, 1, 1])


class TestHandles:
    """A handle is a future of a result."""

    async def test_awaiting_again_and_again(self, scheduler: Scheduler) -> None:
        """Gives the same result, and takes it from no collector."""
        (handle,) = scheduler.dispatch(doubles(1))
        first, second = await handle, await handle
        assert first is second
        assert [r async for r in scheduler.collect()] == [first]
        assert await handle is first

    async def test_awaiting_raises_no_error_of_the_job(self, scheduler: Scheduler) -> None:
        """Failure is a value."""
        (handle,) = scheduler.dispatch(Job(tasks.fail, args=("no",)))
        assert (await handle).status is Status.FAILED

    async def test_cancelling_the_await_cancels_no_job(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """The job goes on."""
        (handle,) = scheduler.dispatch(blocked(tmp_path))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        (tmp_path / "gate").touch()
        assert (await handle).data == "gate"

    async def test_many_can_wait(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """All of them get it."""
        (handle,) = scheduler.dispatch(blocked(tmp_path))
        waiting = [asyncio.ensure_future(handle._result()) for _ in range(5)]
        await asyncio.sleep(0)
        (tmp_path / "gate").touch()
        assert len({id(result) for result in await asyncio.gather(*waiting)}) == 1

    async def test_states(self, tmp_path: Path) -> None:
        """Pending, running only when it runs, final at last."""
        async with Scheduler(n_parallel=1) as scheduler:
            first, second = scheduler.dispatch([blocked(tmp_path, "a"), blocked(tmp_path, "b")])
            await first.wait_started()
            assert (first.status, second.status) == (Status.RUNNING, Status.PENDING)
            assert not first.done()
            (tmp_path / "a").touch()
            await second.wait_started()
            assert (first.status, second.status) == (Status.SUCCEEDED, Status.RUNNING)
            assert first.done()
            second.cancel()
            assert second.status is Status.CANCELLING
            assert (await second).status is Status.CANCELLED
            second.cancel()  # too late, and harmless
            assert second.status is Status.CANCELLED

    async def test_cancelling_one_that_waits(self) -> None:
        """It never runs, and is over at once."""
        async with Scheduler(n_parallel=1) as scheduler:
            first, second = scheduler.dispatch([Job(tasks.forever), Job(tasks.forever)])
            await first.wait_started()
            second.cancel()
            assert second.status is Status.CANCELLED
            assert (await second).attempts == 0

    async def test_waiting_for_the_start_of_what_never_starts(self, scheduler: Scheduler) -> None:
        """`wait_started` comes back when there will be no start."""
        (handle,) = scheduler.dispatch(Job(lambda lock: None, args=(asyncio.Lock(),), id="unsent"))
        with anyio.fail_after(PATIENCE):
            await handle.wait_started()
        assert isinstance((await handle).error, PayloadError) or (await handle).ok


async def test_dispatch_takes_all_or_none(scheduler: Scheduler) -> None:
    """Something that is no job, or can never run, refuses the whole dispatch."""
    with pytest.raises(TypeError, match="is no Job"):
        scheduler.dispatch([*doubles(2), print])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="asks for 99 cpu"):
        scheduler.dispatch([*doubles(2), Job(tasks.pid, meta={"resources": {"cpu": 99}})])
    assert scheduler.statistics().n_pending == 0
    for wrong in (tasks.pid, "train.py", None):
        with pytest.raises(TypeError, match="dispatch takes a Job or several, not"):
            scheduler.dispatch(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="use `async with`"), Scheduler():
        pass


async def test_a_closed_scheduler_takes_no_jobs() -> None:
    """Nor does one that wasn't started."""
    scheduler = Scheduler(n_parallel=1)
    with pytest.raises(RuntimeError, match="not started"):
        scheduler.dispatch(doubles(1))
    with pytest.raises(RuntimeError, match="not started"):
        scheduler.collect()
    async with scheduler:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.dispatch(doubles(1))
    with pytest.raises(RuntimeError, match="started before"):
        await scheduler.start()


async def test_start_and_aclose() -> None:
    """Where an `async with` can't span; leaving twice is harmless."""
    scheduler = await Scheduler(n_parallel=1).start()
    async with aclosing(scheduler):
        scheduler.dispatch(doubles(1))
        assert [r.data async for r in scheduler.collect()] == [0]
    await scheduler.aclose()


async def test_dispatch_from_another_thread(scheduler: Scheduler) -> None:
    """As a large one should be."""
    batch = await asyncio.to_thread(scheduler.dispatch, doubles(3))
    assert sorted([r.data async for r in batch.collect()]) == [0, 2, 4]


async def test_dispatching_a_job_twice(scheduler: Scheduler) -> None:
    """One that runs is refused: two results of one id couldn't be told apart."""
    job = Job(tasks.forever)
    scheduler.dispatch(job)
    with pytest.raises(ValueError, match="isn't over yet"):
        scheduler.dispatch(job)
    with pytest.raises(ValueError, match="twice"):
        scheduler.dispatch([again := Job(tasks.pid), again])


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"n_parallel": 0}, ValueError),
        ({"n_parallel": 1.5}, TypeError),
        ({"n_parallel": True}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"retries": -1}, ValueError),
        ({"kill_grace": -1}, ValueError),
        ({"on_exit": "stay"}, ValueError),
        ({"backend": 3}, TypeError),
        ({"resources": {"gpu": 2}}, ValueError),
        ({"resources": {"gpu": [0, 0]}}, ValueError),
        ({"resources": {"cpu": [0, 1]}}, ValueError),
    ],
)
async def test_a_wrong_scheduler(kwargs: dict[str, Any], kind: type[Exception]) -> None:
    """Is an error where it's made."""
    with pytest.raises(kind):
        Scheduler(**kwargs)
