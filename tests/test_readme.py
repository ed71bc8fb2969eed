"""Every code block of the README runs as it stands."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import httpx
import nbclient
import nbformat
import pytest
from slurm_kit import needs_slurm
from ssh_kit import cluster, node, python_for_all  # noqa: F401 - fixtures

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def kind_of(block: str) -> str:
    if "example.edu" in block:
        return "ssh"
    if "ht.Slurm" in block or "SlurmJob" in block:
        return "slurm"
    if "Starlette" in block:
        return "service"
    return "notebook" if re.search(r"^\w.*\bawait ", block, re.MULTILINE) else "script"


def of_kind(kind: str, marks=()):
    numbered = [(n, block) for n, block in enumerate(BLOCKS) if kind_of(block) == kind]
    assert numbered, f"the README has no block of the kind {kind}"
    return [pytest.param(block, id=f"{kind}-{n}", marks=marks) for n, block in numbered]


@pytest.mark.parametrize("block", of_kind("script"))
def test_scripts(block, tmp_path):
    """A block that is a program prints something and ends well."""
    (tmp_path / "block.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


@pytest.mark.parametrize("block", of_kind("slurm", needs_slurm))
def test_slurm(block, tmp_path, cluster, monkeypatch):
    """What the README does on a cluster works on a real one."""
    for name, value in {**cluster.env, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    test_scripts(block, tmp_path)
    assert not list(tmp_path.glob(".aiohypertunity/*"))


@pytest.mark.parametrize("block", of_kind("ssh", needs_slurm))
def test_ssh(block, tmp_path, cluster, node, monkeypatch):
    """What the README does across SSH works on a real login node, by an alias as users have it."""
    settings = tmp_path / ".ssh" / "config"
    settings.parent.mkdir()
    settings.write_text(
        f"""
        Host login.example.edu
            HostName {node.host}
            Port {node.port}
            IdentityFile {node.client_key}
            UserKnownHostsFile {node.known_hosts}
        """
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    block = block.replace("me@login", f"{node.user}@login")
    test_scripts(block.replace("/home/me/venv/bin/python", python_for_all(cluster)), tmp_path)


@pytest.mark.parametrize("block", of_kind("service"))
def test_service(block):
    """The service answers each request with its own results."""
    namespace: dict = {"__name__": "service"}
    exec(compile(block, "service.py", "exec"), namespace)
    app = namespace["app"]

    async def main():
        async with app.router.lifespan_context(app) as state:

            async def with_state(scope, receive, send):
                await app({**scope, "state": dict(state)}, receive, send)

            transport = httpx.ASGITransport(with_state)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await asyncio.gather(
                    *(client.get("/squares", params={"n": n}) for n in (3, 5))
                )

    answers = asyncio.run(main())
    assert [answer.json() for answer in answers] == [[0, 1, 4], [0, 1, 4, 9, 16]]


@pytest.mark.parametrize("block", of_kind("notebook"))
@pytest.mark.filterwarnings("default")  # the kernel's own
def test_notebook(block, tmp_path):
    """A cell of a real notebook runs it."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbclient.NotebookClient(notebook, timeout=120).execute(cwd=str(tmp_path))
    assert "[0, 1, 4, 9]" in str(notebook.cells[0].outputs)
