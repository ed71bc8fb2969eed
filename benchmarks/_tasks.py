"""What the measured jobs do: in a module of its own, so that every peer can send it by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def nothing() -> None:
    """Does nothing."""


def nothing_with(_: object) -> None:
    """Does nothing with its argument."""


def double(number: int) -> int:
    """The least that a call can do with an argument and a result."""
    return 2 * number


def sleep(seconds: float) -> None:
    """Takes its time, and no CPU."""
    time.sleep(seconds)


def burn(seconds: float) -> float:
    """Keeps a CPU busy; says when it was done, in seconds since the epoch."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return time.time()


def now() -> float:
    """The time at which it runs, in seconds since the epoch."""
    return time.time()


def sum_of_part(array: np.ndarray[Any, Any], part: int, n_parts: int) -> float:
    """Reads its part of a large array."""
    length = len(array) // n_parts
    return float(array[part * length : (part + 1) * length].sum())


def end_after(seconds: float) -> float:
    """Sleeps; says when it was done, in seconds since the epoch."""
    time.sleep(seconds)
    return time.time()


def announce_and_sleep(path: str, seconds: float) -> None:
    """Writes its pid to a file, whole, and sleeps."""
    beside = Path(f"{path}.new")
    beside.write_text(str(os.getpid()))
    beside.rename(path)
    time.sleep(seconds)
