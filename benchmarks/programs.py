"""Scripts a second, and what an import costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohypertunity as ht

from ._harness import N_WORKERS, Figures, Row, Stopwatch, amount, benchmark, in_turns

N_SCRIPTS = 60
N_STARTS = 5


@benchmark
def scripts() -> list[Row]:
    """No-op Python scripts a second, as many at once as there are workers."""
    runs = in_turns({"ours": our_scripts, "bare asyncio": bare_scripts})
    return [
        runs.row("no-op scripts per second", "rate", "≥", 0.9, unit="/s", better=max),
    ]


async def our_scripts() -> AsyncIterator[Figures]:
    with tempfile.TemporaryDirectory() as directory:
        script = _no_op(directory)
        async with ht.Scheduler(N_WORKERS) as scheduler:
            while True:
                with Stopwatch() as watch:
                    scheduler.dispatch([ht.Job(task=script) for _ in range(N_SCRIPTS)])
                    async for result in scheduler.collect():
                        assert result.ok
                yield {"rate": N_SCRIPTS / watch.seconds}


async def bare_scripts() -> AsyncIterator[Figures]:
    with tempfile.TemporaryDirectory() as directory:
        script = _no_op(directory)

        async def some(numbers: Iterator[int]) -> None:
            for _ in numbers:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    script,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                assert await process.wait() == 0

        while True:
            numbers = iter(range(N_SCRIPTS))
            with Stopwatch() as watch:
                async with asyncio.TaskGroup() as group:
                    for _ in range(N_WORKERS):
                        group.create_task(some(numbers))
            yield {"rate": N_SCRIPTS / watch.seconds}


def _no_op(directory: str) -> str:
    script = Path(directory, "nothing.py")
    script.touch()
    return str(script)


@benchmark
def imports() -> list[Row]:
    """What `import aiohypertunity` adds to the start of a Python."""
    runs = in_turns(
        {
            "import": start_with_import,
            "bare": bare_start,
            "with Scheduler": start_with_scheduler,
            "asyncio": start_with_asyncio,
        }
    )
    medians = runs.medians("ms")
    more = medians["import"] - medians["bare"]
    most = medians["with Scheduler"] - medians["bare"]
    loop = medians["asyncio"] - medians["bare"]
    return [
        Row(
            figure="`import aiohypertunity`, in addition to a bare start of Python",
            ours=f"{amount(more, 'ms')}; with `Scheduler` and `Job` {amount(most, 'ms')}",
            against=f"a bare start {amount(medians['bare'], 'ms')}; `import asyncio` {amount(loop, 'ms')} more",
            ratio=None,
            must_be="≤ 60 ms",
            met=more <= 60,
            runs=runs.of("ms"),
        )
    ]


def start_with_import() -> Iterator[Figures]:
    return _starts("import aiohypertunity")


def start_with_scheduler() -> Iterator[Figures]:
    return _starts("from aiohypertunity import Job, Scheduler")


def start_with_asyncio() -> Iterator[Figures]:
    return _starts("import asyncio")


def bare_start() -> Iterator[Figures]:
    return _starts("pass")


def _starts(code: str) -> Iterator[Figures]:
    while True:
        with Stopwatch() as watch:
            for _ in range(N_STARTS):
                subprocess.run([sys.executable, "-c", code], check=True)
        yield {"ms": 1e3 * watch.seconds / N_STARTS}
