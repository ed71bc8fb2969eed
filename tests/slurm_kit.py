"""What the tests of Slurm jobs share: a cluster a module, and wrappers round Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import script
from slurm_cluster import SlurmCluster, missing

import aiohypertunity as ht

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiohypertunity import SlurmJob

WHAT_IS_MISSING = missing()
if WHAT_IS_MISSING and os.environ.get("CI") == "true":
    raise RuntimeError(WHAT_IS_MISSING)
needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.skipif(WHAT_IS_MISSING is not None, reason=str(WHAT_IS_MISSING)),
]


@pytest.fixture(name="cluster", scope="module")
def cluster_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(name="slurm")
def slurm_fixture(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ht.Slurm]]:
    """Makes a `Slurm` for the test cluster, with a work directory of its own, empty in the end."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    yield lambda **options: ht.Slurm(**{"workdir": work, **options})
    left = [str(path) for path in work.rglob("*")] if work.exists() else []
    assert not left, f"left in the spool: {left}"


async def results_of(slurm: ht.Slurm, *jobs: SlurmJob[Any], **options: Any) -> list[ht.Result[Any]]:
    """The results of jobs, in the order of the jobs."""
    async with ht.Scheduler(n_parallel=1, slurm=slurm, **options) as scheduler:
        batch = scheduler.dispatch(jobs)
        async for _ in scheduler.collect(timeout=90):
            pass
        return [await handle for handle in batch]


async def result_of(slurm: ht.Slurm, job: SlurmJob[Any], **options: Any) -> ht.Result[Any]:
    return (await results_of(slurm, job, **options))[0]


class Wrapper:
    """Puts a script on PATH in front of a command of Slurm's; gives its calls."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        directory.mkdir()
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def __call__(self, name: str, body: str) -> Callable[[], list[str]]:
        real = subprocess.check_output(["which", name], text=True).strip()
        log = self._directory / f"{name}.calls"
        log.touch()
        script(
            self._directory / name,
            f'#!/bin/sh\nREAL={real} N=$(wc -l <{log})\necho "$*" >>{log}\n{body}\n',
            mode=0o755,
        )
        return lambda: log.read_text().splitlines()


@pytest.fixture(name="wrapped")
def wrapped_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    return Wrapper(tmp_path / "bin", monkeypatch)
