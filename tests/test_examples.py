"""Every program in examples/ runs as it is."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import nbclient
import nbformat
import pytest
from slurm_cluster import free_ports
from slurm_kit import needs_slurm
from ssh_kit import cluster, node, python_for_all, use_alias  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "random_search": "trial ",
    "ask_and_tell": "best of 30: ",
    "existing_script": "last line: epoch 4: loss 0.5905",
    "plain_script": "rate 0.1   depth 2  0.980",
}
TESTED_BELOW = {"notebook", "slurm", "ssh", "train", "web_service"}


def run(directory: Path, name: str, *words: str) -> str:
    shutil.copytree(EXAMPLES, directory / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "error", f"{name}.py", *words],
        cwd=directory / "examples",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    """One that is added is run, too."""
    names = {path.stem for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == set(SAYS) | TESTED_BELOW


@pytest.mark.parametrize("name", SAYS)
def test_programs(name, tmp_path):
    """A program that needs nothing but this machine prints what it found."""
    assert SAYS[name] in run(tmp_path, name)


@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_slurm)], ids=[""])
def test_slurm(_, tmp_path, cluster, monkeypatch):
    """On a real cluster every job of the example succeeds."""
    for name, value in {**cluster.env, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert run(tmp_path, "slurm").count("loss 0.0") == 4


@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_slurm)], ids=[""])
def test_ssh(_, tmp_path, cluster, node, monkeypatch):
    """Over a real SSH connection, too; the events are shown."""
    use_alias(node, tmp_path, monkeypatch)
    said = run(tmp_path, "ssh", f"{node.user}@login.example.edu", python_for_all(cluster))
    assert said.count(" started\n") == 3
    assert len(said.splitlines()) >= 6


@pytest.mark.filterwarnings("default")  # the kernel's own
def test_notebook(tmp_path):
    """A kernel executes it from top to bottom."""
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120).execute(cwd=str(tmp_path))
    assert "(0.1,) 0.0" in str(notebook.cells)


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[httpx.AsyncClient]:
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "web_service:app", "--port", str(port)]
    server = await asyncio.create_subprocess_exec(*command, cwd=EXAMPLES)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    await client.get("/status")
                    break
                assert server.returncode is None
                await asyncio.sleep(0.05)
            yield client
    finally:
        server.terminate()
        try:
            async with asyncio.timeout(20):
                await server.wait()
        except TimeoutError:  # it waits for a request that is not answered: the test has failed
            server.kill()
            await server.wait()


@pytest.mark.anyio
async def test_a_client_that_disconnects_cancels_its_jobs():
    """The service answers a request; the jobs of another end when its client hangs up."""
    async with served() as client:
        answer = await client.get("/pi", params={"points": 20_000, "jobs": 3})
        assert 3 < answer.json()["pi"] < 3.3

        async def running() -> int:
            return (await client.get("/status")).json()["running"]

        hanging = asyncio.create_task(client.get("/pi", params={"points": 10**12}))
        while not await running():
            await asyncio.sleep(0.02)
        hanging.cancel()
        async with asyncio.timeout(60):
            while await running():
                await asyncio.sleep(0.02)
