"""Both ends of a call: pack it, run it catching all it raises, pack what came of it.

The standard library and cloudpickle only, and no other module of this package: a compute node that
has never heard of it gets this file as source.

A *function blob* is a kind byte and a body: a cloudpickle of a callable, or the JSON name of a
function in a script or module. A *payload* is a pickle of the arguments. A *reply* is one of three
kinds (`VALUE`, `RAISED`, `UNREADABLE`) and a pickle. What was raised has a pickle of its own in it: it may not
come back, and what it said must. Large buffers (numpy arrays and whatever else
speaks pickle protocol 5) travel beside a pickle, in files that the reader maps copy-on-write; large
`bytes` and `bytearray` objects travel in files, too, which the reader reads.

cloudpickle takes 36 ms of CPU to import, as much as all the rest of a short job on a cluster, so it is
imported where plain pickle does not suffice and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import io
import json
import mmap
import os
import pickle
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

VALUE, RAISED, UNREADABLE = b"v", b"x", b"p"
"""Replies: the pickled return value; (pickled exception, its type and words, traceback, whether the call's script or
module was being imported); (part, reason, traceback)."""

LARGE = 1 << 20
"""Buffers of at least this many bytes travel beside the pickle."""

PACKET = 60_000
"""What is longer than this many bytes goes between processes through a file."""

PLAIN = frozenset({int, float, bool, str, bytes, type(None)})
"""Types whose pickles hold no large buffers and nothing by reference: plain pickle does them, and at once."""

_PICKLED, _NAMED = b"c", b"n"

Write = Callable[[memoryview], str]
"""Stores a large buffer, and says in which file."""


class FailedChunk(NamedTuple):
    """What a chunk of calls returns when one of them raises.

    Attributes:
        values: What those before it returned.
        kind: The kind of its reply.
        body: Its pickle.
        item: Its argument, in a few characters.
    """

    values: list[Any]
    kind: bytes
    body: bytes
    item: str


class Unpicklable(Exception):
    """Something can't be packed or unpacked.

    Attributes:
        part: Which part, in words.
        reason: What pickle said of it.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason


def pack_function(function: Callable[..., Any], write: Write | None) -> tuple[bytes, list[str]]:
    """A callable as a function blob, and the files of its large buffers.

    Raises:
        Unpicklable: It can't be pickled.
        OSError: A buffer can't be written.
    """
    if type(function) is types.FunctionType and not _registered_by_value():
        with contextlib.suppress(Exception):  # those that have no name to find them by
            blob = pickle.dumps(function, 5)
            if not _names_main_or_script(blob):
                return _PICKLED + blob, []
    blob, files = dumps(function, "the function", write)
    return _PICKLED + blob, files


def name_function(name: str, *, path: str | None, module: str | None) -> bytes:
    """The function blob of a function in a script or module."""
    return _NAMED + json.dumps([name, path, module]).encode()


def load_function(blob: bytes, files: Sequence[str] = ()) -> Callable[..., Any]:
    """The callable of a function blob."""
    if blob[:1] == _NAMED:
        return _find_function(*json.loads(blob[1:]))
    return loads(memoryview(blob)[1:], files)  # type: ignore[no-any-return]  # a pickle of one


def _find_function(name: str, path: str | None, module: str | None) -> Callable[..., Any]:
    found: Any = _script_module(path) if path else importlib.import_module(str(module))
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]  # named by the user


def _script_module(path: str) -> types.ModuleType:
    """The script as a module of its own name, its siblings importable, as if it were run."""
    name = os.path.splitext(os.path.basename(path))[0]
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == path:
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} can't be imported")
    directory = os.path.dirname(path)
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    # Its classes travel by value: the driver, which never imported it, must be able to read them.
    _scripts[name] = module
    return module


_MAIN = b"_main__"
"""Part of `__main__`, and of `__mp_main__`, as multiprocessing calls the main script in its children."""

_scripts: dict[str, types.ModuleType] = {}
"""Modules made of scripts, by name."""


