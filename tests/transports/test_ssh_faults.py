# ruff: noqa: F811 - fixtures are imported by their names
"""The link to a cluster breaks: nothing is lost, and nothing runs twice."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pytest
from helpers import until
from login_node import Link, LoginNode
from ssh_kit import cluster, connect, environment, needs_login_node, node, slurm_at  # noqa: F401

import aiohypertunity as ht
from aiohypertunity._executors.slurm import canceller, shell
from aiohypertunity._transports.protocol import LinkLost
from aiohypertunity._transports.ssh import SSH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from slurm_cluster import SlurmCluster

pytestmark = needs_login_node

KILL_WAIT = 3
"""The test cluster's, in seconds."""


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """What is defined here isn't installed on the cluster."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def link(node: LoginNode) -> Iterator[Link]:
    """A link to the login node."""
    with Link(node.port) as link:
        yield link


def tell(number: int, seconds: float = 0.0) -> int:
    """Leaves a line for each time that it ran."""
    import time
    from pathlib import Path

    with Path("~/ran").expanduser().open("a") as file:
        file.write(f"{number}\n")
    time.sleep(seconds)
    return number


def runs(node: LoginNode) -> Counter[str]:
    """How many times each number was told since the last time."""
    return Counter(node.run("cat ran; rm -f ran").split())


@contextlib.asynccontextmanager
async def link_events(scheduler: ht.Scheduler) -> AsyncIterator[list[str]]:
    """The names of the events of the link."""
    seen: list[str] = []

    async def listen() -> None:
        async for event in stream:
            if isinstance(event, ht.LinkDown | ht.LinkUp):
                seen.append(type(event).__name__)

    stream = scheduler.events()
    task = asyncio.create_task(listen())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("fault", ["cut", "reboot", "freeze"])
async def test_link_fails_while_jobs_run(
    node: LoginNode, cluster: SlurmCluster, link: Link, fault: str
) -> None:
    """A link that was cut, hung, or whose far end was rebooted comes back, and so do the results."""
    async with (
        ht.Scheduler(1, slurm=slurm_at(node, cluster, link.port)) as scheduler,
        link_events(scheduler) as events,
    ):
        handles = scheduler.dispatch([ht.SlurmJob(tell, (i, 2.0)) for i in range(4)])
        for handle in handles:
            await handle.wait_started()
        {"cut": link.cut, "reboot": node.kill, "freeze": link.freeze}[fault]()
        if fault != "freeze":
            await until(lambda: events == ["LinkDown"])
        await asyncio.sleep(2.5)
        assert {handle.status for handle in handles} == {ht.Status.RUNNING}
        {"cut": link.restore, "reboot": node.start, "freeze": link.restore}[fault]()
        returned = time.monotonic()
        assert [(await handle).data for handle in handles] == [0, 1, 2, 3]
        assert time.monotonic() - returned < 3
        assert events == ([] if fault == "freeze" else ["LinkDown", "LinkUp"])
    assert runs(node) == Counter("0123")


async def test_host_key_changes_while_jobs_run(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A login node that comes back with another key is refused and waited for; no job fails because of it."""
    with LoginNode(tmp_path, env=environment(cluster)) as node:
        async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
            events = scheduler.events()
            running, waiting = scheduler.dispatch(
                [
                    ht.SlurmJob(tell, (1, 2.0)),
                    ht.SlurmJob(tell, (2,), meta={"options": {"begin": "now+15"}}),
                ]
            )
            await running.wait_started()
            node.kill()
            node.swap_host_key()
            node.start()
            async with asyncio.timeout(30):
                async for event in events:
                    if isinstance(event, ht.LinkDown) and "has CHANGED" in event.reason:
                        break
            await until(lambda: "has CHANGED" in str(waiting.pending_reason))
            assert running.status is ht.Status.RUNNING
            node.kill()
            node.swap_host_key()
            node.start()
            assert [(await handle).data for handle in (running, waiting)] == [1, 2]
        assert runs(node) == Counter("12")


