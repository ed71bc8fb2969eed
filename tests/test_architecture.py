"""The map in the package's docstring is the truth about who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import aiohypertunity

PACKAGE = Path(aiohypertunity.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
LOOK_DOWN = {"_jobs": {"_inline", "_slurm"}, "_inline": {"sync"}, "_transports": {"_ssh"}}
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]


def ranks() -> dict[str, int]:
    """The place of each module in the map: its lines from the top, `a, b` on one line in that order."""
    listing = (aiohypertunity.__doc__ or "").split("From the top:")[1].split("\n\nA module")[0]
    names: list[str] = []
    for line in listing.splitlines():
        head = re.split(r" {2,}", line.strip())[0]
        if re.fullmatch(r"\w+(, \w+)*,?", head):
            names += re.findall(r"\w+", head)
    return {name: rank for rank, name in enumerate(names)}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, lazy: bool) -> set[str]:
    """The modules of this package that a file imports, as names in the map.

    Args:
        path: The file.
        lazy: Whether to count imports inside functions.
    """
    found = set()
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if _is_type_checking(node)
        or (not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth and id(node) not in hidden:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def test_every_module_is_on_the_map() -> None:
    """And everything on the map is there."""
    assert {module_of(path) for path in MODULES} == set(ranks())


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_up(path: Path) -> None:
    """A module imports, when it's loaded, only from those above it."""
    order = ranks()
    own = order[module_of(path)]
    for name in imports(path, lazy=False) - {module_of(path)}:
        assert order[name] < own, f"{path.name} imports {name}, which is below it"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_lazy_imports_point_up_too(path: Path) -> None:
    """Few look down: `Job.__call__`, the checks of a `SlurmJob`, the choice of a transport."""
    order = ranks()
    own = order[module_of(path)]
    down = {name for name in imports(path, lazy=True) if order[name] > own}
    assert down <= LOOK_DOWN.get(module_of(path), set())


@pytest.mark.parametrize("name", ["_payload", "_guardian"])
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
    """It runs as it stands, and comes before the map."""
    doc = aiohypertunity.__doc__ or ""
    assert doc.index("asyncio.run(main())") < doc.index("From the top:")
    example = doc[doc.index("    import asyncio") : doc.index("What to run is")]
    exec(compile(textwrap.dedent(example), "example", "exec"), {})
    assert sorted(capsys.readouterr().out.split()[1::2]) == ["0", "1", "16", "4", "9"]


def test_a_worker_loads_little() -> None:
    """It starts in milliseconds because it has little to import."""
    code = "import sys, aiohypertunity._worker_main; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout.split()
    assert {n for n in loaded if n.startswith("aiohypertunity.")} == {
        "aiohypertunity._payload",
        "aiohypertunity._worker_main",
    }
    assert not {"asyncio", "anyio", "joblib", "cloudpickle"} & set(loaded)
