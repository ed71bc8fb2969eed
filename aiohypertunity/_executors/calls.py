"""Calls as they are at dispatch: packed once, so that nothing that happens later changes them."""

from __future__ import annotations

import contextlib
import os
import pickle
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .._model.jobs import Args, FunctionRef, Job, ScriptRef
from .._rules import messages
from .._wire import payloads
from .._wire.payloads import PACKET, PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .._model.errors import PayloadError

_DEPTH = 2
"""How many levels of packages beside a script are looked at for what was edited."""

ScriptKey: TypeAlias = "tuple[str, ...]"


class SharedFile:
    """A large buffer in a file, which is removed with the last call that uses it."""

    def __init__(self, path: str) -> None:
        self.path = path
        weakref.finalize(self, _unlink, path, os.getpid())


def _unlink(path: str, owner: int) -> None:
    if os.getpid() != owner:  # a forked child that exits, or collects its garbage
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


@dataclass(frozen=True, slots=True)
class PackedFunction:
    """A function as the calls of a dispatch share it.

    Attributes:
        blob: The function blob.
        shared: The files of its large buffers.
        stored: The file with the blob itself, if it's long.
        script: Identity and content of the script that it is taken from; None if it isn't.
    """

    blob: bytes
    shared: tuple[SharedFile, ...] = ()
    stored: SharedFile | None = None
    script: ScriptKey | None = None


class Call:
    """A packed call of a callable.

    Attributes:
        packed: The function.
        payload: The pickled arguments; or, if they are long, the file they are in.
        shared: The files of their large buffers, which last as long as this does.
        cwd: The directory to run in; None if that of the dispatch is gone.
        chunk: Whether the arguments are a chunk of single ones.
    """

    __slots__ = ("chunk", "cwd", "packed", "payload", "shared")

    def __init__(
        self,
        packed: PackedFunction,
        payload: bytes | SharedFile,
        shared: tuple[SharedFile, ...],
        cwd: str | None,
        *,
        chunk: bool = False,
    ) -> None:
        self.packed = packed
        self.payload = payload
        self.shared = shared
        self.cwd = cwd
        self.chunk = chunk

    def read_payload(self) -> bytes:
        """The pickled arguments. Blocks if they are in a file."""
        if isinstance(self.payload, bytes):
            return self.payload
        return Path(self.payload.path).read_bytes()

    @property
    def function(self) -> bytes:
        """The function blob."""
        return self.packed.blob

    @property
    def script(self) -> ScriptKey | None:
        """Identity and content of the script that the function is taken from; None if it isn't."""
        return self.packed.script

    @property
    def function_files(self) -> list[str]:
        """The files of the function's large buffers."""
        return [file.path for file in self.packed.shared]

    @property
    def files(self) -> list[str]:
        """The files of the arguments' large buffers."""
        return [file.path for file in self.shared]


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """The command line of a script, less where it writes its result.

    Attributes:
        words: The interpreter, the script, its arguments.
        output_words: What to put before the path of the result; None to append nothing.
        output: Where the user wants the result, absolute; None to leave it to us.
        cwd: The directory to run in; None if that of the dispatch is gone.
    """

    words: tuple[str, ...]
    output_words: tuple[str, ...] | None
    output: str | None
    cwd: str | None = None


