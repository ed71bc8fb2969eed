"""A web service whose requests share one scheduler; a client that disconnects cancels its jobs.

pip install starlette uvicorn
uvicorn web_service:app
curl "http://127.0.0.1:8000/pi?points=1000000&jobs=4"
"""

import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import aiohypertunity as ht


def hits(points: int, seed: int) -> int:
    """Count the random points of the unit square that lie in the quarter circle."""
    chance = random.Random(seed)
    return sum(chance.random() ** 2 + chance.random() ** 2 <= 1 for _ in range(points))


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[Mapping[str, Any]]:
    async with ht.Scheduler(n_parallel=2) as scheduler:
        yield {"scheduler": scheduler}


async def cancel_on_disconnect(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def pi(request: Request) -> Response:
    points = int(request.query_params.get("points", 100_000))
    n_jobs = int(request.query_params.get("jobs", 2))
    jobs = [ht.Job(task=hits, args=(points, seed), timeout=600) for seed in range(n_jobs)]
    response = Response(status_code=499)  # nobody will read it
    async with anyio.create_task_group() as group:
        group.start_soon(cancel_on_disconnect, request, group.cancel_scope)
        # Private: no other request gets these results. Leaving the block cancels what is left.
        async with request.state.scheduler.dispatch(jobs, private=True) as batch:
            counts = [result.data async for result in batch.collect()]
            response = JSONResponse({"pi": 4 * sum(counts) / (points * n_jobs)})
        group.cancel_scope.cancel()
    return response


async def status(request: Request) -> Response:
    now = request.state.scheduler.statistics()
    return JSONResponse({"running": now.n_running, "waiting": now.n_pending})


app = Starlette(routes=[Route("/pi", pi), Route("/status", status)], lifespan=lifespan)
