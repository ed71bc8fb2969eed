"""Local scripts on a cluster that doesn't see this disk: each content once, however many jobs use it.

What a script holds is fixed when its job is dispatched. It is put into a directory named after its content and
that of the files it needs beside it: so an edited one is another one, and two that import a `utils` of
their own don't meet.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import _payload
from .._jobs import FunctionRef, ScriptRef

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .._jobs import Job
    from .._transports import Content

_SMALL = 1 << 20
"""Bytes of a script that are read at once; one that is longer is read when it's sent."""


class Pinned(NamedTuple):
    """A script as it was when its job was dispatched.

    Attributes:
        path: Where it lies here.
        content: What it held; None if it's too long to be held, and is read later.
        runs: Whether it's a program by itself.
    """

    path: str
    content: bytes | None
    runs: bool


class Staging:
    """The scripts of a run.

    Args:
        files: What all scripts need beside them: files, or whole directories.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self._files = [os.path.abspath(path) for path in files]
        self._pinned: dict[tuple[object, ...], Pinned] = {}
        self._blobs: dict[tuple[str, str], bytes] = {}
        self._there: set[str] = set()

    def pin(self, job: Job[object]) -> Pinned | None:
        """Fixes what a job's script holds; None for a job without a local script.

        Raises:
            OSError: It can't be read.
        """
        target = job.target
        path = target.path if isinstance(target, FunctionRef | ScriptRef) else None
        if path is None or (isinstance(target, ScriptRef) and target.remote):
            return None
        facts = os.stat(path)
        key = path, facts.st_ino, facts.st_size, facts.st_mtime_ns
        if key not in self._pinned:
            content = Path(path).read_bytes() if facts.st_size <= _SMALL else None
            runs = isinstance(target, ScriptRef) and not target.binary
            self._pinned[key] = Pinned(path, content, runs)
        return self._pinned[key]

    def place(self, pinned: Pinned, root: str) -> tuple[str, dict[str, Content]]:
        """Where a script is to lie below `root`, and what has to be put there yet. Blocks.

        Raises:
            OSError: Something can't be read.
        """
        content: Content = Path(pinned.path) if pinned.content is None else pinned.content
        files: dict[str, Content] = {os.path.basename(pinned.path): content}
        files |= {name: Path(path) for path in self._files for name, path in _tree(path)}
        total = hashlib.sha256()
        for name, held in files.items():
            total.update(f"{name}\0{_digest(held)}\0".encode(errors="surrogateescape"))
        directory = f"{root}/{total.hexdigest()[:20]}"
        path = f"{directory}/{os.path.basename(pinned.path)}"
        if directory in self._there:
            return path, {}
        return path, {f"{directory}/{name}": held for name, held in files.items()}

    def placed(self, files: dict[str, Content], root: str) -> None:
        """These are there now."""
        self._there.update(
            f"{root}/{path.removeprefix(root).split('/')[1]}"
            for path in files
            if path.startswith(f"{root}/")
        )

    def named(self, target: FunctionRef, path: str) -> bytes:
        """The function blob of a function in a script that lies at `path`; one object for all."""
        key = target.name, path
        if key not in self._blobs:
            self._blobs[key] = _payload.name_function(target.name, path=path, module=None)
        return self._blobs[key]


def _tree(path: str) -> Iterator[tuple[str, str]]:
    """A file, or all files of a directory, by their names beside the script."""
    parent = os.path.dirname(path)
    if not os.path.isdir(path):
        yield os.path.basename(path), path
        return
    for directory, names, files in os.walk(path):
        names[:] = [name for name in names if name != "__pycache__"]
        for name in files:
            found = os.path.join(directory, name)
            yield os.path.relpath(found, parent), found


def _digest(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
