"""The cluster that the Slurm tests run on is a real one, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import asyncssh
import pytest
from login_node import Link, LoginNode
from slurm_cluster import (
    CGROUPS,
    ClusterError,
    Daemons,
    SlurmCluster,
    free_ports,
    missing,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WHAT_IS_MISSING = missing()
if WHAT_IS_MISSING and os.environ.get("CI") == "true":
    raise RuntimeError(WHAT_IS_MISSING)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(WHAT_IS_MISSING is not None, reason=str(WHAT_IS_MISSING)),
]

OWNER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from login_node import LoginNode
from slurm_cluster import SlurmCluster

directory = Path(sys.argv[2])
with SlurmCluster(directory, nodes=1) as cluster, LoginNode(directory, env=cluster.env) as node:
    cluster.run("sbatch", "--output=/dev/null", "--wrap=setsid sleep 1000 & sleep 1000")
    node.run("setsid sleep 1000 >/dev/null 2>&1 &")
    print(cluster.public, cluster.tag, node.user, node.home.parent, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    settings = {"SlurmdTimeout": "3", "MessageTimeout": "3"}
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), settings=settings) as cluster:
        yield cluster


@pytest.fixture
def submit(cluster: SlurmCluster) -> Iterator[Callable[..., str]]:
    def submit(script: str, *options: str) -> str:
        return cluster.run(
            "sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}"
        )

    yield submit
    cluster.run("scancel", "--user=root")
    cluster.wait_idle(30)


@pytest.fixture(scope="module")
def node(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoginNode]:
    with LoginNode(tmp_path_factory.mktemp("login"), env=cluster.env) as node:
        yield node


def state(cluster: SlurmCluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")


def wait_state(cluster: SlurmCluster, job: str, *wanted: str, timeout: float = 20) -> None:
    wait_until(
        lambda: state(cluster, job) in wanted, timeout, lambda: f"{job} is {state(cluster, job)}"
    )


def users_of(*words: str) -> list[str]:
    """Name the processes that one of the words is in the command or environment of."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if any(word.encode() in text for word in words):
            found.append(text.replace(b"\0", b" ").decode(errors="replace")[:100])
    return found


