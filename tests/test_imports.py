"""The cost of an import, and what modules may import. `nox -s lint` checks the layers."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import aiohypertunity

PACKAGE = Path(aiohypertunity.__file__).parent


@pytest.mark.parametrize("name", ["_wire/payloads", "_host/guardian"])
def test_what_is_shipped_as_source_stands_alone(name: str) -> None:
    """The standard library only; cloudpickle where it's used."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    top = {
        alias.name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    top |= {
        str(n.module).split(".")[0]
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and not n.level
    }
    assert top <= set(sys.stdlib_module_names) | {"__future__"}
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative
    anywhere = {
        a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
    }
    assert anywhere - set(sys.stdlib_module_names) <= {"cloudpickle"}


def test_what_an_import_costs() -> None:
    """`import aiohypertunity` loads nothing heavy; making a job doesn't either."""
    code = (
        "import sys, aiohypertunity; aiohypertunity.Job(print); "
        "print(*({'asyncssh', 'joblib', 'anyio', 'numpy', 'asyncio', 'cloudpickle'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.split() == []


def test_sync_is_there_without_its_own_import() -> None:
    """`aiohypertunity.sync` is loaded when it's first asked for, and not before."""
    code = (
        "import sys, aiohypertunity as ht; print('sync' in dir(ht), 'aiohypertunity.sync' in sys.modules, "
        "ht.sync.Scheduler.__module__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False", "aiohypertunity.sync"]


def test_help_begins_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The example in the package's docstring runs as it stands."""
    doc = aiohypertunity.__doc__ or ""
    example = doc[doc.index("    import asyncio") : doc.index("A `Job` or")]
    exec(compile(textwrap.dedent(example), "example", "exec"), {})
    assert sorted(capsys.readouterr().out.split()[1::2]) == ["0", "1", "16", "4", "9"]


def test_a_worker_loads_little() -> None:
    """It starts in milliseconds because it has little to import."""
    code = "import sys, aiohypertunity._executors.workers.child; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.split()
    ours = {n for n in loaded if n.startswith("aiohypertunity.") and n.count(".") > 1}
    assert ours == {
        "aiohypertunity._executors.workers",
        "aiohypertunity._executors.workers.child",
        "aiohypertunity._host.tails",
        "aiohypertunity._wire.payloads",
    }
    assert not {"asyncio", "anyio", "joblib", "cloudpickle"} & set(loaded)
