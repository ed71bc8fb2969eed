"""What several tests need on the driver's side."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

PATIENCE = 60.0
"""Seconds after which a test gives up on something that should have happened at once."""


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def until(happened: Callable[[], object], patience: float = PATIENCE) -> None:
    """Waits until something is so."""
    end = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < end, f"waited {patience} s in vain"
        await asyncio.sleep(0.005)


def wait_until(happened: Callable[[], object], patience: float = PATIENCE) -> None:
    """The same without a loop."""
    end = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < end, f"waited {patience} s in vain"
        time.sleep(0.005)


def number_in(path: Path) -> int:
    """The number that a job writes to a file, once it's whole: it ends in a line feed."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def script(path: Path, text: str, *, mode: int = 0o644) -> Path:
    """Writes a script."""
    path.write_text(textwrap.dedent(text))
    path.chmod(mode)
    return path


def directories_of_runs() -> set[str]:
    """What schedulers have in the temporary directory and in shared memory at present."""
    bases = {os.environ.get("TMPDIR", "/tmp"), "/tmp", "/dev/shm"}
    prefix = f"aiohypertunity-{os.getuid()}-"
    return {f"{b}/{name}" for b in bases for name in os.listdir(b) if name.startswith(prefix)}


@contextlib.contextmanager
def driver(text: str, *args: object, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `text`, in a session of its own as a terminal would give it."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        cwd=cwd,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def ticker(interval: float = 0.002) -> AsyncIterator[list[float]]:
    """Measures how long the loop is held: seconds by which each tick came too late.

    Less those for which a thread of ours was ready to run and the machine had no CPU for it (it may
    have been the one with the interpreter's lock), and less what the garbage collector has to do with
    all that the tests before have loaded.
    """
    holds: list[float] = []

    async def tick() -> None:
        while True:
            waited = _waited_for_cpu()
            before = time.perf_counter()
            await asyncio.sleep(interval)
            late = time.perf_counter() - before - interval
            holds.append(late - max(_waited_for_cpu() - waited, 0))

    gc.collect()
    gc.freeze()
    task = asyncio.get_running_loop().create_task(tick())
    try:
        yield holds
    finally:
        task.cancel()
        await asyncio.wait([task])
        gc.unfreeze()


def give_up_if_crowded() -> None:
    """Skips the test if others keep this machine so busy that no hold of a loop can be told from theirs."""
    load, n_cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > 3 * n_cpus:
        pytest.skip(f"a load of {load:.0f} on {n_cpus} CPUs: too crowded to measure")


def _waited_for_cpu() -> float:
    """Seconds for which threads of this process were ready to run and didn't, on Linux."""
    waited = 0
    for statistics in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            waited += int(statistics.read_text().split()[1])
    return waited / 1e9
