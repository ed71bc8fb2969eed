"""A real Slurm cluster on one machine, for the time of a test run.

Slurm lets one host play many nodes: each has a slurmd with a name and a port of its own. What the
package's defaults make slow (a job that asks for no memory takes a whole node, the scheduler sleeps
between rounds, a dead node is noticed after five minutes) is set so that tests take seconds.

Nothing may outlive the test process, however that dies. So it starts no daemon itself: a small
supervisor does, which is this file run with `supervise`. Linux hands it every orphan among its
descendants (``PR_SET_CHILD_SUBREAPER``), so slurmstepd and what a job left in a session of its own
can't get away from it: when it has no child left, nothing is left. It ends them all when told to,
or when its owner is gone.

`python -m tests.slurm_cluster` starts a cluster to use by hand, and stops it on Ctrl-C.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

INSTALL = "apt-get install -y slurm-wlm slurmdbd mariadb-server munge openssh-server"
PROGRAMS = (
    *("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db"),
    *("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sdiag"),
    *("sshd", "ssh", "ssh-keygen", "useradd", "userdel"),
)
CGROUPS = Path("/sys/fs/cgroup")
USABLE = {"idle", "mixed", "allocated", "completing"}
PR_SET_CHILD_SUBREAPER = 36
# Not the module's own generator: two test processes may have given that one the same seed.
CHANCE = random.SystemRandom()

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={public}/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={public}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
SlurmctldSyslogDebug=quiet
SlurmdSyslogDebug=quiet
MailProg=/bin/true
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=3
MinJobAge=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1,defer_batch
"""
NODES_CONF = """\
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 State=UNKNOWN
"""
PARTITIONS_CONF = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
"""
WITH_CGROUPS = {
    "ProctrackType": "proctrack/cgroup",
    "TaskPlugin": "task/cgroup",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": "100",
}
WITHOUT_CGROUPS = {
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "SelectTypeParameters": "CR_Core",
}
CGROUP_CONF = f"""\
CgroupPlugin=cgroup/v1
CgroupMountpoint={CGROUPS}
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
AllowedSwapSpace=0
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={public}/munge
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
PidFile={directory}/slurmdbd.pid
LogFile={directory}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


class ClusterError(RuntimeError):
    """A daemon didn't start, died, or doesn't answer; with the last lines of its log."""


def missing() -> str | None:
    """Say what this machine lacks for a cluster, and the line that would install it.

    Returns:
        One sentence, or None where nothing is missing.
    """
    if sys.platform != "linux":
        return "a Slurm cluster needs Linux"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    absent = [name for name in PROGRAMS if which(name) is None]
    return f"no {', '.join(absent)} here: {INSTALL}" if absent else None


def which(name: str) -> str | None:
    """Find a program, also where an ordinary user's PATH doesn't look."""
    return shutil.which(
        name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    )


def program(name: str) -> str:
    """Give the absolute path of a program, which sshd wants of itself."""
    path = which(name)
    if path is None:
        raise ClusterError(f"no {name} here: {INSTALL}")
    return path


def free_ports(count: int) -> list[int]:
    """Find ports that nobody uses, below those that the kernel gives to outgoing connections.

    A daemon that is killed and started again must find its port free: one that binding to 0 gave
    could meanwhile be the near end of anybody's connection.
    """
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    held: dict[int, socket.socket] = {}
    try:
        while len(held) < count:
            port = CHANCE.randrange(10_000, max(first_ephemeral, 20_000))
            if port not in held and (found := _bound(port)):
                held[port] = found
        return list(held)
    finally:
        for found in held.values():
            found.close()


def _bound(port: int) -> socket.socket | None:
    attempt = socket.socket()
    try:
        attempt.bind(("", port))
    except OSError:
        attempt.close()
        return None
    return attempt


def open_directory(prefix: str) -> Path:
    """Make a directory that every user can enter, with a path short enough for sockets.

    pytest's own directories are neither.
    """
    path = Path(tempfile.mkdtemp(prefix=prefix))
    path.chmod(0o755)
    return path


def wait_until(ready: Callable[[], object], timeout: float, failure: Callable[[], str]) -> None:
    """Look until something is so, and raise `ClusterError` if it isn't in time."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(failure())
        time.sleep(0.05)


def tail(*logs: Path, lines: int = 15) -> str:
    """Give the last lines of the logs that exist and aren't empty."""
    texts = {
        log: log.read_text(errors="replace").splitlines()[-lines:] for log in logs if log.exists()
    }
    return "\n".join(f"--- {log.name}\n" + "\n".join(text) for log, text in texts.items() if text)


