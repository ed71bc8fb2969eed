"""The end of a file that a process appends to."""

from __future__ import annotations

import os

TAIL = 65_536
"""How many bytes of each stream a result carries."""


def tail(file: int, start: int = 0) -> bytes:
    """The last `TAIL` bytes of a file from `start` on; a file cut in the meantime is read whole."""
    size = os.fstat(file).st_size
    if size < start:
        start = 0
    return os.pread(file, TAIL, max(start, size - TAIL))
