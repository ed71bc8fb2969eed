"""What a process of ours writes: to two files, read at their ends, and cut when they grow too long."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from .tails import TAIL, tail

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from pathlib import Path

_MOST = 32 << 20
_MUCH = 1 << 20
_SHORTEST_LOOK, _LONGEST_LOOK = 0.02, 0.5


def log_files(log_path: Path) -> tuple[Path, Path]:
    """Where the whole output of a job is kept, given its `log_path`."""
    return log_path / "stdout", log_path / "stderr"


def open_log(path: str, flags: int) -> int:
    """Open a log file; others cannot write to a new one, whatever the umask."""
    return os.open(path, flags, 0o644)


class Capture:
    """The stdout and stderr of a process, in files that it has open for appending.

    Args:
        paths: The two files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._cut_off = [b"", b""]
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on looks, at first often, whether they grow too long."""
        self._look(loop, _SHORTEST_LOOK)

    def unwatch(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def forget(self) -> None:
        """What was cut off belongs to a call that is over."""
        self._cut_off = [b"", b""]

    def _look(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        sizes = [self._cut(index) for index in (0, 1)]
        grown, self._size = sum(sizes) - self._size, sum(sizes)
        interval = _SHORTEST_LOOK if abs(grown) > _MUCH else min(2 * interval, _LONGEST_LOOK)
        self._timer = loop.call_later(interval, self._look, loop, interval)

    def _cut(self, index: int) -> int:
        """Cuts one file if it's too long: its writers append, and so go on at its new end."""
        try:
            size = os.stat(self.paths[index]).st_size
            if size > _MOST:
                with open(self.paths[index], "r+b") as file:
                    self._cut_off[index] = tail(file.fileno())
                    file.truncate(0)
        except OSError:
            return 0
        return size

    def sizes(self) -> tuple[int, int]:
        """How long each is now: what comes after is the next attempt's."""
        stdout, stderr = (
            os.path.getsize(path) if os.path.exists(path) else 0 for path in self.paths
        )
        return stdout, stderr

    def tails(self, starts: Sequence[int] = (0, 0)) -> tuple[str, str]:
        """The last 64 KiB of each, from `starts` on."""
        stdout, stderr = (self._tail(index, start) for index, start in enumerate(starts))
        return stdout, stderr

    def _tail(self, index: int, start: int) -> str:
        try:
            if os.stat(self.paths[index]).st_size <= start and not self._cut_off[index]:
                return ""
            with open(self.paths[index], "rb") as file:
                data = self._cut_off[index] + tail(file.fileno(), start)
        except OSError:
            return ""
        return data[-TAIL:].decode(errors="replace")

    def remove(self) -> None:
        """Removes the files."""
        for path in self.paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