def _names_main_or_script(blob: bytes) -> bool:
    """Return True if a pickle may refer to a module that its reader cannot import."""
    return _MAIN in blob or any(name.encode() in blob for name in _scripts)


def _register_by_value(cloudpickle: Any) -> None:
    main = sys.modules.get("__mp_main__")
    if main is not None:
        cloudpickle.register_pickle_by_value(main)
    for name, module in _scripts.items():
        if sys.modules.get(name) is module:
            cloudpickle.register_pickle_by_value(module)


def dumps(value: object, what: str, write: Write | None) -> tuple[bytes, list[str]]:
    """A pickle, and the files of its large buffers.

    Plain pickle is tried first, being several times faster; what it can't do, or would do by a name
    in a `__main__` that the reader doesn't have, cloudpickle does by value.

    Args:
        value: What to pickle.
        what: What it is, in words, for the error.
        write: Stores a large buffer; None to keep all of them in the pickle.

    Raises:
        Unpicklable: It can't be pickled; says which part of it can't.
        OSError: A buffer can't be written.
    """
    buffers: list[memoryview] = []

    def keep_small(buffer: pickle.PickleBuffer) -> bool:
        raw = _raw(buffer)
        if write is None or raw is None or raw.nbytes < LARGE:
            return True
        buffers.append(raw)
        return False

    blob = None
    if not _registered_by_value():
        try:
            if write is None:
                blob = pickle.dumps(value, 5)
            else:
                pieces = _Pieces(buffers)
                pickle.Pickler(pieces, 5, buffer_callback=keep_small).dump(value)
                blob = pieces.join()
        except Exception:
            buffers.clear()
        else:
            if _names_main_or_script(blob):
                blob = None
                buffers.clear()
    if blob is None:
        blob = _cloudpickle_dumps(value, what, None if write is None else buffers, keep_small)
    return blob, [write(buffer) for buffer in buffers] if write else []


class _Pieces:
    """A file for a pickle, which puts large `bytes` and `bytearray` objects beside it.

    Protocol 5 knows out-of-band buffers, but `bytes` are no such buffers. CPython's pickler writes an
    object of 64 KiB or more outside of its frames, directly after a piece that ends in the opcode and
    the length of the object, and passes the object itself. Here a reference takes the place of opcode,
    length and object. An object that comes in another way stays in the pickle.
    """

    def __init__(self, buffers: list[memoryview]) -> None:
        self._buffers = buffers
        self._pieces: list[bytes | bytearray] = []

    def write(self, piece: bytes | bytearray) -> None:
        """Adds a piece of the pickle."""
        size = len(piece)
        if size >= LARGE and self._pieces:
            before = self._pieces[-1]
            for opcode, length, reference in _BYTES_OPCODES:
                header = opcode + size.to_bytes(length, "little")
                if before.endswith(header):
                    self._pieces[-1] = before[: -len(header)] + reference
                    self._buffers.append(memoryview(piece))
                    return
        self._pieces.append(piece)

    def join(self) -> bytes:
        """The pickle, less what lies beside it."""
        return bytes(self._pieces[0]) if len(self._pieces) == 1 else b"".join(self._pieces)


_BYTES_OPCODES = (
    (pickle.BINBYTES, 4, pickle.NEWTRUE + pickle.BINPERSID),
    (pickle.BINBYTES8, 8, pickle.NEWTRUE + pickle.BINPERSID),
    (pickle.BYTEARRAY8, 8, pickle.NEWFALSE + pickle.BINPERSID),
)
"""How a pickle begins an object, the bytes of its length, and a reference to a file: `_Unpickler` has its end."""


def _raw(buffer: pickle.PickleBuffer) -> memoryview | None:
    try:
        return buffer.raw()
    except BufferError:  # not contiguous
        return None


def _registered_by_value() -> bool:
    """Return True if the user wants modules pickled by value: plain pickle does not know of that."""
    cloudpickle = sys.modules.get("cloudpickle")
    if not cloudpickle:
        return False
    registered = cloudpickle.list_registry_pickle_by_value()
    return bool(registered) and bool(registered - _scripts.keys() - {"__mp_main__"})


