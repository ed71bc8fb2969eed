"""Ends runs whose drivers are proven to be gone, and reports those that may have been left behind."""

from __future__ import annotations

import logging
import os
import shlex
import time
from typing import TYPE_CHECKING

from ..._host.threads import in_thread
from ..._model.errors import TransportError
from . import shell, text
from .lease import Fate, Lease, judge, parse_lease, start_of, this_driver

if TYPE_CHECKING:
    from .cluster import Cluster

_LOG = logging.getLogger("aiohypertunity.slurm")

_RECENT = 300.0
"""Seconds after a heartbeat within which nothing is reported of a run that may well be alive."""

_reported: set[str] = set()


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
