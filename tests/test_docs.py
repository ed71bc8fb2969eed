"""Every code block of the README, of CONTRIBUTING and of the documentation runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import httpx
import nbclient
import nbformat
import pytest
from slurm_kit import needs_slurm
from ssh_kit import cluster, node, python_for_all, use_alias  # noqa: F401 - fixtures

import aiohypertunity

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>python|sh)\n(?P<text>.*?)^ *```", re.S | re.M)

# What a page leaves out around a block that is no program: a scheduler has been started, and there is a
# function, a script and some jobs to dispatch.
AROUND = """
import asyncio, pathlib
import aiohypertunity as ht

def train(rate):
    return 1 - rate

pathlib.Path("train.py").write_text("import sys; print(sys.argv)")
jobs = [ht.Job(task=train, args=(rate / 10,)) for rate in range(5)]

async def main():
    async with ht.Scheduler(n_parallel=2) as scheduler:
{block}
        async for result in scheduler.collect():
            assert result.ok or result.job.task is divmod, result.error

asyncio.run(main())
"""


class Block(NamedTuple):
    name: str
    language: str
    text: str

    @property
    def kind(self) -> str:
        if self.language == "sh":
            return "sh"
        if "example.edu" in self.text:
            return "ssh"
        if "SlurmJob" in self.text:
            return "slurm"
        if "Starlette" in self.text:
            return "service"
        if "import aiohypertunity" not in self.text and "from aiohypertunity" not in self.text:
            return "fragment"
        return "notebook" if re.search(r"^\w.*\bawait ", self.text, re.MULTILINE) else "script"

    @property
    def program(self) -> str:
        if "import aiohypertunity" in self.text or "from aiohypertunity" in self.text:
            return self.text
        return AROUND.format(block=textwrap.indent(self.text, " " * 8))


def blocks_of(page: Path) -> list[Block]:
    return [
        Block(f"{page.name}-{n}", found["language"], textwrap.dedent(found["text"]))
        for n, found in enumerate(FENCE.finditer(page.read_text()))
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_kind(*kinds: str, marks=()):
    chosen = [block for block in BLOCKS if block.kind in kinds]
    assert chosen, f"no page has a block of the kind {kinds}"
    return [pytest.param(block, id=block.name, marks=marks) for block in chosen]


def run(program: str, directory: Path) -> subprocess.CompletedProcess[str]:
    (directory / "block.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "block.py"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done


def test_every_block_of_a_page_is_found() -> None:
    """Nothing that looks like Python or a shell command has another label."""
    for page in PAGES:
        labels = re.findall(r"^ *```(\S*)\n", page.read_text(), re.MULTILINE)
        opening = {label for label in labels if label}
        assert opening <= {"python", "sh", "text", "{eval-rst}", "{toctree}"}, page


@pytest.mark.parametrize("block", of_kind("script"))
def test_scripts(block, tmp_path):
    """A block that is a program prints something and ends well."""
    assert run(block.program, tmp_path).stdout


@pytest.mark.parametrize("block", of_kind("fragment"))
def test_fragments(block, tmp_path):
    """A block that shows a few lines does so with a scheduler that runs."""
    run(block.program, tmp_path)


@pytest.mark.parametrize("block", of_kind("slurm", marks=needs_slurm))
def test_slurm(block, tmp_path, cluster, monkeypatch):
    """What a page does on a cluster works on a real one, and leaves nothing there."""
    for name, value in {**cluster.env, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run(block.program, tmp_path)
    assert not list(tmp_path.glob(".aiohypertunity/*"))


@pytest.mark.parametrize("block", of_kind("ssh", marks=needs_slurm))
def test_ssh(block, tmp_path, cluster, node, monkeypatch):
    """What a page does over SSH works on a real login node."""
    use_alias(node, tmp_path, monkeypatch)
    program = block.program.replace("me@login", f"{node.user}@login")
    run(program.replace("/home/me/venv/bin/python", python_for_all(cluster)), tmp_path)


@pytest.mark.parametrize("block", of_kind("service"))
def test_service(block):
    """The service answers each request with its own results."""
    namespace: dict = {"__name__": "service"}
    exec(compile(block.text, "service.py", "exec"), namespace)
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
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block.text)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbclient.NotebookClient(notebook, timeout=120).execute(cwd=str(tmp_path))
    assert "[0, 1, 4, 9]" in str(notebook.cells[0].outputs)


# --- shell commands ------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    found = set()
    for block in (block for block in BLOCKS if block.language == "sh"):
        for line in block.text.splitlines():
            for part in line.partition("#")[0].split("&&"):
                found.add(tuple(shlex.split(part)))
    return sorted(map(list, found))


def sessions() -> set[str]:
    return set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands(command):
    """A command that a page names is there: its session, package, group, module, file and options."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    match command:
        case ["nox", "-s", session, *options]:
            assert session in sessions()
            assert not options or options[:2] == ["--", "--json"]
        case ["pip", "install", *what]:
            groups = {b for a, b in zip(what, what[1:], strict=False) if a == "--group"}
            assert groups <= set(project["dependency-groups"])
            names = {"aiohypertunity", "nox", "pip", ".", "--editable", "--group", "--upgrade"}
            assert set(what) - groups <= names
        case ["python", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            pass
        case ["python", "-m", "pytest", *rest]:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "--collect-only", "-q", *rest],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout
        case ["python", "-m", "tests.slurm_cluster"]:
            pass  # run in test_slurm_cluster.py
        case ["python", "-m", "aiohypertunity", "doctor", *_]:
            pass  # run below
        case _:
            pytest.fail(f"no test knows how to check {shlex.join(command)}")


@pytest.mark.parametrize("command", [c for c in commands() if "doctor" in c], ids=" ".join)
@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_slurm)], ids=[""])
def test_doctor(command, _, tmp_path, cluster, node, monkeypatch):
    """The doctor finds nothing wrong, with the lines that the page shows."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word.replace("me@login", f"{node.user}@login") for word in command[1:]]
    if "--host" in words:
        use_alias(node, tmp_path, monkeypatch)
        words += ["--python", python_for_all(cluster)]
    env = os.environ | cluster.env
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = re.search(r"```text\n(host .*?)```", (ROOT / "docs/slurm.md").read_text(), re.DOTALL)
    assert shown is not None
    names = [line[:14].strip() for line in shown[1].splitlines()]
    assert [line[:14].strip() for line in done.stdout.splitlines()] == names


# --- what the pages say of the project -----------------------------------------------------------


def test_the_reference_has_every_public_name() -> None:
    """Nothing in `__all__` is missing from the page, and nothing else is on it."""
    text = (ROOT / "docs/api.md").read_text().partition("## The blocking twin")[0]
    documented = re.findall(r"^\.\. auto(?:class|exception|data):: (\w+)", text, re.MULTILINE)
    assert sorted(documented) == sorted(aiohypertunity.__all__)


def test_the_readme_is_short_and_its_figures_are_those_of_the_page() -> None:
    """At most 150 lines; every number in its table is in the benchmark's JSON."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    measured = json.dumps(json.loads((ROOT / "docs/figures.json").read_text()), ensure_ascii=False)
    table = readme.partition("| figure | result |")[2].partition("\n\n")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines()[2:]]
    numbers = [number for cells in rows for number in re.findall(r"\d[\d,.]*\d", " ".join(cells))]
    assert numbers
    assert [number for number in numbers if number not in measured] == []


def test_links_lead_somewhere() -> None:
    """Every relative link of README and CONTRIBUTING is a file that is there."""
    for page in PAGES[:2]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name} links to {target}"