class Packer:
    """Packs the calls of one dispatch: each function once, each large buffer once.

    Args:
        write: Stores a large buffer, and says in which file; None if whoever runs the calls can't read
            our files.
    """

    def __init__(self, write: Callable[[memoryview], str] | None) -> None:
        self._store = write
        self._cwd = present_directory()
        self._functions: dict[int, PackedFunction | payloads.Unpicklable] = {}
        self._refs: dict[FunctionRef, PackedFunction | payloads.Unpicklable] = {}
        self._buffers: dict[tuple[int, int], tuple[SharedFile, object]] = {}
        self._written: list[SharedFile] = []

    def pack(self, job: Job[Any]) -> Call | ScriptCall | PayloadError:
        """The call of a job; or, as a value, the reason why there can't be one."""
        target = job.target
        if isinstance(target, ScriptRef):
            return script_call(job, target, self._directory(job))
        function = self._function(target)
        if isinstance(function, payloads.Unpicklable):
            return messages.unreadable(job, function.part, function.reason)
        args, cwd = job.args, self._directory(job)
        try:
            if type(args) is tuple and PLAIN.issuperset(map(type, args)) and _is_short(args):
                # Several times as quick as asking for large buffers that can't be there.
                quick = pickle.dumps(args, 5)
                if len(quick) <= PACKET:
                    return Call(function, quick, (), cwd)
            payload, shared = self._pack_args(args)
        except payloads.Unpicklable as error:
            return messages.unreadable(job, error.part, error.reason)
        except OSError as error:
            return messages.unreadable(job, "the arguments", _no_room(error))
        return Call(function, payload, shared, cwd)

    def pack_chunk(self, job: Job[Any], inputs: list[Any]) -> Call | PayloadError:
        """A call of a job's function with each of `inputs`, one by one; or why there can't be one."""
        assert not isinstance(job.target, ScriptRef)
        function = self._function(job.target)
        if isinstance(function, payloads.Unpicklable):
            return messages.unreadable(job, function.part, function.reason)
        try:
            payload, shared = self._pack_args(tuple(inputs), "input")
        except payloads.Unpicklable as error:
            return messages.unreadable(job, error.part, error.reason)
        except OSError as error:
            return messages.unreadable(job, "the inputs", _no_room(error))
        return Call(function, payload, shared, self._directory(job), chunk=True)

    def _directory(self, job: Job[Any]) -> str | None:
        return self._cwd if job.cwd is None else os.fspath(job.cwd)

    def _pack_args(
        self, args: object, what: str = "argument"
    ) -> tuple[bytes | SharedFile, tuple[SharedFile, ...]]:
        self._written = []
        payload, _ = payloads.dumps(args, what, self._write)
        if self._store is None or len(payload) <= PACKET:
            return payload, tuple(self._written)
        return SharedFile(self._store(memoryview(payload))), tuple(self._written)

    def _function(
        self, target: Callable[..., Any] | FunctionRef
    ) -> PackedFunction | payloads.Unpicklable:
        if isinstance(target, FunctionRef):
            if target not in self._refs:
                self._refs[target] = _named_function(target)
            return self._refs[target]
        # The jobs of a dispatch keep their functions alive, so an identity stays one's own.
        function = self._functions.get(id(target))
        if function is None:
            function = self._functions[id(target)] = self._pack_function(target)
        return function

    def _pack_function(self, target: Callable[..., Any]) -> PackedFunction | payloads.Unpicklable:
        self._written = []
        try:
            blob, _ = payloads.pack_function(target, self._write)
            shared = tuple(self._written)
            is_long = self._store is not None and len(blob) > PACKET
            stored = SharedFile(self._store(memoryview(blob))) if self._store and is_long else None
        except payloads.Unpicklable as error:
            return error
        except OSError as error:
            return payloads.Unpicklable("the function", _no_room(error))
        return PackedFunction(blob, shared, stored)

    @property
    def _write(self) -> Callable[[memoryview], str] | None:
        return self._write_once if self._store else None

    def _write_once(self, buffer: memoryview) -> str:
        assert self._store is not None
        # The exporter of the buffer is kept, so that its identity can't become another's meanwhile.
        key = id(buffer.obj), buffer.nbytes
        if key not in self._buffers:
            self._buffers[key] = SharedFile(self._store(buffer)), buffer.obj
        shared = self._buffers[key][0]
        self._written.append(shared)
        return shared.path


def _is_short(args: tuple[Any, ...]) -> bool:
    return not any(type(arg) is bytes and len(arg) > PACKET for arg in args)


def _no_room(error: OSError) -> str:
    return f"{error}: free some space, or set TMPDIR to a directory that has it"


def _named_function(target: FunctionRef) -> PackedFunction | payloads.Unpicklable:
    blob = payloads.name_function(target.name, path=target.path, module=target.module)
    try:
        return PackedFunction(blob, script=_content(target.path) if target.path else None)
    except OSError as error:  # it was there when the job was made
        return payloads.Unpicklable("the function", f"{target.path}: {error}")


def _content(path: str) -> ScriptKey:
    """The state of a script and of the modules near it: another one calls for a fresh worker."""
    return (path, *sorted(_modules_in(os.path.dirname(path), _DEPTH)))


def _modules_in(directory: str, depth: int) -> Iterator[str]:
    """The modules that can be imported from a directory, each with its state."""
    with contextlib.suppress(OSError), os.scandir(directory) as found:
        for file in found:
            if file.name.endswith(".py") and file.is_file():
                stat = file.stat()
                yield f"{file.path}:{stat.st_mtime_ns}:{stat.st_size}"
            elif depth and file.name.isidentifier() and file.is_dir(follow_symlinks=False):
                yield from _modules_in(file.path, depth - 1)


def present_directory() -> str | None:
    """The directory this process is in; None if it's gone."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def script_call(job: Job[Any], target: ScriptRef, cwd: str | None) -> ScriptCall:
    """The command line of a script's job, to run in the directory `cwd`."""
    args = job.args
    if isinstance(args, dict):
        pairs = [(key if key.startswith("-") else f"--{key}", _word(args[key])) for key in args]
        words = tuple(word for pair in pairs for word in pair)
    else:
        words = tuple(map(_word, args))
    output_words: tuple[str, ...] | None = ("--output_file",) if isinstance(args, dict) else ()
    if not args or _names_output(args) or (job.meta or {}).get("output") == "env":
        output_words = None
    words = (*target.binary, target.path, *words)
    return ScriptCall(words, output_words, job.output_path, cwd)


def _names_output(args: Args) -> bool:
    return isinstance(args, dict) and any(key.lstrip("-") == "output_file" for key in args)


def _word(value: object) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
