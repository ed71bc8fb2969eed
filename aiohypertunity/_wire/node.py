"""What runs on a compute node for a callable: finds its call, runs it, leaves the result.

Nodes get this file as source, with `spool` and `payloads`, and need nothing else but cloudpickle.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import faulthandler
import math
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from . import payloads, spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_MISSED = 10
"""As the batch shell's: seconds without the mark after which the directory is taken for removed."""


def main(directory: str, index: str, key: str, mark: str) -> None:
    """Runs the call of an element, and ends the process.

    Args:
        directory: Of the submission.
        index: Of the element.
        key: The path that the names of its files begin with.
        mark: The name that says that it runs.
    """
    started = time.time()
    with contextlib.suppress(PermissionError):  # srun or setsid, say, has done it already
        os.setsid()  # what it starts can be ended with it
    answered = threading.Event()
    guarded = (os.getppid(), directory, index, mark, answered)
    threading.Thread(target=_guard, args=guarded, daemon=True).start()
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        # Line by line, so that the last words of a process that is killed are there to be read.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    buffers = _Buffers(directory, os.path.basename(key))
    pid = os.getpid()
    kind, blob, files = _run(directory, int(index), buffers)
    if os.getpid() != pid:
        os._exit(0)  # a child that the call forked, and that came back: the result is its parent's
    code = 0 if kind == payloads.VALUE else 1
    facts = _facts(started)
    try:
        if buffers.error is not None:
            raise buffers.error
        sizes = tuple((name, os.path.getsize(f"{directory}/{name}")) for name in files)
        pieces = spool.format_result(spool.Reply(kind, blob, sizes, facts))
        spool.write_whole(f"{key}.result", f"{directory}/new.{os.path.basename(key)}", pieces)
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"aiohypertunity: the result can't be written: {error}\n")
        is_full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        code = spool.SPOOL_FULL if is_full else spool.SPOOL_FAILED
    answered.set()
    _exit(code)


def _guard(parent: int, directory: str, index: str, mark: str, answered: threading.Event) -> None:
    """Ends this process and what it started when the batch shell was killed, or nobody wants it any more.

    As the batch shell does it for scripts.
    """
    disk = os.path.dirname(os.path.dirname(directory))
    missed = -math.inf
    while os.getppid() == parent and missed < _MISSED:
        # What has its result may remove all.
        if answered.is_set() or os.path.exists(mark):
            missed = 0.0
        elif os.path.exists(f"{directory}/{index}.stop"):
            break
        elif os.path.exists(disk):
            missed += 0.5
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


class _Buffers:
    """Storage of the large buffers of a result, beside it.

    Attributes:
        error: Why one of them cannot be written.
    """

    def __init__(self, directory: str, key: str) -> None:
        self._directory = directory
        self._key = key
        self._n_written = 0
        self.error: OSError | None = None

    def __call__(self, buffer: memoryview) -> str:
        name = f"buffer.{self._key}.{self._n_written}"
        self._n_written += 1
        path = f"{self._directory}/{name}"
        try:
            spool.write_whole(path, f"{path}.tmp", [buffer])  # type: ignore[list-item]  # is bytes to it
        except OSError as error:
            self.error = error
            raise
        return name


def _run(directory: str, index: int, write: _Buffers) -> tuple[bytes, bytes, list[str]]:
    try:
        call, surroundings = spool.read_call(directory, index)
    except (OSError, spool.BadFile) as error:
        return payloads.unreadable("the call", error)
    sys.path += [path for path in surroundings["sys_path"] if path not in sys.path]

    def get_function() -> Callable[..., Any]:
        _check_python(call.function, surroundings["python"])
        with _explained():
            return payloads.load_function(call.function, call.function_files)

    def get_args() -> Any:
        payload = call.payload
        if isinstance(payload, str):
            with open(payload, "rb") as file:
                payload = file.read()
        with _explained():
            return payloads.loads(payload, call.files)

    return payloads.run(get_function, get_args, write)


def _check_python(function: bytes, theirs: list[int]) -> None:
    """Refuses bytecode of another Python: it would crash, or do something else.

    Raises:
        RuntimeError: The function carries its code, and it isn't for this Python.
    """
    if list(sys.version_info[:2]) != theirs and b"CodeType" in function:
        raise RuntimeError(
            f"it was packed by Python {theirs[0]}.{theirs[1]}, and {sys.executable} on {_host()} is "
            f"{sys.version_info[0]}.{sys.version_info[1]}: name one of the same version by "
            "Slurm(python=...), or put the function in a module or script there ('module:function')"
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says of a module that is missing here how to send it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name == "cloudpickle":
            hint = "install it there, or name a Python that has it by Slurm(python=...)"
        else:
            hint = (
                "install it there, put it on a disk that the nodes share, or send it along: "
                f"cloudpickle.register_pickle_by_value({error.name})"
            )
        words = f"{sys.executable} on {_host()} has no module {error.name!r}: {hint}"
        raise ModuleNotFoundError(words, name=error.name) from error


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _facts(started: float) -> dict[str, Any]:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "host": _host(),
        "pid": os.getpid(),
        "started": started,
        "finished": time.time(),
        "max_rss": max(one.ru_maxrss for one in usage) * unit,
        "python": sys.version.split()[0],
    }


def _exit(code: int) -> None:
    # The usual way waits for threads that the job left, and takes the interpreter apart.
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing and forkserver do
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