async def test_wrong_host_key_at_first(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A host that shows a wrong key when it is first connected fails the jobs at once."""
    with LoginNode(tmp_path, env=environment(cluster)) as node:
        node.kill()
        node.swap_host_key()
        node.start()
        async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
            [handle] = scheduler.dispatch(ht.SlurmJob(tell, (1,)))
            result = await asyncio.wait_for(handle, 20)
        assert type(result.error) is ht.TransportError
        assert "has CHANGED" in str(result.error)


async def test_link_fails_while_jobs_are_submitted(
    node: LoginNode, cluster: SlurmCluster, link: Link
) -> None:
    """However much of a submission got through, its jobs run once."""
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster, link.port)) as scheduler:
        assert [r.data async for r in _collected(scheduler, [0])] == [0]
        sent = link.bytes
        for number, n_bytes in enumerate((1, 3_000, 6_000, 9_000, 12_000), 1):
            sent = link.bytes
            [handle] = scheduler.dispatch(ht.SlurmJob(tell, (number,)))
            await until(lambda n=n_bytes: link.bytes > sent + n or handle.status.is_final)  # type: ignore[misc]
            link.cut()
            await asyncio.sleep(0.3)
            link.restore()
            assert (await handle).data == number
    assert runs(node) == Counter("012345")


async def test_many_jobs_and_cuts(node: LoginNode, cluster: SlurmCluster, link: Link) -> None:
    """Two hundred jobs in flight while the link is cut three times: every result arrives once."""
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster, link.port)) as scheduler:
        scheduler.dispatch([ht.SlurmJob(tell, (i,)) for i in range(200)])
        seen: list[int] = []
        async for result in scheduler.collect(timeout=60):
            seen.append(result.data)
            if len(seen) in {10, 80, 150}:
                link.cut()
                await asyncio.sleep(0.2)
                link.restore()
        assert sorted(seen) == list(range(200))
    assert runs(node) == Counter(map(str, range(200)))


async def test_giving_up(node: LoginNode, cluster: SlurmCluster, link: Link) -> None:
    """After `give_up_after` seconds, and not before, jobs fail; when the link is back, Slurm is told."""
    slurm = slurm_at(node, cluster, link.port, give_up_after=1.0)
    async with ht.Scheduler(1, slurm=slurm) as scheduler:
        [handle] = scheduler.dispatch(ht.SlurmJob(time.sleep, (300,)))
        await handle.wait_started()
        link.cut()
        cut_at = time.monotonic()
        result = await handle
        assert time.monotonic() - cut_at >= 1.0
        assert type(result.error) is ht.TransportError
        assert "more than 1 s" in str(result.error)
        link.restore()
        await asyncio.to_thread(cluster.wait_idle, 30)


async def test_cancelled_while_the_link_is_down(
    node: LoginNode, cluster: SlurmCluster, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It isn't over before Slurm has ended it, however long the link is down."""
    monkeypatch.setattr(canceller, "_GONE_WITHIN", 0.0)
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster, link.port)) as scheduler:
        [handle] = scheduler.dispatch(ht.SlurmJob(time.sleep, (300,)))
        await handle.wait_started()
        link.cut()
        await asyncio.sleep(0.5)
        handle.cancel()
        await asyncio.sleep(KILL_WAIT + 2)
        assert handle.status is ht.Status.CANCELLING
        link.restore()
        monkeypatch.undo()
        assert (await asyncio.wait_for(handle, 30)).status is ht.Status.CANCELLED
        await asyncio.to_thread(cluster.wait_idle, 30)


async def test_leaving_while_the_link_is_down(
    node: LoginNode, cluster: SlurmCluster, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who leaves doesn't wait for a link for ever, and is told how to cancel what is left."""
    monkeypatch.setattr(canceller, "_GONE_WITHIN", 1.0)
    with pytest.warns(ResourceWarning, match="scancel --name=ht-"):
        async with ht.Scheduler(1, slurm=slurm_at(node, cluster, link.port)) as scheduler:
            [handle] = scheduler.dispatch(ht.SlurmJob(time.sleep, (300,)))
            await handle.wait_started()
            link.cut()
            await asyncio.sleep(0.5)
            left_at = time.monotonic()
    assert time.monotonic() - left_at < 60
    assert handle.status is ht.Status.CANCELLED
    cluster.run("scancel", str(handle.slurm_id))
    cluster.wait_idle(30)
    node.run("rm -rf .aiohypertunity/*")


async def test_clocks_pause(node: LoginNode, cluster: SlurmCluster, link: Link) -> None:
    """The time for which the link is down isn't counted against a job that waits."""
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster, link.port)) as scheduler:
        meta = {"options": {"begin": "now+6"}}
        [handle] = scheduler.dispatch(ht.SlurmJob(tell, (1,), meta=meta, queue_timeout=5.0))
        await until(lambda: handle.slurm_id is not None)
        link.cut()
        await asyncio.sleep(4)
        link.restore()
        assert (await handle).data == 1
    runs(node)