def _cloudpickle_dumps(
    value: object,
    what: str,
    buffers: list[memoryview] | None,
    keep_small: Callable[[pickle.PickleBuffer], bool],
) -> bytes:
    import cloudpickle

    _register_by_value(cloudpickle)
    try:
        if buffers is None:
            return cast("bytes", cloudpickle.dumps(value, 5))
        pieces = _Pieces(buffers)
        pickler: Any = cloudpickle.Pickler  # its annotations lack buffer_callback
        pickler(pieces, 5, buffer_callback=keep_small).dump(value)
        return pieces.join()
    except Exception as error:
        raise Unpicklable(_guilty_part(value, what), f"{type(error).__name__}: {error}") from error


def _guilty_part(value: object, what: str, depth: int = 5) -> str:
    """The smallest part of `value`, in words, that can't be pickled by itself."""
    import cloudpickle

    if depth:
        for name, part in _parts(value):
            try:
                cloudpickle.dumps(part, 5)
            except Exception:
                return _guilty_part(part, f"{what}{name}", depth - 1)
    return f"{what} ({type(value).__name__})"


def _parts(value: object) -> Iterator[tuple[str, object]]:
    match value:
        case dict():
            yield from ((f"[{key!r}]", item) for key, item in value.items())
        case tuple() | list() | set() | frozenset():
            yield from ((f"[{index}]", item) for index, item in enumerate(value))
        case types.FunctionType(__closure__=cells, __code__=code):
            names = zip(code.co_freevars, cells or (), strict=False)
            filled = ((name, cell) for name, cell in names if cell != types.CellType())
            yield from ((f", its variable {name!r}", cell.cell_contents) for name, cell in filled)
            used = ((name, value.__globals__.get(name)) for name in code.co_names)
            yield from ((f", its global {name!r}", item) for name, item in used)
        case types.MethodType():
            yield ", its object", value.__self__
        case _:
            state = getattr(value, "__dict__", None)
            if isinstance(state, dict) and not isinstance(value, type | types.ModuleType):
                yield from ((f".{name}", item) for name, item in state.items())


def loads(blob: bytes | memoryview, files: Sequence[str] = ()) -> Any:
    """What a pickle and the files beside it stand for."""
    if files:
        return _Unpickler(blob, files).load()
    return pickle.loads(blob)  # noqa: S301 - ours, out of our own 0700 directory


class _Unpickler(pickle.Unpickler):
    """Unpickles what has files beside it: they come in the order in which the pickle refers to them."""

    def __init__(self, blob: bytes | memoryview, files: Sequence[str]) -> None:
        self._files = iter(files)
        super().__init__(io.BytesIO(blob), buffers=map(map_file, self._files))

    def persistent_load(self, is_bytes: bool) -> bytes | bytearray:
        """Reads a `bytes` object, or a `bytearray`, from the next file: see `_Pieces`."""
        with open(next(self._files), "rb", buffering=0) as file:
            if is_bytes:
                return file.readall()
            content = bytearray(os.fstat(file.fileno()).st_size)
            rest = memoryview(content)
            while rest:
                rest = rest[file.readinto(rest) :]
            return content


def map_file(path: str) -> memoryview:
    """A file as memory: shared until written to, then a copy of one's own.

    It holds no descriptor, as the mappings of `mmap` do before Python 3.13: a driver that keeps some
    arrays of each result would run out of them.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        address = libc.mmap(
            None,
            ctypes.c_size_t(size),
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE,
            file.fileno(),
            ctypes.c_size_t(0),  # an off_t of 0, wherever it has the size of a pointer
        )
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at exit: what else runs then may still use the memory.
    weakref.finalize(
        memory, libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)
    ).atexit = False
    return pickle.PickleBuffer(memory).raw()  # as unsigned bytes, which ctypes calls "<B"


def write_file(path: str, buffer: bytes | memoryview) -> None:
    """Writes a new file of mode 0600 whole, or leaves none.

    Raises:
        OSError: It can't be written: the disk is full, say.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            rest = memoryview(buffer).cast("B")
            while rest:
                rest = rest[file.write(rest) :]
    except OSError:
        os.unlink(path)
        raise


