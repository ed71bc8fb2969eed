"""Functions that tests run as jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


def add(a: float, b: float = 0) -> float:
    return a + b


def double(x: float) -> float:
    return 2 * x


def pid() -> int:
    return os.getpid()


def fail(message: str) -> NoReturn:
    raise ValueError(message)


def fail_on(bad: int, x: int) -> int:
    if x == bad:
        raise ValueError(f"{x} is bad")
    return x


def forever() -> NoReturn:
    while True:
        time.sleep(60)


def gate(path: str, value: Any = None) -> Any:
    """Returns `value` once there is a file at `path`."""
    while not os.path.exists(path):
        time.sleep(0.002)
    return value


def announce(path: str) -> NoReturn:
    """Writes its pid to a file and never ends."""
    write_number(path, os.getpid())
    forever()


def write_number(path: str, number: int) -> None:
    Path(path).write_text(f"{number}\n")


def count_then(path: str, how: str) -> int:
    """Notes in a file that it ran; the first time it ends as `how` says, later well."""
    with open(path, "a") as file:
        file.write("x")
    n = os.path.getsize(path)
    if n == 1:
        end_as(how)
    return n


def end_as(how: str) -> None:
    if how == "segfault":
        import ctypes

        ctypes.string_at(0)
    elif how == "os._exit":
        os._exit(7)
    elif how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "abort":
        os.abort()
    elif how == "sys.exit":
        sys.exit(4)
    elif how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    elif how == "raise":
        raise ValueError("as asked")
    elif how == "hang":
        forever()


def spawn_grandchild(path: str, *, own_session: bool) -> NoReturn:
    """Starts a process that would outlive it, writes its pid to a file and never ends."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=own_session)
    write_number(path, child.pid)
    forever()


def script_value() -> str:
    return "from tasks"
