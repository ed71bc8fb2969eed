"""Fixtures that every test may use. Helpers live in `helpers`, functions to run as jobs in `tasks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiohypertunity import Scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def anyio_backend() -> str:
    """The loop of tests marked `anyio`."""
    return "asyncio"


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    """A started scheduler with two slots."""
    async with Scheduler(n_parallel=2) as started:
        yield started
