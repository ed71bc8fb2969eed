"""Nothing outlives us: ends process trees, and is the small process that does so once we are dead.

A *tree* is a worker process or a script with all that descends from it. Its members are known by a mark
that they inherit, in two forms:

- The soft limit `RLIMIT_LOCKS`, on Linux. The kernel has not used this limit since 2.4.25 (getrlimit(2)),
  programs leave it alone, and it passes through `fork`, `exec`, `setsid`, a double fork, `env -i` and the
  closing of all files. The driver has the limit while it starts a worker or a script, which inherits it.
  To set it from outside comes too late: 2 of 60 scripts had started a daemon by then, and more than half
  on a busy machine, where the driver waits for a CPU after each start. To read it takes 4 µs a process.
- The environment variable `MARK`, where the limit cannot be set. A process that clears its environment
  loses it.

Other means were considered. `PR_SET_PDEATHSIG` fires when the *thread* that started a child ends.
`PR_SET_CHILD_SUBREAPER` is a property of a process that must outlive the tree: in the driver it would hand
orphans of the user's own children to a program that does not expect them; in a worker it ends with the
worker, and a crash is when it is needed; and a process between the driver and a script costs each script its
start (10 ms in Python), and makes it inherit from there instead of from the driver (CPU affinity, umask,
limits). Control groups belong to root, or to systemd.

What gets away: a process that the driver does not start but asks for (of systemd, cron, a container
engine, an existing tmux server); a program of another user (sudo); and one that sets `RLIMIT_LOCKS` itself
and clears its environment. What another thread of the driver starts in the millisecond in which a tree is
started has the mark, too, and is relieved of it with its descendants; only an orphan that it leaves within
that millisecond is taken for one of the tree.

A scheduler inside a job marks what it starts as its own. So a guardian that is found in a tree is
not killed but waited for: it ends the trees of its driver, which is dead by then.

Run as a script, this file is the guardian: it waits until the process that started it is gone, however it
died, then ends the trees of its run and removes its directories. The standard library only, and no other
module of this package, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import threading
import time

TYPE_CHECKING = False  # `typing` would take longer to import than all the rest
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import TypeAlias

    Start: TypeAlias = Callable[[], subprocess.Popen[bytes]]

MARK = "AIOHYPERTUNITY_TREE"
"""The environment variable that marks the members of a tree: `RUN.NUMBER.`, so that no mark begins another."""

_RLIMIT_LOCKS = 10  # `resource` has no name for it
_LIMIT = 1 << 62
"""The bit of all marks in limits; then come that of guardians, 33 bits of the run, and 28 of the number."""

_GUARDIAN = 1 << 61
_NUMBER_BITS = 28


def start_marked(start: Start, mark: str) -> subprocess.Popen[bytes]:
    """Start a process that is a member of the tree `mark` from its first instruction on. Blocks.

    Args:
        start: Starts it.
        mark: The mark of its tree.
    """
    global _unmarked  # noqa: PLW0603 - limits are the process's, too
    limit = _limit_of(mark)
    with _starting:
        # Only here: outside, it may be the mark that another thread holds at the moment.
        own = _unmarked = _limit(0)
        member = None
        _set_limit(0, limit)
        try:
            process = start()
            member = process.pid
        finally:
            _set_limit(0, own)
            _unmarked = None
            _relieve_others(os.getpid(), member, limit, own)
    return process


def start_guardian(start: Start) -> subprocess.Popen[bytes]:
    """Start a guardian, and mark it as one for whoever ends the tree that this process is in. Blocks."""
    with _starting:  # else it might inherit the mark of what another thread starts
        process = start()
    limit = _limit(process.pid)
    if _is_mark(limit):
        _set_limit(process.pid, limit | _GUARDIAN)
    return process


_starting = threading.Lock()
_unmarked: int | None = None
"""The process's own limit while it holds the mark of what it starts."""


def _after_fork() -> None:
    """Undo in a forked child what another thread of its parent was at: that thread is not in it."""
    global _starting, _unmarked  # noqa: PLW0603 - there is no public way to reset a lock
    _starting = threading.Lock()
    if _unmarked is not None:
        _set_limit(0, _unmarked)
        _unmarked = None


os.register_at_fork(after_in_child=_after_fork)


def _relieve_others(parent: int, member: int | None, limit: int, own: int) -> None:
    """Take the mark `limit` from all descendants of `parent` that have it, but for `member`."""
    for child in _children(parent):
        if child != member and _limit(child) == limit:
            _set_limit(child, own)
            _relieve_others(child, member, limit, own)


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += [int(child) for child in file.read().split()]
    return found


def kill_tree(group: int | None, *marks: str) -> None:
    """Kill a process group and all that carry one of `marks`, and wait until they are gone. Blocks.

    Args:
        group: The process group, or None.
        *marks: Marks of trees, `RUN.NUMBER.`, or of all trees of a run, `RUN.`.
    """
    deadline = time.monotonic() + 2
    while True:
        if group is not None:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
        is_late = time.monotonic() > deadline
        members = _members(marks)
        for pid, is_guardian in members.items():
            if is_late or not is_guardian:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        if is_late or not any(map(_is_alive, members)):
            return
        time.sleep(0.005)


def _members(marks: tuple[str, ...]) -> dict[int, bool]:
    """Return the processes that carry a mark, and whether each is a guardian; none without a /proc."""
    limits = {_limit_of(mark) for mark in marks}
    runs = {_limit_of(mark) >> _NUMBER_BITS for mark in marks if mark.count(".") == 1}
    wanted = tuple(f"{MARK}={mark}".encode() for mark in marks)
    found = {}
    with contextlib.suppress(OSError):
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            limit = _limit(pid)
            if _is_mark(limit):
                own = limit & ~_GUARDIAN
                if own in limits or own >> _NUMBER_BITS in runs:
                    found[pid] = own != limit
            elif _has_variable(pid, wanted):
                found[pid] = False
    found.pop(os.getpid(), None)
    return found


def _limit_of(mark: str) -> int:
    run, number, _ = (*mark.split("."), "")[:3]
    return _LIMIT | int(run, 16) >> 31 << _NUMBER_BITS | int(number or 0) % (1 << _NUMBER_BITS)


def _is_mark(limit: int) -> bool:
    return limit >> 62 == 1


def _limit(pid: int) -> int:
    """Return the limit that may be the mark of a process, 0 being the calling one; 0 if none can be read."""
    with contextlib.suppress(OSError, AttributeError):  # gone, another user's, or no Linux
        return resource.prlimit(pid, _RLIMIT_LOCKS)[0]
    return 0


def _set_limit(pid: int, limit: int) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # the environment still tells
        _, hard = resource.prlimit(pid, _RLIMIT_LOCKS)
        resource.prlimit(pid, _RLIMIT_LOCKS, (limit, hard))


def _has_variable(pid: int, wanted: tuple[bytes, ...]) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environ:
        return any(item.startswith(wanted) for item in environ.read().split(b"\0"))
    return False


def _is_alive(pid: int) -> bool:
    """Return True unless a process is gone or a zombie, which keeps its limits."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in b"ZX"
    except OSError:
        return False


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
    """Run `guardian.py PARENT MARKS DIRECTORY...`, with orders on standard input."""
    parent, marks, *directories = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for group in _watch(int(parent), 0):
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    kill_tree(None, *marks.split(","))
    import shutil  # 5 ms, when nobody waits for them; a worker imports this module, too

    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
