"""A call goes out, an outcome comes back: both ends in one process."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
from helpers import script

from aiohypertunity._wire import payloads as _payload
from aiohypertunity._wire.payloads import LARGE, RAISED, UNREADABLE, VALUE, Unpicklable


class Writer:
    """Stores large buffers in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.n_written = 0

    def __call__(self, buffer: memoryview) -> str:
        self.n_written += 1
        path = str(self.directory / str(self.n_written))
        _payload.write_file(path, buffer)
        return path


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    (tmp_path / "buffers").mkdir()
    return Writer(tmp_path / "buffers")


def there_and_back(function: Any, args: Any = ()) -> tuple[bytes, Any]:
    blob, _ = _payload.pack_function(function, None)
    payload, _ = _payload.dumps(args, "argument", None)
    kind, reply, files = _payload.run(
        lambda: _payload.load_function(blob), lambda: _payload.loads(payload), None
    )
    assert not files
    return kind, _payload.loads(reply)


def closure() -> Any:
    base = 40
    return lambda x: base + x


async def coroutine(x: int) -> int:
    return x + 1


class Method:
    def __init__(self, base: int) -> None:
        self.base = base

    def add(self, x: int) -> int:
        return self.base + x


@pytest.mark.parametrize(
    ("function", "args", "value"),
    [
        (tasks.add, (1, 2), 3),
        (tasks.add, {"a": 1, "b": 4}, 5),
        (lambda x: x * 2, (4,), 8),
        (closure(), (2,), 42),
        (functools.partial(tasks.add, 5), (), 5),
        (Method(3).add, (4,), 7),
        (len, ("abc",), 3),
        (coroutine, (1,), 2),
    ],
)
def test_calls_of_every_kind(function: Any, args: Any, value: Any) -> None:
    """Lambdas, closures, partials, bound methods, builtins, coroutine functions."""
    assert there_and_back(function, args) == (VALUE, value)


@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]
)
def test_whatever_a_call_raises_is_caught(error: BaseException) -> None:
    """And travels with its traceback, which shows no frame of ours."""

    def raising() -> None:
        raise error

    kind, (blob, said, text, importing) = there_and_back(raising)
    raised = pickle.loads(blob)
    assert kind == RAISED
    assert not importing
    assert said == f"{type(error).__name__}: {error}".removesuffix(": ")
    assert type(raised) is type(error)
    assert raised.args == error.args
    assert "in raising" in text
    assert _payload.__file__ not in text


class Awkward(Exception):
    """Pickles, but doesn't come back."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("awkward")


def raise_awkward() -> None:
    raise Awkward(1, 2)


def raise_unpicklable() -> None:
    raise ValueError(threading.Lock())


def test_an_exception_that_cannot_be_pickled() -> None:
    """The part is named, and its traceback is still told."""
    kind, (part, reason, text) = there_and_back(raise_unpicklable)
    assert kind == UNREADABLE
    assert part == "the exception (ValueError)"
    assert "it was ValueError: <unlocked _thread.lock" in reason
    assert "in raise_unpicklable" in text


def locked() -> dict[str, Any]:
    return {"good": 1, "bad": [0, threading.Lock()]}


def test_a_value_that_cannot_be_pickled() -> None:
    """The smallest part that can't is named."""
    kind, (part, reason, _) = there_and_back(locked)
    assert kind == UNREADABLE
    assert part == "the return value['bad'][1] (lock)"
    assert "cannot pickle" in reason


LOCK = threading.Lock()


def with_lock_in_closure() -> Any:
    guard = threading.Lock()
    return lambda: guard


def holder() -> Any:
    made = Method(1)
    made.guard = threading.Lock()  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (with_lock_in_closure(), "the function, its variable 'guard' (lock)"),
        (eval("lambda: LOCK", {"LOCK": LOCK}), "the function, its global 'LOCK' (lock)"),  # noqa: S307
        (holder().add, "the function, its object.guard (lock)"),
    ],
)
def test_a_function_that_cannot_be_pickled(function: Any, part: str) -> None:
    """The variable, the global or the object that it drags along is named."""
    with pytest.raises(Unpicklable) as caught:
        _payload.pack_function(function, None)
    assert caught.value.part == part


@pytest.mark.parametrize("broken", [b"", b"garbage", b"\x80\x05cno_such_module\nf\n."])
def test_what_cannot_be_unpickled_names_its_part(broken: bytes) -> None:
    """The function or the arguments; never an exception on the worker's side."""
    kind, reply, _ = _payload.run(lambda: pickle.loads(broken), tuple, None)
    assert (kind, pickle.loads(reply)[0]) == (UNREADABLE, "the function")
    kind, reply, _ = _payload.run(lambda: tasks.pid, lambda: pickle.loads(broken), None)
    assert (kind, pickle.loads(reply)[0]) == (UNREADABLE, "the arguments")


