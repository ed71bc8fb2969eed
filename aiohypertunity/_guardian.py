"""Nothing outlives us: ends process trees, and is the small process that does so once we are dead.

A *tree* is a process group and whoever else carries its mark in the environment: a grandchild that made
a session of its own still has what it inherited. `PR_SET_PDEATHSIG` would not do: it fires when the
*thread* that started a child ends.

Run as a script, this file is the guardian: it waits until the process that started it is gone, however it
died, then ends the trees of its run and removes its directories. The standard library only, and no other
module of this package, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time

MARK = "AIOHYPERTUNITY_TREE"
"""The environment variable that marks the members of a tree: `RUN.NUMBER.`, so that no mark begins another."""


def kill_tree(group: int | None, mark: str) -> None:
    """Kills a process group and all that carry `mark`, and waits until they are gone. Blocks.

    Args:
        group: The process group, or None.
        mark: The value of the mark, or the beginning of it.
    """
    deadline = time.monotonic() + 2
    while True:
        if group is not None:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        pids = _marked(mark)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not pids or time.monotonic() > deadline:
            return
        time.sleep(0.005)


def _marked(mark: str) -> list[int]:
    """The living processes that carry `mark`; none where there is no /proc to tell."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                    if any(item.startswith(wanted) for item in environ.read().split(b"\0")):
                        found.append(int(name))
    return [pid for pid in found if pid != os.getpid()]


def _watch(parent: int, orders: int) -> set[int]:
    """Reads orders until the parent is gone; returns the groups that it left behind.

    An order is a line: `+ GROUP` or `- GROUP`. The end of the pipe isn't enough of a sign: a child that
    the parent forked may hold it open.
    """
    groups: set[int] = set()
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    with contextlib.suppress(OSError, AttributeError):
        poll.register(os.pidfd_open(parent), select.POLLIN)
    rest = b""
    while os.getppid() == parent:
        ready = poll.poll(1000)
        if (orders, select.POLLIN) not in [(fd, mask & select.POLLIN) for fd, mask in ready]:
            if ready:
                break
            continue
        data = os.read(orders, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            sign, _, group = line.partition(b" ")
            (groups.add if sign == b"+" else groups.discard)(int(group))
    return groups


def main() -> None:
    """`_guardian.py PARENT RUN DIRECTORY...`, with orders on standard input."""
    parent, run, *directories = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for group in _watch(int(parent), 0):
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    kill_tree(None, f"{run}.")
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
