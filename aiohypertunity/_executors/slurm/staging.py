"""Local scripts on a cluster that doesn't see this disk: each content once, however many jobs use it.

What a script holds is fixed when its job is dispatched. It is put into a directory named after its content and
that of the files it needs beside it: so an edited one is another one, and two that import a `utils` of
their own don't meet.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..._model.jobs import FunctionRef, ScriptRef
from ..._wire import payloads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..._model.jobs import Job
    from ..._transports.protocol import Content

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

    Raises:
        ValueError: Two of them have one name.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self._files: dict[str, str] = {}
        for path in (os.path.abspath(file) for file in files):
            other = self._files.setdefault(os.path.basename(path), path)
            if other != path:
                raise ValueError(f"files: {other} and {path} would be one file beside the scripts")
        self._pinned: dict[tuple[object, ...], Pinned] = {}
        self._blobs: dict[tuple[str, str], bytes] = {}
        self._there: set[str] = set()

    def pin(self, job: Job[object]) -> Pinned | None:
        """Fixes what a job's script holds; None for a job without a local script.

        Raises:
            OSError: It can't be read, or can't lie beside the other files.
        """
        target = job.target
        path = target.path if isinstance(target, FunctionRef | ScriptRef) else None
        if path is None or (isinstance(target, ScriptRef) and target.remote):
            return None
        beside = self._files.get(os.path.basename(path))
        if beside is not None and not _is_same(beside, path):
            words = f"its place beside the other files is taken by {beside}, from Slurm(files=...)"
            raise FileExistsError(errno.EEXIST, words, path)
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
        beside = self._files.values()
        files: dict[str, Content] = {n: Path(file) for path in beside for n, file in _tree(path)}
        files[os.path.basename(pinned.path)] = content
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
            self._blobs[key] = payloads.name_function(target.name, path=path, module=None)
        return self._blobs[key]


def _is_same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.samefile(path, other)


def _tree(path: str) -> Iterator[tuple[str, str]]:
    """A file, or all files of a directory, by their names beside the script; of links, what they lead to."""
    parent = os.path.dirname(path)
    if not os.path.isdir(path):
        yield os.path.basename(path), path
        return
    above: dict[str, list[str]] = {path: []}
    for directory, names, files in os.walk(path, followlinks=True):
        within = [*above[directory], os.path.realpath(directory)]
        # A link to where it lies would lead on for ever.
        names[:] = [
            name
            for name in names
            if name != "__pycache__"
            and os.path.realpath(os.path.join(directory, name)) not in within
        ]
        above.update((os.path.join(directory, name), within) for name in names)
        for name in files:
            found = os.path.join(directory, name)
            yield os.path.relpath(found, parent), found


def _digest(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if not content.is_file() and content.exists():
        raise OSError(errno.EINVAL, "it isn't a regular file", str(content))
    with content.open("rb") as file:
        runs = "x" if os.fstat(file.fileno()).st_mode & stat.S_IXUSR else "-"
        return runs + hashlib.file_digest(file, "sha256").hexdigest()
