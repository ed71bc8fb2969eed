"""Jobs on a real Slurm across a real sshd on loopback, beside the same jobs by a local `sbatch`.

Both ends share two CPUs here, encryption included: across a network the far end has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import cloudpickle

import aiohypertunity as ht
from aiohypertunity._transports.ssh import SSH

from . import _tasks
from ._harness import Figures, Row, Stopwatch, benchmark, in_turns
from .slurm import Holds, a_cluster, new_directory, settle

N_JOBS = 100
N_TURNS = 3
CUT, WAIT = 10.0, 60.0
LARGE = 500_000_000
_LOGIN = "AIOHYPERTUNITY_BENCH_LOGIN"

cloudpickle.register_pickle_by_value(_tasks)


@contextlib.contextmanager
def a_login_node() -> Iterator[None]:
    """A cluster, and a login node in front of it that contenders find in `login`."""
    from login_node import LoginNode
    from slurm_cluster import SlurmCluster
    from ssh_kit import connect, environment, python_for_all

    with a_cluster():
        cluster = SlurmCluster(Path(tempfile.gettempdir()))
        cluster.public = Path(os.environ["SLURM_CONF"]).parent
        cluster.env = {"SLURM_CONF": os.environ["SLURM_CONF"]}
        env = environment(cluster)
        with LoginNode(new_directory(), env=env) as node:
            facts = {
                "host": node.host, "user": node.user, "port": node.port, "home": str(node.home),
                "connect": connect(node), "python": python_for_all(cluster), "env": env,
            }  # fmt: skip
            os.environ[_LOGIN] = json.dumps(facts)
            yield


def login() -> Any:
    """What is known of the login node."""
    return json.loads(os.environ[_LOGIN])


def across(port: int | None = None) -> ht.Slurm:
    """The cluster across SSH."""
    at = login()
    host = f"{at['user']}@{at['host']}:{port or at['port']}"
    return ht.Slurm(host, connect=at["connect"], python=at["python"])


def local() -> ht.Slurm:
    """The same cluster by a local sbatch, and the same Python."""
    os.environ["PYTHONPATH"] = login()["env"]["PYTHONPATH"]
    return ht.Slurm(workdir=new_directory(), python=login()["python"])


@benchmark
def ssh_jobs() -> list[Row]:
    """A hundred callables, and how soon each result is known."""
    with a_login_node():
        runs = in_turns({"ours": ours, "local sbatch": by_local_sbatch}, n_turns=5)
        peer = in_turns(
            {"ours": ours, "a connection and a poll a job": one_by_one},
            n_turns=N_TURNS, warm_up=False,
        )  # fmt: skip
        ends = in_turns({"ours": ours_ends}, n_turns=N_TURNS, warm_up=False)
    what = f"{N_JOBS} callables over SSH, from dispatch to the last result"
    return [
        runs.row(what, "s", "≤", 1.15, unit="s"),
        peer.row(what, "s", "≤", 1.0, unit="s"),
        ends.row("from the end of a job to its result, over SSH", "s", "<", 0.5, unit="s", of_ratio=False),
        runs.row(
            f"event-loop blocking time during {N_JOBS} jobs over SSH: 99th percentile",
            "hold", "<", 5, unit="ms", of_ratio=False,
        ),
    ]  # fmt: skip


def ours() -> AsyncIterator[Figures]:
    return _hundred(across)


def by_local_sbatch() -> AsyncIterator[Figures]:
    return _hundred(local)


async def _hundred(make: Any) -> AsyncIterator[Figures]:
    while True:
        await asyncio.to_thread(settle)
        async with ht.Scheduler(slurm=make()) as scheduler:
            # The first connection isn't counted: it stands as long as the scheduler does.
            await scheduler.dispatch(ht.SlurmJob(_tasks.double, (0,)))[0]
            await asyncio.to_thread(settle)
            holds = Holds()
            with Stopwatch() as watch:
                batch = scheduler.dispatch(
                    [ht.SlurmJob(_tasks.double, (i,)) for i in range(N_JOBS)]
                )
                data = [result.data async for result in batch.collect()]
            hold = holds.stop()
        assert sorted(data) == [2 * i for i in range(N_JOBS)]
        yield {"s": watch.seconds, "hold": hold}


async def one_by_one() -> AsyncIterator[Figures]:
    """The way of covalent-slurm: each job has a connection, an `sbatch` and a polling `scontrol`."""
    at = login()
    few = asyncio.Semaphore(8)  # sshd drops log-ins when there are more

    async def run(number: int) -> int:
        name = f"{at['home']}/job-{number}"
        code = f"import pickle; f, a = pickle.load(open('{name}.in', 'rb')); r = f(*a); "
        code += f"pickle.dump(r, open('{name}.out', 'wb'))"
        script = f'#!/bin/sh\nexec {at["python"]} -c "{code}"\n'
        async with few:
            connection = await asyncssh.connect(
                at["host"], at["port"], username=at["user"], **at["connect"]
            )
        async with connection, connection.start_sftp_client() as sftp:
            async with sftp.open(f"{name}.in", "wb") as file:
                await file.write(cloudpickle.dumps((_tasks.double, (number,))))
            sbatch = f"sbatch --parsable --output={name}.log"
            job = str((await connection.run(sbatch, input=script, check=True)).stdout).strip()
            while True:
                said = str((await connection.run(f"scontrol show job {job}")).stdout)
                if "JobState=PENDING" not in said and "JobState=RUNNING" not in said:
                    break
                await asyncio.sleep(1)
            async with sftp.open(f"{name}.out", "rb") as file:
                result: int = pickle.loads(await file.read())
        return result

    while True:
        await asyncio.to_thread(settle)
        with Stopwatch() as watch:
            data = await asyncio.gather(*map(run, range(N_JOBS)))
        assert data == [2 * i for i in range(N_JOBS)]
        yield {"s": watch.seconds}


async def ours_ends() -> AsyncIterator[Figures]:
    while True:
        async with ht.Scheduler(slurm=across()) as scheduler:
            scheduler.dispatch([ht.SlurmJob(_tasks.end_after, (0.5 + 0.3 * i,)) for i in range(16)])
            lags = [time.time() - result.data async for result in scheduler.collect()]
        yield {"s": statistics.median(lags)}


@benchmark
def ssh_link() -> list[Row]:
    """What waiting costs, and how soon results come when the link is back."""
    with a_login_node():
        waits = in_turns({"ours": waiting}, n_turns=1, warm_up=False)
        cuts = in_turns({"ours": cut}, n_turns=N_TURNS, warm_up=False)
    return [
        waits.row(
            f"messages per minute while {N_JOBS} jobs wait", "messages", "<", 70, of_ratio=False
        ),
        waits.row(
            f"bytes per minute while {N_JOBS} jobs wait", "KB", "<", 100, unit="KB", of_ratio=False
        ),
        cuts.row(
            f"link cut for {CUT:g} s: from its return to the first result",
            "s", "<", 3, unit="s", of_ratio=False,
        ),
    ]  # fmt: skip


async def waiting() -> AsyncIterator[Figures]:
    from login_node import Link

    with Link(login()["port"]) as link:
        while True:
            async with ht.Scheduler(slurm=across(link.port)) as scheduler:
                meta = {"options": {"hold": True}}
                jobs = [ht.SlurmJob(_tasks.double, (i,), meta=meta) for i in range(N_JOBS)]
                batch = scheduler.dispatch(jobs)
                while batch[-1].slurm_id is None:
                    await asyncio.sleep(0.05)
                # Until it's sure that nothing happens.
                await asyncio.sleep(20)
                messages, n_bytes = link.messages, link.bytes
                await asyncio.sleep(WAIT)
                yield {"messages": link.messages - messages, "KB": (link.bytes - n_bytes) / 1e3}


async def cut() -> AsyncIterator[Figures]:
    from login_node import Link

    with Link(login()["port"]) as link:
        while True:
            async with ht.Scheduler(slurm=across(link.port)) as scheduler:
                batch = scheduler.dispatch(
                    [ht.SlurmJob(_tasks.end_after, (3.0,)) for _ in range(4)]
                )
                for handle in batch:
                    await handle.wait_started()
                link.cut()
                await asyncio.sleep(CUT)
                link.restore()
                with Stopwatch() as watch:
                    await anext(aiter(batch.collect()))
            yield {"s": watch.seconds}


@benchmark
def ssh_large() -> list[Row]:
    """A large result."""
    with a_login_node():
        path = Path(login()["home"]) / "large"
        with path.open("wb") as file:
            subprocess.run(["head", "-c", str(LARGE), "/dev/urandom"], stdout=file, check=True)
        path.chmod(0o644)
        runs = in_turns({"ours": fetch, "scp": scp}, n_turns=5)
    what = f"a {LARGE // 1_000_000} MB result"
    return [
        runs.row(what, "s", "≤", 1.3, unit="s"),
        runs.against().row(f"{what}: memory used", "MB", "<", 64, unit="MB", of_ratio=False),
        runs.against().row(
            f"{what}: event-loop blocking time, 99th percentile",
            "hold",
            "<",
            5,
            unit="ms",
            of_ratio=False,
        ),
    ]


async def fetch() -> AsyncIterator[Figures]:
    at = login()
    ssh = SSH(f"{at['user']}@{at['host']}:{at['port']}", at["connect"], lambda _: None)
    try:
        await ssh.run(":", timeout=30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        while True:
            holds = Holds()
            with Stopwatch() as watch:
                here = await ssh.fetch(f"{at['home']}/large")
            hold = holds.stop()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert os.path.getsize(here) == LARGE
            os.unlink(here)
            yield {"s": watch.seconds, "hold": hold, "MB": grown / 1024}
    finally:
        await ssh.aclose()


def scp() -> Iterator[Figures]:
    at = login()
    files = at["connect"]
    options = [
        "-q", "-F", "none", "-oBatchMode=yes", f"-oIdentityFile={files['client_keys'][0]}",
        f"-oUserKnownHostsFile={files['known_hosts']}", "-P", str(at["port"]),
    ]  # fmt: skip
    while True:
        here = new_directory() / "large"
        source = f"{at['user']}@{at['host']}:{at['home']}/large"
        with Stopwatch() as watch:
            subprocess.run(["scp", *options, source, str(here)], check=True)
        here.unlink()
        yield {"s": watch.seconds}