async def test_watcher_killed(node: LoginNode, cluster: SlurmCluster) -> None:
    """A watcher that somebody killed is started again."""
    async with ht.Scheduler(1, slurm=slurm_at(node, cluster)) as scheduler:
        for number in range(2):
            [handle] = scheduler.dispatch(ht.SlurmJob(tell, (number, 1.0)))
            await handle.wait_started()
            node.run("pkill -9 -f '[h]t_dir=.PWD quiet'")
            assert (await handle).data == number
    runs(node)


async def test_lease(node: LoginNode, link: Link) -> None:
    """A watcher whose client is gone without a word leaves when its lease is over."""
    assert "60000" in shell.watcher("/tmp")
    ssh = SSH(f"{node.user}@{node.host}:{link.port}", connect(node), lambda event: None)
    count = "pgrep -c -u \"$(id -u)\" -f '[h]t_dir=.PWD quiet' || :"
    async with ssh.watch(shell.watcher("/tmp").replace("60000", "2000")) as lines:
        for _ in range(6):
            lines.send("")
            await asyncio.sleep(0.5)
        assert node.run(count) != "0"
        link.freeze()
        await until(lambda: node.run(count) == "0")
        link.cut()
    await ssh.aclose()


async def test_fetch_goes_on(node: LoginNode, link: Link) -> None:
    """A large file that was interrupted goes on from there, and is right."""
    node.run("head -c 50000000 /dev/urandom > large")
    ssh = SSH(f"{node.user}@{node.host}:{link.port}", connect(node), lambda event: None)
    path = f"{node.home}/large"
    task = asyncio.create_task(ssh.fetch(path))
    await until(lambda: link.bytes > 20_000_000)
    link.cut()
    with pytest.raises(LinkLost):
        await task
    before = link.bytes
    link.restore()
    here = await ssh.fetch(path)
    assert link.bytes - before < 40_000_000
    digest = hashlib.sha256(Path(here).read_bytes()).hexdigest()
    assert node.run("sha256sum <large").split()[0] == digest
    await ssh.aclose()
    node.run("rm large")


@pytest.fixture
def far_away(tmp_path: Path) -> Iterator[tuple[list[str], str, list[str]]]:
    """A network namespace: what runs a program in it, how it sees this one, and the name of its cable."""
    name = f"ht{secrets.token_hex(3)}"
    octet = 1 + secrets.randbelow(250)
    here, there = f"10.213.{octet}.1", f"10.213.{octet}.2"
    lines = [
        f"netns add {name}",
        f"link add {name}a type veth peer name {name}b netns {name}",
        f"address add {here}/30 dev {name}a",
        f"link set {name}a up",
        f"-n {name} address add {there}/30 dev {name}b",
        f"-n {name} link set {name}b up",
        f"-n {name} link set lo up",
    ]
    try:
        for line in lines:
            done = subprocess.run(
                ["ip", *line.split()], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield ["ip", "netns", "exec", name], here, ["ip", "link", "set", f"{name}a"]
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", f"{name}a"], capture_output=True, check=False)


DRIVER = """
import asyncio, json, sys, time
import aiohypertunity as ht

async def main(host, connect, python):
    async with ht.Scheduler(1, slurm=ht.Slurm(host, connect=connect, python=python)) as scheduler:
        handles = scheduler.dispatch([ht.SlurmJob(time.sleep, (1.0,)) for _ in range(3)])
        for handle in handles:
            await handle.wait_started()
        print("running", flush=True)
        print([(await handle).ok for handle in handles], flush=True)

asyncio.run(main(*json.loads(sys.argv[1])))
"""


@pytest.mark.timeout(240)
async def test_cable(cluster: SlurmCluster, tmp_path: Path, far_away: Any) -> None:
    """Across two network namespaces, jobs survive a cable that is pulled for a minute."""
    within, address, cable = far_away
    options = {"ListenAddress": "0.0.0.0"}
    with LoginNode(tmp_path, env=environment(cluster), options=options) as node:
        python = slurm_at(node, cluster).python
        facts = json.dumps([f"{node.user}@{address}:{node.port}", connect(node), python])
        program = [*within, sys.executable, "-c", DRIVER, facts]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = await asyncio.create_subprocess_exec(
            *program, stdout=asyncio.subprocess.PIPE, env=env
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"running\n"
        subprocess.run([*cable, "down"], check=True)
        await asyncio.sleep(60)
        subprocess.run([*cable, "up"], check=True)
        assert await process.stdout.readline() == b"[True, True, True]\n"
        assert await process.wait() == 0


async def _collected(scheduler: ht.Scheduler, numbers: list[int]) -> AsyncIterator[ht.Result[int]]:
    batch = scheduler.dispatch([ht.SlurmJob(tell, (number,)) for number in numbers])
    async for result in batch.collect():
        yield result
