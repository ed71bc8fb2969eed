"""The lease of a run, and what is done about runs whose driver has died.

A driver that is killed by SIGKILL leaves its jobs in Slurm's queue and its directory on the cluster's disk. So
each run's directory holds a *lease*: a line of JSON that names the process that drives it. The next start in the
same work directory lists the leases there, once, and cancels and removes what is proven to be left behind.

The proof is that the process can't exist any more: on this very machine (its machine id and its host name: the
nodes of many clusters boot one image, with one machine id), and either the machine was booted since, or no
process of this pid namespace has that pid and start time. Clocks and heartbeats prove nothing: a laptop that
sleeps comes back. What can't be proven is only reported, with the command that cleans up.

Leases of another version, or with another owner than "session", belong to runs that are to be left alone.
"""

from __future__ import annotations

import enum
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_VERSION = 1
_OWNER = "session"


class Driver(NamedTuple):
    """A process that drives a run, as its lease names it. Text is empty where the system doesn't tell.

    Attributes:
        host: Its machine's name.
        machine: Its machine's id.
        boot: What is new with each boot.
        namespace: The one in which its pid counts.
        pid: Its process id.
        start: When it was started, in clock ticks since the boot.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    start: str


def this_driver() -> Driver:
    """Return the facts of this process. Blocks for the time of a few reads from /proc."""
    pid = os.getpid()
    return Driver(
        os.uname().nodename,
        _read("/etc/machine-id") or _read("/var/lib/dbus/machine-id"),
        _read("/proc/sys/kernel/random/boot_id"),
        _namespace(),
        pid,
        start_of(pid) or "",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_of(pid: int) -> str | None:
    """Return the start time of a process; None if there is none, and "" if that can't be seen."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        pass
    # The name before the bracket may hold brackets and spaces.
    words = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return words[19] if len(words) > 19 else ""


def format_lease(run: str, driver: Driver, *, keep: bool) -> str:
    """Return a run's lease as of now, on one line.

    Args:
        run: The run's token.
        driver: Who drives it.
        keep: Whether logs of failed jobs are to be kept.
    """
    about = {"version": _VERSION, "owner": _OWNER, "token": run, **driver._asdict()}
    return json.dumps({**about, "keep": keep, "heartbeat": round(time.time())})


class Fate(enum.Enum):
    """A driver's state, as far as it is proven."""

    ALIVE = enum.auto()
    GONE = enum.auto()
    UNKNOWN = enum.auto()


class Lease(NamedTuple):
    """A lease that was found.

    Attributes:
        run: The run's token, which is the name of its directory and of its jobs.
        driver: Who drives it.
        keep: Whether logs are to be kept.
        heartbeat: When it was last renewed, by the driver's clock.
    """

    run: str
    driver: Driver
    keep: bool
    heartbeat: float


_RUN = re.compile(r"ht-[0-9a-f]{12}\Z")


def parse_lease(run: str, line: str) -> Lease | None:
    """Return the lease in a run's directory; None if it isn't one of this version for a session."""
    try:
        about: dict[str, Any] = json.loads(line)
        if (about["version"], about["owner"], about["token"]) != (_VERSION, _OWNER, run):
            return None
        driver = Driver(*(about[name] for name in Driver._fields))
        heartbeat = float(about["heartbeat"])
    except (ValueError, KeyError, TypeError):
        return None
    typed = type(driver.pid) is int and all(isinstance(w, str) for w in (*driver[:4], driver.start))
    if not typed or not _RUN.match(run):
        return None
    return Lease(run, driver, bool(about.get("keep")), heartbeat)


def judge(found: Driver, here: Driver, start_of: Callable[[int], str | None]) -> Fate:
    """Return what is known of a driver.

    Args:
        found: The one that a lease names.
        here: The one that asks.
        start_of: Gives the start time of a process here: None if there is none, "" if it can't be seen.
    """
    if not found.machine or (found.machine, found.host) != (here.machine, here.host):
        return Fate.UNKNOWN
    if not found.boot or not here.boot:
        return Fate.UNKNOWN
    if found.boot != here.boot:
        return Fate.GONE
    if not found.namespace or not found.start or found.namespace != here.namespace:
        return Fate.UNKNOWN
    start = start_of(found.pid)
    if start == "":
        return Fate.UNKNOWN
    return Fate.ALIVE if start == found.start else Fate.GONE


OTHERS = "aiohypertunity-others"
OTHERS_COMMAND = f"""\
set -- ht-*/lease
[ $# = 1 ] || echo {OTHERS}"""
"""Says whether there are leases in the current directory besides the one that was just written."""
