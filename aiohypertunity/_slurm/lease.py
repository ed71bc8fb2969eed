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
import logging
import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._errors import TransportError
from .._threads import in_thread
from . import shell, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cluster import Cluster

_LOG = logging.getLogger("aiohypertunity.slurm")

_VERSION = 1
_OWNER = "session"

_RECENT = 300.0
"""Seconds after a heartbeat within which nothing is reported of a run that may well be alive."""

_reported: set[str] = set()


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


def _listing(workdir: str) -> str:
    """Return the command that prints the leases of this user's runs, each after its run's name."""
    return f"""\
cd {shlex.quote(workdir)} || exit 1
for ht_run in $(find ht-* -prune -type d -user "$(id -u)" 2>/dev/null); do
    if [ -f "$ht_run/lease" ]; then echo "$ht_run $(head -n 1 "$ht_run/lease")"; fi
done"""


def _clean_up(workdir: str, lease: Lease) -> str:
    """Return the command that ends a run, and removes its directory once Slurm has been told."""
    path = f"{workdir}/{lease.run}"
    remove = shell.remove_tree(path)
    if lease.keep:
        remove = f"find {shlex.quote(path)} -type f ! -name 'log.*' -exec rm -f {{}} +"
    return f"scancel --name={lease.run} && {{ {remove}; }}"


class Sweeper:
    """Ends what drivers left behind that were killed.

    Args:
        cluster: Where the work directory is.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def run(self) -> None:
        """Sweep once, beside everything else."""
        await self._cluster.prepared.wait()
        if not self._cluster.has_others:
            return
        self._cluster.has_others = False
        try:
            await self._sweep(os.path.dirname(self._cluster.directory))
        except (TransportError, TimeoutError) as error:
            _LOG.info("the runs of other drivers are left for the next start: %s", error)

    async def _sweep(self, workdir: str) -> None:
        done = await self._cluster.shell(_listing(workdir))
        fates = await in_thread(_judge_all, done.stdout, self._cluster.run)
        for lease in (lease for lease, fate in fates if fate is Fate.UNKNOWN):
            _report(workdir, lease)
        for lease in (lease for lease, fate in fates if fate is Fate.GONE):
            self._cluster.budget.spend(1, self._cluster.now())
            done = await self._cluster.command(_clean_up(workdir, lease))
            driver = f"pid {lease.driver.pid} on {lease.driver.host}"
            if done.exit_status == 0:
                _LOG.info("run %s is cancelled and removed: %s is gone", lease.run, driver)
            else:
                words = text.last_words(done.stderr)
                _LOG.warning("run %s of %s, which is gone, remains: %s", lease.run, driver, words)


def _judge_all(listing: str, own: str) -> list[tuple[Lease, Fate]]:
    here = this_driver()
    found = []
    for line in listing.splitlines():
        run, _, about = line.partition(" ")
        lease = None if run == own else parse_lease(run, about)
        if lease is not None:
            found.append((lease, judge(lease.driver, here, start_of)))
    return found


def _report(workdir: str, lease: Lease) -> None:
    if lease.run in _reported or abs(time.time() - lease.heartbeat) < _RECENT:
        return
    _reported.add(lease.run)
    path = shlex.quote(f"{workdir}/{lease.run}")
    heard = time.strftime("%Y-%m-%d %H:%M", time.localtime(lease.heartbeat))
    _LOG.warning(
        "run %s may have been left behind by pid %d on %s, last heard of at %s: if that process is gone, "
        "run `scancel --name=%s; rm -r %s`",
        lease.run,
        lease.driver.pid,
        lease.driver.host,
        heard,
        lease.run,
        path,
    )