class Daemons:
    """Processes that live as long as they are wanted and never longer than this one.

    Args:
        log: Where the supervisor's own complaints go.
        cgroups: A pattern below /sys/fs/cgroup/*/ for cgroups to remove at the end.
        farewell: Commands to run at the end, when all processes are gone.
    """

    def __init__(
        self, log: Path, *, cgroups: str = "", farewell: Sequence[Sequence[str]] = ()
    ) -> None:
        with log.open("ab") as errors:
            self._supervisor = subprocess.Popen(
                # -I -S: it needs nothing but the standard library, and starts faster so.
                [
                    sys.executable,
                    "-I",
                    "-S",
                    __file__,
                    "supervise",
                    str(os.getpid()),
                    cgroups,
                    json.dumps(farewell),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._log = log
        self._lock = threading.Lock()

    def start(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
        """Start a process in a session of its own and return its pid."""
        if (pid := self._ask("start", name, list(argv), str(log), dict(env))) is None:
            raise ClusterError(f"{name} can't be started\n{tail(log, self._log)}")
        return pid

    def kill(self, name: str) -> None:
        """SIGKILL one process and wait until it's gone; its children stay."""
        self._ask("kill", name)

    def exit_code(self, name: str) -> int | None:
        """Give a process's exit code, negative for a signal, or None while it runs."""
        return self._ask("exit_code", name)

    def close(self, timeout: float = 30) -> None:
        """End every process and all their descendants, then clean up."""
        # Said aloud: a child that this process forked may hold the pipe open.
        self._supervisor.communicate(b"end\n", timeout)

    def _ask(self, *request: object) -> int | None:
        stdin, stdout = self._supervisor.stdin, self._supervisor.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            with self._lock:
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
                answer: int | None = json.loads(stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise ClusterError(f"the supervisor is gone\n{tail(self._log)}") from error
        return answer


class SlurmCluster:
    """A Slurm cluster of this process's own: controller, nodes, and accounting if wanted.

    Several can live side by side. Two partitions, ``main`` (the default) and ``low``, whose jobs
    are requeued when ``main`` needs their place.

    Args:
        directory: Logs, pids, state and database go here and stay.
        accounting: Run slurmdbd on a private MariaDB too, so that sacct answers.
        nodes: How many nodes of 8 CPUs and 4000 MB; they are virtual, so more than the host has is fine.
        cgroups: Hold jobs in cgroups, without which Slurm enforces no memory limit and
            loses a killed job's children. "auto" does so where they can be written.
        settings: More lines for slurm.conf, or other values for the ones here.

    Attributes:
        env: What to put over `os.environ` so that Slurm's commands talk to this cluster.
        conf: The path of slurm.conf.
        nodes: The nodes' names.
        public: A directory that every user can enter; it's removed in the end.
    """

    def __init__(
        self,
        directory: Path,
        *,
        accounting: bool = False,
        nodes: int = 4,
        cgroups: bool | Literal["auto"] = "auto",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.accounting = accounting
        self.cgroups = writable_cgroups() if cgroups == "auto" else cgroups
        # Clusters on one machine share /sys/fs/cgroup/*/slurm_<node>: the names must differ.
        self.tag = "n" + "".join(CHANCE.choices(string.ascii_lowercase, k=7))
        self.nodes = tuple(f"{self.tag}{i}" for i in range(1, nodes + 1))
        self.settings = dict(settings or {})
        self._daemons: Daemons | None = None

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything, and wait until every node is idle."""
        (self.directory / "state").mkdir(parents=True, exist_ok=True)
        self.public = open_directory("slurm-")
        self.conf = self.public / "slurm.conf"
        self.env = {"SLURM_CONF": str(self.conf)}
        self._daemons = Daemons(
            self.directory / "supervisor.log",
            cgroups=f"slurm_{self.tag}*",
            farewell=[["rm", "-rf", str(self.public)]],
        )
        self._configure()
        self._start_munge()
        if self.accounting:
            self._start_database()
            self.start_accounting()
        self.start_controller()
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node, name=node)
        self.wait_idle(30)

    def stop(self) -> None:
        """End every process of the cluster and of its jobs; harmless if there is none."""
        daemons, self._daemons = self._daemons, None
        if daemons is not None:
            daemons.close()

    def run(self, *argv: str, check: bool = True, **options: Any) -> str:
        """Run a Slurm command against this cluster.

        Args:
            *argv: The command.
            check: Raise `ClusterError` with what it wrote if it fails.
            **options: For `subprocess.run`; `env` goes over this cluster's.

        Returns:
            Its stdout, stripped.
        """
        env = os.environ | self.env | options.pop("env", {})
        options = {"capture_output": True, "text": True, "timeout": 60} | options
        done = subprocess.run(argv, env=env, check=False, **options)
        if check and done.returncode:
            raise ClusterError(
                f"{' '.join(argv)} exited {done.returncode}: {done.stdout}{done.stderr}"
            )
        return str(done.stdout).strip()

    def kill_controller(self) -> None:
        """SIGKILL slurmctld; what it learned in the last seconds is lost unless `save_state` came after."""
        self._running.kill("slurmctld")

    def lose_state(self) -> None:
        """SIGKILL slurmctld and remove all that it has saved; `start_controller` brings it back without."""
        self.kill_controller()
        shutil.rmtree(self.directory / "state")
        (self.directory / "state").mkdir()

    def save_state(self, job: str) -> None:
        """Wait until slurmctld has written down what it knows of a job; it takes up to five seconds.

        The job's AdminComment is changed, which slurmctld must write and we can look for.
        """
        token = f"saved-{CHANCE.randbytes(8).hex()}"
        self.run("scontrol", "update", f"JobId={job}", f"AdminComment={token}")
        saved = self.directory / "state" / "job_state"
        wait_until(lambda: token.encode() in saved.read_bytes(), 20, lambda: f"{job} isn't saved")

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers; its nodes may take seconds more (`wait_idle`)."""
        self._start("slurmctld", "-D")
        self._wait("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False))

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL a node's slurmd; the jobs on it, under their slurmstepd, run on.

        The controller sees it after 20 s and more; after about 10 s with
        ``settings={"SlurmdTimeout": "3", "MessageTimeout": "3"}``.
        """
        self._running.kill(node)

    def start_slurmd(self, node: str) -> None:
        """Start a node's slurmd and wait until the controller takes it for usable."""
        self._start("slurmd", "-D", "-N", node, name=node)
        self._wait(node, lambda: self.run("sinfo", "-hn", node, "-o", "%T") in USABLE)

    def stop_accounting(self) -> None:
        """SIGKILL slurmdbd: sacct fails, and slurmctld keeps what it has to say for later."""
        self._running.kill("slurmdbd")

    def start_accounting(self) -> None:
        """Start slurmdbd and wait until it answers."""
        self._start("slurmdbd", "-D", env={"MYSQL_UNIX_PORT": str(self.public / "mysql")})
        self._wait("slurmdbd", lambda: _listens(self._dbd_port))

    def wait_idle(self, timeout: float) -> None:
        """Wait until no job is waiting, running or completing and every node is idle."""
        wait_until(self._is_idle, timeout, lambda: f"not idle after {timeout} s:\n{self._story()}")

    def rpcs(self) -> int:
        """Count the RPCs that slurmctld has served, this question's own left out."""
        return sum(self.rpcs_by_type().values())

    def rpcs_by_type(self) -> dict[str, int]:
        """Count the RPCs that slurmctld has served by their names, such as REQUEST_JOB_INFO."""
        text = self.run("sdiag").partition("by message type")[2].partition("by user")[0]
        counts = re.findall(r"^\s*(\w+)\s*\(.*?count:(\d+)", text, re.MULTILINE)
        return {name: int(count) for name, count in counts if not name.startswith("REQUEST_STATS_")}

    def reset_rpcs(self) -> None:
        """Make `rpcs` count from nothing."""
        self.run("sdiag", "--reset")

    @property
    def _running(self) -> Daemons:
        if self._daemons is None:
            raise ClusterError("the cluster isn't running")
        return self._daemons

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        port, self._dbd_port, *ports = free_ports(2 + len(self.nodes))
        names = vars(self) | {"host": host, "port": port, "dbd_port": self._dbd_port}
        settings = dict(line.split("=", 1) for line in SLURM_CONF.format(**names).splitlines())
        settings |= WITH_CGROUPS if self.cgroups else WITHOUT_CGROUPS
        settings |= self._accounting_settings() | self.settings
        nodes = (
            NODES_CONF.format(node=n, host=host, port=p)
            for n, p in zip(self.nodes, ports, strict=True)
        )
        lines = "".join(f"{key}={value}\n" for key, value in settings.items())
        self.conf.write_text(lines + "".join(nodes) + PARTITIONS_CONF)
        (self.public / "cgroup.conf").write_text(CGROUP_CONF if self.cgroups else "")
        dbd = self.public / "slurmdbd.conf"
        dbd.touch(0o600)
        dbd.write_text(SLURMDBD_CONF.format(**names))

    def _accounting_settings(self) -> dict[str, str]:
        if not self.accounting:
            return {"AccountingStorageType": "accounting_storage/none"}
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            # Not AuthInfo: to slurmdbd this names the socket.
            "AccountingStoragePass": f"{self.public}/munge",
            "AccountingStoragePort": str(self._dbd_port),
            "JobAcctGatherType": "jobacct_gather/linux",
        }

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(CHANCE.randbytes(128))
        files = [
            f"--{kind}-file={self.directory}/munge.{kind}" for kind in ("key", "log", "pid", "seed")
        ]
        # --force: it runs as root here, and distrusts a directory that others can write above its own.
        self._start("munged", "--foreground", "--force", f"--socket={self.public}/munge", *files)
        self._wait("munged", (self.public / "munge").exists)

    def _start_database(self) -> None:
        data = f"--datadir={self.directory}/mysql"
        self._start("mariadb-install-db", "--no-defaults", data, "--user=root", "--skip-test-db")
        wait_until(
            lambda: self._running.exit_code("mariadb-install-db") is not None,
            60,
            lambda: self._failure("mariadb-install-db"),
        )
        files = [f"--socket={self.public}/mysql", f"--pid-file={self.directory}/mysql.pid"]
        # What is lost in a power cut doesn't matter here; the time that syncing takes does.
        fast = [
            f"--innodb-{key}"
            for key in ("flush-log-at-trx-commit=0", "flush-method=nosync", "doublewrite=0")
        ]
        self._start(
            "mariadbd", "--no-defaults", "--user=root", "--skip-networking", data, *files, *fast
        )
        self._wait("mariadbd", (self.public / "mysql").exists)

    def _start(
        self, binary: str, *args: str, name: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        name = name or binary
        log = self.directory / f"{name}.err"
        self._running.start(name, [program(binary), *args], log, self.env | dict(env or {}))

    def _wait(self, name: str, ready: Callable[[], object]) -> None:
        def is_settled() -> object:
            if self._running.exit_code(name) is not None:
                raise ClusterError(self._failure(name))
            return ready()

        wait_until(is_settled, 30, lambda: self._failure(name))

    def _failure(self, name: str) -> str:
        logs = tail(self.directory / f"{name}.log", self.directory / f"{name}.err")
        return f"{name} doesn't answer (exit code {self._running.exit_code(name)})\n{logs}"

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "-hN", "-o", "%T").split()
        return set(states) == {"idle"} and not self.run("squeue", "-h")

    def _story(self) -> str:
        ended = [
            self._failure(node) for node in self.nodes if self._running.exit_code(node) is not None
        ]
        state = self.run("sinfo", "-N", check=False), self.run("squeue", check=False)
        return "\n".join((*state, *ended, tail(self.directory / "slurmctld.log")))


def writable_cgroups() -> bool:
    """Say whether Slurm can make cgroups here (version 1, which needs no systemd)."""
    probes = [CGROUPS / kind / f"probe-{os.getpid()}" for kind in ("freezer", "memory")]
    try:
        for probe in probes:
            if not probe.parent.is_mount():
                return False
            probe.mkdir()
            probe.rmdir()
    except OSError:
        return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


class _Supervisor:
    """The other side of `Daemons`: starts what it's asked to, and ends it all."""

    def __init__(self, cgroups: str, farewell: list[list[str]]) -> None:
        self.cgroups = [cgroups] if cgroups else []
        self.farewell = farewell
        self.pids: dict[str, int] = {}
        self.codes: dict[int, int] = {}
        self.started: list[subprocess.Popen[bytes]] = []

    def serve(self, owner: int) -> None:
        """Answer requests until the owner, which is the parent, says so or is gone."""
        become_subreaper()
        pidfd = os.pidfd_open(owner)
        inbox, wakeup = sys.stdin.fileno(), wakeup_on(signal.SIGCHLD, signal.SIGTERM)
        poller = select.poll()
        for fd in (inbox, wakeup, pidfd):
            poller.register(fd, select.POLLIN)
        while os.getppid() == owner:
            events = dict(poller.poll())
            if wakeup in events and signal.SIGTERM in os.read(wakeup, 4096):
                return
            self.reap()
            if pidfd in events or (inbox in events and not self.answer()):
                return

    def answer(self) -> bool:
        """Do what one line asks for; False if that's to end, or there's none any more."""
        line = sys.stdin.buffer.readline()
        if line in (b"", b"end\n"):
            return False
        verb, *args = json.loads(line)
        print(json.dumps(getattr(self, verb)(*args)), flush=True)
        return True

    def start(self, name: str, argv: list[str], log: str, env: dict[str, str]) -> int | None:
        with Path(log).open("ab") as output:
            try:
                process = subprocess.Popen(
                    argv,
                    env=os.environ | env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"{error}\n".encode())
                return None
        # Kept, since subprocess reaps what it sees dropped, and reaping is done below.
        self.started.append(process)
        self.pids[name] = process.pid
        return process.pid

    def kill(self, name: str) -> None:
        pid = self.pids[name]
        if pid not in self.codes:
            os.kill(pid, signal.SIGKILL)
        while pid not in self.codes:
            self.reap(0)

    def exit_code(self, name: str) -> int | None:
        self.reap()
        return self.codes.get(self.pids[name])

    def reap(self, flags: int = os.WNOHANG) -> bool:
        """Take in who has died, daemons and orphans alike; False if there's no child left."""
        try:
            while (ended := os.waitpid(-1, flags))[0]:
                self.codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
                flags = os.WNOHANG
        except ChildProcessError:
            return False
        return True

    def end(self) -> None:
        """Kill until no descendant is left, then remove what they leave."""
        while self.reap():
            # A frozen process can't die, and Slurm freezes a job before it kills it.
            for state in self.find("freezer", "**/freezer.state"):
                state.write_text("THAWED")
            for pid in descendants(os.getpid()):
                try_to(os.kill, pid, signal.SIGKILL)
            time.sleep(0.01)
        self.remove_cgroups()
        for argv in self.farewell:
            subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)

    def remove_cgroups(self) -> None:
        deadline = time.monotonic() + 5
        while left := sorted(self.find("*", "**/"), reverse=True):
            # The kernel may hold one for a moment after its last process is gone.
            if time.monotonic() > deadline:
                print("left behind:", *left, file=sys.stderr)
                return
            for path in left:
                try_to(os.rmdir, path)

    def find(self, hierarchy: str, below: str) -> list[Path]:
        return [path for own in self.cgroups for path in CGROUPS.glob(f"{hierarchy}/{own}/{below}")]


def become_subreaper() -> None:
    """Have every orphan among this process's descendants become its own child."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def wakeup_on(*signals: signal.Signals) -> int:
    """Give a file descriptor from which the numbers of arriving signals can be read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in signals:
        signal.signal(number, lambda *_: None)
    return reader


def descendants(pid: int) -> list[int]:
    """List the children of a process, and theirs, as /proc has them now."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if (text := try_to(stat.read_text)) is not None:
            # The name before the bracket may hold anything, brackets and spaces too.
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def try_to(do: Callable[..., Any], *args: object) -> Any:
    """Call it; None if the process or the file is gone meanwhile, or busy yet."""
    try:
        return do(*args)
    except OSError:
        return None


def supervise(owner: str, cgroups: str, farewell: str) -> None:
    """Start and end what the owner asks for; the other side of `Daemons`."""
    supervisor = _Supervisor(cgroups, json.loads(farewell))
    try:
        supervisor.serve(int(owner))
    finally:
        supervisor.end()


def main() -> None:
    """Run a cluster until Ctrl-C or SIGTERM, and print how to use it."""
    import argparse  # not at the top: the supervisor starts faster without it

    parser = argparse.ArgumentParser(prog="python -m tests.slurm_cluster", description=main.__doc__)
    parser.add_argument(
        "--accounting", action="store_true", help="run slurmdbd, so that sacct answers"
    )
    parser.add_argument("--nodes", type=int, default=4, help="how many nodes of 8 CPUs and 4000 MB")
    given = parser.parse_args()
    if lacking := missing():
        parser.exit(1, f"{lacking}\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="slurm-logs-"))
    try:
        with SlurmCluster(directory, accounting=given.accounting, nodes=given.nodes) as cluster:
            for name, value in cluster.env.items():
                print(f"export {name}={value}")
            print(f"# logs are in {directory}; Ctrl-C stops the cluster", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["supervise"]:
        supervise(*sys.argv[2:])
    else:
        main()