def test_large_arrays_travel_in_files(write: Writer) -> None:
    """A large buffer goes beside the pickle, a small one in it."""
    small, large = np.arange(10), np.arange(LARGE // 8 + 1)
    blob, files = _payload.dumps((small, large), "argument", write)
    assert len(files) == 1
    assert len(blob) < LARGE
    for back, sent in zip(_payload.loads(blob, files), (small, large), strict=True):
        assert (back == sent).all()


def test_mapped_arrays_can_be_written_to(write: Writer) -> None:
    """Whoever writes to one writes to a copy of his own."""
    blob, files = _payload.dumps(np.zeros(LARGE), "argument", write)
    first, second = _payload.loads(blob, files), _payload.loads(blob, files)
    first += 1
    assert first[0] == 1
    assert second[0] == 0


def test_arrays_of_every_shape_come_back(write: Writer) -> None:
    """Fortran order, slices with gaps, no elements, structured ones."""
    square = np.arange(4 * LARGE // 8).reshape(2, -1)
    arrays = [square.T, square[:, ::2], np.empty((0, 3)), np.zeros(3, "i4,f8"), np.array(None)]
    blob, files = _payload.dumps(arrays, "argument", write)
    for back, sent in zip(_payload.loads(blob, files), arrays, strict=True):
        assert (back == sent).all()
        assert back.dtype == sent.dtype


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """And is nobody else's to read; one that is there is never written over."""
    path = tmp_path / "buffer"
    _payload.write_file(str(path), b"abc")
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        _payload.write_file(str(path), b"other")
    assert path.read_bytes() == b"abc"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_explained() -> None:
    """With what to do about it."""
    try:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    except OSError as error:
        _, reply, _ = _payload.unreadable("the return value", error)
    part, reason, _ = pickle.loads(reply)
    assert part == "the return value"
    assert "set TMPDIR" in reason


class TestFunctionsByName:
    """`script.py:function`, as the worker finds it."""

    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def load(self, name: str, path: Path | None = None, module: str | None = None) -> Any:
        where = str(path) if path else None
        return _payload.load_function(_payload.name_function(name, path=where, module=module))

    def test_the_script_is_a_module_of_its_own_name(self, tmp_path: Path) -> None:
        """happy.py is `happy`, its siblings can be imported, and it's run once, not as `__main__`."""
        script(tmp_path / "friend.py", "NAME = 'friend'")
        happy = script(
            tmp_path / "happy.py",
            """
            import friend
            RUNS = []
            RUNS.append(__name__)
            def f(): return __name__, friend.NAME, RUNS
            class C:
                @staticmethod
                def g(): return "g"
            """,
        )
        assert self.load("f", happy)() == ("happy", "friend", ["happy"])
        assert self.load("f", happy)() == ("happy", "friend", ["happy"])
        assert self.load("C.g", happy)() == "g"

    def test_a_script_that_fails_to_load_leaves_nothing(self, tmp_path: Path) -> None:
        """The next try starts over."""
        bad = script(tmp_path / "bad_script.py", "raise RuntimeError('at import')")
        with pytest.raises(RuntimeError, match="at import"):
            self.load("f", bad)
        assert "bad_script" not in sys.modules

    def test_a_function_in_a_module(self) -> None:
        """By its dotted name."""
        assert self.load("path.join", module="os")("a", "b") == "a/b"


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_large_bytes_go_to_files(kind: Any, write: Writer) -> None:
    """Wherever they are in a value, and by either pickle; they come back as what they were."""
    large = kind(os.urandom(LARGE))
    for value in (
        large,
        {"a": [large, "x" * LARGE, large]},
        (np.ones(LARGE), large),
        lambda: large,
    ):
        blob, files = _payload.dumps(value, "value", write)
        back = _payload.loads(blob, files)
        assert len(blob) < 2 * LARGE
        assert len(files) == (2 if isinstance(value, tuple) else 1)
        found = back() if callable(back) else back["a"][2] if isinstance(back, dict) else back
        found = found[1] if isinstance(found, tuple) else found
        assert type(found) is kind
        assert found == large
    kind_of_reply, blob, files = _payload.run(lambda: lambda: large, tuple, write)
    assert (kind_of_reply, len(files)) == (VALUE, 1)
    assert _payload.loads(blob, files) == large


def test_arrays_hold_no_descriptors(write: Writer) -> None:
    """A mapped array is writable, holds no descriptor, and goes with its last user."""
    blob, files = _payload.dumps(np.ones(LARGE), "array", write)
    before = len(os.listdir("/proc/self/fd"))
    arrays = [_payload.loads(blob, files) for _ in range(100)]
    arrays[0][0] = 7
    assert arrays[1][0] == 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count(files[0]) == 100
    del arrays
    assert files[0] not in Path("/proc/self/maps").read_text()


class Unprintable(Exception):
    """Raises what no `except Exception` catches, whatever is asked of it."""

    def __str__(self) -> str:
        raise GeneratorExit

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def test_an_exception_that_raises_more_than_exceptions() -> None:
    """It is described and reported as one that can't be pickled."""

    def raising() -> None:
        raise Unprintable

    kind, (part, reason, _) = there_and_back(raising)
    assert kind == UNREADABLE
    assert part == "the exception (Unprintable)"
    assert "KeyboardInterrupt" in reason
    assert "its __str__ fails" in reason
