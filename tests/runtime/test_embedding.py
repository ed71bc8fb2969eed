"""In a web service: requests share one scheduler, and each gets only its own."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tasks
from helpers import give_up_if_crowded, ticker, until
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from aiohypertunity import Job, Scheduler, Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

pytestmark = pytest.mark.anyio


async def doubles(request: Request) -> JSONResponse:
    """Doubles the numbers from `start` on, one job each."""
    scheduler: Scheduler = request.app.state.scheduler
    start, n = int(request.query_params["start"]), int(request.query_params["n"])
    jobs = [Job(tasks.double, args=(i,)) for i in range(start, start + n)]
    async with scheduler.dispatch(jobs, private=True) as batch:
        return JSONResponse([r.data async for r in batch.collect(ordered=True)])


async def forever(request: Request) -> JSONResponse:
    """Never answers."""
    scheduler: Scheduler = request.app.state.scheduler
    async with scheduler.dispatch(Job(tasks.forever), private=True) as batch:
        request.app.state.handles.append(batch[0])
        return JSONResponse([r.data async for r in batch.collect()])


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """One scheduler for the service's life."""
    async with Scheduler(n_parallel=2) as scheduler:
        app.state.scheduler = scheduler
        app.state.handles = []
        yield


def service() -> Starlette:
    return Starlette(
        routes=[Route("/doubles", doubles), Route("/forever", forever)], lifespan=lifespan
    )


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")


async def test_each_request_gets_its_own() -> None:
    """Many at once, of different lengths; and nothing of them piles up."""
    app = service()
    async with app.router.lifespan_context(app), client(app) as web:

        async def ask(start: int, n: int) -> list[Any]:
            answer = await web.get("/doubles", params={"start": start, "n": n})
            return answer.json()  # type: ignore[no-any-return]

        answers = await asyncio.gather(*(ask(100 * k, 1 + k) for k in range(20)))
        for k, answer in enumerate(answers):
            assert answer == [2 * i for i in range(100 * k, 100 * k + 1 + k)]
        stand = app.state.scheduler.statistics()
        assert (stand.n_uncollected, stand.n_running, stand.n_pending) == (0, 0, 0)
        assert stand.n_succeeded == sum(range(1, 21))


async def test_who_hangs_up_frees_the_slot() -> None:
    """A request that is cancelled cancels its jobs, and no others."""
    app = service()
    async with app.router.lifespan_context(app), client(app) as web:
        asking = asyncio.ensure_future(web.get("/forever"))
        await until(lambda: app.state.handles and app.state.handles[0].status is Status.RUNNING)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        assert (await app.state.handles[0]).status is Status.CANCELLED
        answer = await web.get("/doubles", params={"start": 1, "n": 2})
        assert answer.json() == [2, 4]


async def test_the_loop_is_never_held() -> None:
    """Not for 20 ms, start and shutdown included; the best of several lives, on a machine with others."""

    async def life() -> None:
        app = service()
        async with app.router.lifespan_context(app), client(app) as web:
            async with asyncio.TaskGroup() as group:
                for k in range(10):
                    group.create_task(web.get("/doubles", params={"start": k, "n": 20}))

    worst = []
    for _ in range(6):
        async with ticker() as holds:
            await life()
        worst.append(max(holds))
        if worst[-1] < 0.02:
            return
    give_up_if_crowded()
    pytest.fail(f"the loop was held for {min(worst):.3f} s at the least")