def drain(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass


def left_of(public: str, tag: str) -> list[object]:
    return [
        *users_of(public),
        *CGROUPS.glob(f"*/slurm_{tag}*"),
        *filter(Path.exists, [Path(public)]),
    ]


def test_array_takes_seconds(cluster: SlurmCluster, submit: Callable[..., str]) -> None:
    """A hundred trivial jobs are done in seconds, and cost slurmctld about one RPC each."""
    cluster.reset_rpcs()
    started = time.monotonic()
    submit("true", "--array=0-99", "--wait")
    assert time.monotonic() - started < 30
    assert cluster.rpcs_by_type()["REQUEST_SUBMIT_BATCH_JOB"] == 1
    assert cluster.rpcs() < 200


def test_memory_is_enforced(cluster: SlurmCluster, submit: Callable[..., str]) -> None:
    """A job over its memory is OUT_OF_MEMORY."""
    if not cluster.cgroups:
        pytest.skip("cgroups can't be written here")
    eater = f'{sys.executable} -c "print(len(bytearray(200_000_000)))"'
    wait_state(cluster, submit(eater, "--mem=30"), "OUT_OF_MEMORY")


def test_scancel(cluster: SlurmCluster, submit: Callable[..., str]) -> None:
    """A cancelled job is CANCELLED, and a child that left its session is gone with it."""
    if not cluster.cgroups:
        pytest.skip("without cgroups such a child stays")
    seconds = f"1000.{time.monotonic_ns()}"
    job = submit(f"setsid sleep {seconds} & wait")
    wait_until(lambda: users_of(f"sleep\0{seconds}"), 10, lambda: "no sleep")
    cluster.run("scancel", job)
    wait_state(cluster, job, "CANCELLED")
    assert not users_of(f"sleep\0{seconds}")


def test_preemption(cluster: SlurmCluster, submit: Callable[..., str]) -> None:
    """A job in `low` makes room for one in `main` and is queued again."""
    low = submit("sleep 1000", "--partition=low", "--nodes=4", "--exclusive")
    wait_state(cluster, low, "RUNNING")
    main = submit("sleep 1000", "--partition=main", "--nodes=4", "--exclusive")
    wait_state(cluster, main, "RUNNING")
    wait_state(cluster, low, "PENDING")


def test_controller_dies(cluster: SlurmCluster, submit: Callable[..., str]) -> None:
    """A job runs on while the controller is dead, and the next controller knows of it."""
    job = submit("sleep 1000")
    wait_state(cluster, job, "RUNNING")
    cluster.save_state(job)
    cluster.kill_controller()
    assert "is DOWN" in cluster.run("scontrol", "ping", check=False)
    cluster.start_controller()
    assert state(cluster, job) == "RUNNING"


def test_slurmd_dies(cluster: SlurmCluster, submit: Callable[..., str]) -> None:
    """A job whose slurmd is gone fails or is queued again, as was asked for; its processes run on."""
    victim, seconds = cluster.nodes[0], f"1000.{time.monotonic_ns()}"
    stubborn, frail = (
        submit(f"sleep {seconds}", f"--nodelist={victim}", again)
        for again in ("--requeue", "--no-requeue")
    )
    wait_until(lambda: len(users_of(f"sleep\0{seconds}")) == 2, 20, lambda: "no sleep")
    cluster.kill_slurmd(victim)
    try:
        wait_state(cluster, frail, "NODE_FAIL", timeout=60)
        assert state(cluster, stubborn) == "PENDING"
        assert len(users_of(f"sleep\0{seconds}")) == 2
    finally:
        cluster.start_slurmd(victim)


def test_user_can_submit_over_ssh(node: LoginNode) -> None:
    """An ordinary user logs in, submits, and finds what the job wrote."""
    node.run('sbatch --wait --wrap="id -un; pwd" --output=out.txt')
    assert node.run("cat out.txt").split() == [node.user, str(node.home)]


def test_login_node_reboots(node: LoginNode) -> None:
    """What a session left running is gone after a reboot, and the same key opens the door again."""
    node.run("setsid sleep 1000 >/dev/null 2>&1 &")
    assert node.run("pgrep -u $USER sleep")
    node.kill()
    with pytest.raises(ClusterError, match="refused"):
        node.run("true")
    node.start()
    assert node.run("pgrep -u $USER sleep || echo none") == "none"


def test_sshd_options(tmp_path: Path) -> None:
    """A login node can be had with another shell, and with lines of sshd's added or left out."""
    options = {"Subsystem": None, "SetEnv": "LINE=added"}
    with LoginNode(tmp_path, shell="/bin/sh", options=options) as node:
        assert node.run("echo $0 $LINE").endswith("sh added")
        assert "Subsystem" not in (node.home.parent / "sshd_config").read_text()


def test_link_cuts_and_heals(node: LoginNode) -> None:
    """A link that is cut resets what goes through it and refuses the rest until it's restored."""
    with (
        Link(node.port) as link,
        socket.create_connection((node.host, link.port), 10) as connection,
    ):
        assert connection.recv(7) == b"SSH-2.0"
        link.cut()
        with pytest.raises(ConnectionResetError):
            drain(connection)
        with pytest.raises(ClusterError, match="refused"):
            node.run("true", port=link.port)
        link.restore()
        assert node.run("echo back", port=link.port) == "back"


def test_link_freezes(node: LoginNode) -> None:
    """A frozen link says nothing, and carries what it held back once it's restored."""
    with Link(node.port) as link:
        link.freeze()
        with socket.create_connection((node.host, link.port), 10) as connection:
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(7)
            assert link.messages == 0
            link.restore()
            connection.settimeout(10)
            assert connection.recv(7) == b"SSH-2.0"
            assert link.messages == 1
            assert link.bytes > 7


def test_link_delays(node: LoginNode) -> None:
    """A delay makes the way longer without making it narrower."""
    with Link(node.port) as link:
        link.delay = 0.1
        started = time.monotonic()
        node.run("head -c 5000000 /dev/zero | wc -c; head -c 5000000 /dev/zero >&2", port=link.port)
        assert 0.5 < time.monotonic() - started < 10
        assert link.bytes > 5_000_000


def test_asyncssh_logs_in(node: LoginNode) -> None:
    """The key and the known hosts are good for asyncssh too, also across a link."""

    async def whoami(port: int) -> str:
        files = {"client_keys": [str(node.client_key)], "known_hosts": str(node.known_hosts)}
        async with asyncssh.connect(
            node.host, port, username=node.user, config=None, **files
        ) as ssh:
            return str((await ssh.run("id -un", check=True)).stdout).strip()

    with Link(node.port) as link:
        assert asyncio.run(whoami(link.port)) == node.user


def test_accounting(tmp_path: Path) -> None:
    """Sacct knows a job's end; it fails while slurmdbd is away, and knows as much afterwards."""
    with SlurmCluster(tmp_path, nodes=1, accounting=True) as cluster:
        cluster.run("sbatch", "--wait", "--output=/dev/null", "--wrap=exit 3", check=False)
        look = ["sacct", "-nXP", "-j1", "--format=State,ExitCode"]
        wait_until(lambda: cluster.run(*look) == "FAILED|3:0", 20, lambda: cluster.run(*look))
        cluster.stop_accounting()
        with pytest.raises(ClusterError, match="sacct: error"):
            cluster.run(*look)
        cluster.start_accounting()
        assert cluster.run(*look) == "FAILED|3:0"


def test_two_clusters(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Clusters side by side don't meet, though their jobs have the same ids."""
    with SlurmCluster(tmp_path, nodes=2) as other:
        assert (
            other.run("sbatch", "--parsable", "--output=/dev/null", "--wait", "--wrap=true") == "1"
        )
        assert other.run("squeue", "-h", "--states=all", "-o%i") == "1"
    assert "is UP" in cluster.run("scontrol", "ping")


@pytest.mark.parametrize(
    "cgroups", [pytest.param("auto", id="cgroups"), pytest.param(False, id="no-cgroups")]
)
def test_nothing_left_after_stop(tmp_path: Path, cgroups: bool | Literal["auto"]) -> None:
    """Stopping ends jobs too, whatever session they made, and removes the cgroups."""
    with SlurmCluster(tmp_path, nodes=1, cgroups=cgroups) as cluster:
        job = cluster.run(
            "sbatch", "--parsable", "-o/dev/null", "--wrap=setsid sleep 1000 & sleep 1000"
        )
        wait_state(cluster, job, "RUNNING")
        public, tag = str(cluster.public), cluster.tag
    assert not left_of(public, tag)


def test_nothing_left_after_sigkill(tmp_path: Path) -> None:
    """When the process that owns it all is killed, daemons, jobs, cgroups and the user go too."""
    argv = [sys.executable, "-c", OWNER, str(Path(__file__).parents[2]), str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        public, tag, user, home = owner.stdout.readline().split()
        assert left_of(public, tag)
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not left_of(public, tag), 10, lambda: f"left: {left_of(public, tag)}")
    wait_until(lambda: not left_of(home, tag), 10, lambda: f"left: {left_of(home, tag)}")
    assert subprocess.run(["id", user], capture_output=True, check=False).returncode == 1


@pytest.mark.timeout(120)
def test_by_hand() -> None:
    """`python -m tests.slurm_cluster` prints what to export, and Ctrl-C leaves nothing of it."""
    command = [sys.executable, "-m", "tests.slurm_cluster", "--nodes", "1"]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, _, conf = process.stdout.readline().removeprefix("export ").strip().partition("=")
        nodes = subprocess.check_output(["sinfo", "-hN", "-o", "%T"], env=os.environ | {name: conf})
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert set(nodes.split()) == {b"idle"}
    assert not Path(conf).parent.exists()


def test_failed_start_tells_why_and_leaves_nothing(tmp_path: Path) -> None:
    """A daemon that doesn't start is reported with its last words, and those before it are ended."""
    cluster = SlurmCluster(tmp_path, settings={"SelectType": "select/nonsense"})
    with pytest.raises(ClusterError, match=r"fatal: .*select/nonsense"), cluster:
        pass
    assert not left_of(str(cluster.public), cluster.tag)


def test_orphans_go_with_their_supervisor(tmp_path: Path) -> None:
    """A grandchild that detached from everything is killed with the rest."""
    daemons = Daemons(tmp_path / "log")
    seconds = f"1000.{time.monotonic_ns()}"
    daemons.start("shell", ["sh", "-c", f"setsid sleep {seconds} &"], tmp_path / "log", {})
    wait_until(lambda: users_of(f"sleep\0{seconds}"), 10, lambda: "no sleep")
    assert daemons.exit_code("shell") == 0
    daemons.close()
    assert not users_of(f"sleep\0{seconds}")


def test_free_ports_are_free_and_different() -> None:
    """Ports can be bound, and none comes twice."""
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as attempt:
            attempt.bind(("127.0.0.1", port))
