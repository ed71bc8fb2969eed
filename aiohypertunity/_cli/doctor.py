"""`python -m aiohypertunity doctor`: whether Slurm can be used from here, point by point.

Each check is one thing that goes wrong for people: it says what was found, and what to do about it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import getpass
import sys
from typing import TYPE_CHECKING, NamedTuple

from .._executors.slurm import text, trust
from .._executors.slurm.cluster import Cluster
from .._model.errors import HypertunityError, TransportError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .._model.slurm import Slurm


class Check(NamedTuple):
    """A line of the table.

    Attributes:
        name: What was looked at.
        ok: Whether it's as it should be; None if it's only to know.
        found: What was found, or what to do.
    """

    name: str
    ok: bool | None
    found: str


async def examine(slurm: Slurm) -> list[Check]:
    """Looks at a cluster; runs one tiny job on it."""
    cluster = Cluster(slurm, _ignore, _ignore, _ignore)
    checks = []
    try:
        async for check in _checks(slurm, cluster):
            checks.append(check)
            if check.ok is False:
                break
    except (TransportError, TimeoutError) as error:
        checks.append(Check("connection", False, str(error) or "no answer in time"))
    finally:
        await cluster.aclose()
    return checks


def _ignore(_: object) -> None:
    """What else is said of the link stands in the check that it makes fail."""


async def _checks(slurm: Slurm, cluster: Cluster) -> AsyncIterator[Check]:
    yield Check("host", None, slurm.host or "this machine")
    found = await _run(cluster, "command -v sbatch || exit 1; sbatch --version || :")
    lines = found.stdout.split("\n")
    if not found.ok:
        yield Check(
            "sbatch", False, "isn't on PATH: Slurm(setup=...) takes shell lines that put it there"
        )
        return
    version = f" ({lines[1]})" if len(lines) > 1 else ""
    yield Check("sbatch", True, f"{lines[0]}{version}")
    found = await _run(cluster, text.SITE_COMMAND)
    hopeless = text.hopeless(found.stdout)
    if hopeless or not found.ok:
        words = hopeless or text.last_words(text.complaint(found.stdout))
        yield Check("slurmctld", False, words)
        return
    site = text.parse_site(found.stdout)
    yield Check("slurmctld", True, f"answers; Slurm {site.version}")
    yield Check(
        "limits", None, f"{site.max_array} jobs an array, {site.kill_wait:g} s from TERM to KILL"
    )
    yield await _accounting(cluster, site)
    yield await _workdir(cluster)
    yield await _job(slurm)


class _Found(NamedTuple):
    ok: bool
    stdout: str
    stderr: str


async def _run(cluster: Cluster, command: str) -> _Found:
    done = await cluster.command(command)
    return _Found(done.exit_status == 0, done.stdout.strip(), done.stderr.strip())


async def _accounting(cluster: Cluster, site: text.Site) -> Check:
    if not site.accounting:
        return Check("accounting", None, "there is none; we do without")
    # The engine's own question, with all its options: a sacct that refuses one is of no use to it.
    found = await _run(cluster, text.account_command(["1"], "now-60seconds"))
    words = (
        "answers"
        if found.ok
        else f"doesn't answer ({text.last_words(found.stderr)}); we do without"
    )
    return Check("accounting", None, words)


async def _workdir(cluster: Cluster) -> Check:
    path = cluster.workdir()
    command = f"umask 077; mkdir -p {path} && cd {path} && : >doctor.$$ && rm doctor.$$ && pwd && df -Pk . | tail -1"
    found = await _run(cluster, f"{{ {command}; }} || exit 1\n{trust.DIRECTORIES_COMMAND}")
    if not found.ok:
        words = text.last_words(found.stderr)
        return Check(
            "work directory", False, f"can't be written: {words}; name another by --workdir"
        )
    unsafe = trust.unsafe(found.stdout)
    if unsafe is not None:
        return Check("work directory", False, f"{unsafe}; or name another by --workdir")
    directory, disk = found.stdout.split("\n")[:2]
    columns = disk.split()
    free = (
        f", {int(columns[3]) / (1 << 20):.1f} GB free"
        if len(columns) > 3 and columns[3].isdigit()
        else ""
    )
    return Check("work directory", True, f"{directory} can be written{free}")


# As text, since a function of ours isn't there to be found, and any Python understands it.
_ABOUT = (
    "__import__('platform').node(), __import__('platform').python_version(), "
    "__import__('sys').executable, str(__import__('cloudpickle').__version__)"
)


async def _job(slurm: Slurm) -> Check:
    """One tiny job: whether a node sees the work directory, and which Python is there."""
    from .._model.jobs import SlurmJob
    from .._runtime.scheduler import Scheduler

    async with Scheduler(n_parallel=1, slurm=slurm) as scheduler:
        [handle] = scheduler.dispatch(SlurmJob(eval, (_ABOUT,), queue_timeout=120, timeout=60))
        result = await handle
    if result.error is not None:
        return Check("a job", False, str(result.error))
    node, python, executable, cloudpickle = result.data
    same = python.rpartition(".")[0] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    hint = (
        ""
        if same
        else "; another minor version than here: only functions named by module will work"
    )
    where = f"ran on {result.host or node}, which sees the work directory"
    return Check(
        "a job", True, f"{where}: Python {python} ({executable}), cloudpickle {cloudpickle}{hint}"
    )


def table(checks: list[Check]) -> str:
    """The checks as lines to read."""
    width = max(len(check.name) for check in checks)
    words = {True: "ok", False: "WRONG", None: "-"}
    return "\n".join(
        f"{check.name:<{width}}  {words[check.ok]:<5}  {check.found}" for check in checks
    )


def main(slurm: Slurm) -> int:
    """Examines a cluster and prints what was found. On a terminal, it asks what the cluster asks.

    Returns:
        The exit code: 1 if anything is wrong.
    """
    if slurm.host is not None and sys.stdin.isatty():
        slurm = dataclasses.replace(
            slurm, connect={"prompt": getpass.getpass, **(slurm.connect or {})}
        )
    try:
        checks = asyncio.run(examine(slurm))
    except HypertunityError as error:
        checks = [Check("cluster", False, str(error))]
    sys.stdout.write(table(checks) + "\n")
    return int(any(check.ok is False for check in checks))