def run(
    get_function: Callable[[], Callable[..., Any]],
    get_args: Callable[[], Any],
    write: Write | None,
) -> tuple[bytes, bytes, list[str]]:
    """Runs a call, and catches all that it raises, `SystemExit` and `KeyboardInterrupt` included.

    Args:
        get_function: Gives the function.
        get_args: Gives its arguments: a tuple, or a dict of named ones.
        write: Stores a large buffer of what it returns; None to keep all of them in the pickle.

    Returns:
        The kind of the reply, its pickle, and the files of its large buffers.
    """
    part = "the function"
    try:
        function = get_function()
        part = "the arguments"
        args = get_args()
    except BaseException as error:
        importing = _importing(error)
        if importing or _importing(
            error.__cause__
        ):  # a node has words of its own for what is missing there
            return raised(error, importing or error.__traceback__, importing=True)
        return unreadable(part, error)
    try:
        value = call(function, args)
    except BaseException as error:
        return raised(error)
    if type(value) in PLAIN and not (type(value) is bytes and len(value) >= LARGE):
        return VALUE, pickle.dumps(value, 5), []
    part = "the return value"
    try:
        return VALUE, *dumps(value, part, write)
    except Unpicklable as error:
        return UNREADABLE, pickle.dumps((error.part, error.reason, "")), []
    except BaseException as error:
        return unreadable(part, error)


def call(function: Callable[..., Any], args: Any) -> Any:
    """Calls a function with a tuple of arguments, or a dict of named ones; an async one is run."""
    value = function(**args) if type(args) is dict else function(*args)
    if type(value) is types.CoroutineType:
        import asyncio

        return asyncio.run(value)
    return value


def raised(
    error: BaseException, frames: types.TracebackType | None = None, *, importing: bool = False
) -> tuple[bytes, bytes, list[str]]:
    """The reply of a call that raised.

    Args:
        error: What it raised.
        frames: Its traceback, where not all of it is of interest.
        importing: Whether the call's script or module was being imported.
    """
    frames = frames or error.__traceback__
    less = {__name__, "importlib"} if importing else {__name__}
    while frames is not None and _package(frames.tb_frame) in less:
        frames = frames.tb_next  # less our own
    text = "".join(traceback.format_exception(type(error), error, frames))
    said = described(error)
    try:
        blob = dumps(error, "the exception", None)[0]
    except BaseException as reason:  # a __reduce__ may raise anything
        name = f"the exception ({type(error).__qualname__})"
        because = reason.reason if isinstance(reason, Unpicklable) else described(reason)
        return UNREADABLE, pickle.dumps((name, f"{because}; it was {said}", text)), []
    return RAISED, pickle.dumps((blob, said, text, importing)), []


def _package(frame: types.FrameType) -> str:
    name = str(frame.f_globals.get("__name__"))
    return "importlib" if name.startswith("importlib.") else name


def _importing(error: BaseException | None) -> types.TracebackType | None:
    """The part of a traceback in which a function is found by its name."""
    frames = None if error is None else error.__traceback__
    while frames is not None and frames.tb_frame.f_code is not _find_function.__code__:
        frames = frames.tb_next
    return frames


def short(item: object) -> str:
    """An object in a few characters, whatever it is."""
    import reprlib

    words = reprlib.Repr()
    words.maxother = words.maxstring = 60
    return words.repr(item)


def described(error: BaseException) -> str:
    """The type and the words of an exception."""
    try:
        words = str(error)
        return f"{type(error).__name__}: {words}" if words else type(error).__name__
    except BaseException:  # a __str__ may raise anything
        return f"{type(error).__name__}: (its __str__ fails)"


def unreadable(part: str, error: BaseException) -> tuple[bytes, bytes, list[str]]:
    """The reply of a call of which a part could not be packed or unpacked."""
    reason = "".join(traceback.format_exception_only(type(error), error)).strip()
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        reason += " (free some space, or set TMPDIR to a directory that has it)"
    text = "".join(traceback.format_exception(error))
    return UNREADABLE, pickle.dumps((part, reason, text)), []
