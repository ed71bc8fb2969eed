"""Random jobs under random faults, for as long as wanted: `python -m tests.soak --local-faults 3000`.

Each round is a process of its own, the *actor*: it runs a few schedulers at once, dispatches jobs that
end in every way a job can, cancels some, lets collectors break off and time out, and closes, at times
in the middle of it all. The process that was started, the *judge*, does harm to it from outside
meanwhile: signals to workers, to the guardian, to batch shells, to Slurm's daemons. In the end it
compares what the actor reports with what the jobs themselves left as evidence:

- each job has one outcome, which its kind and the harm done to it allow;
- no job starts more often than its result says, or beside itself;
- no success is reported that did not happen, and none that did is lost;
- nothing is left: descriptors, threads, tasks, processes, files, jobs in Slurm's queue;
- all of it ends within a bound.

What is chosen depends on the seed and the number of the round alone; what comes of it depends on the
moment too. The first violation ends the run with exit code 1 and an account of the round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, TESTS)

BOUND = {"local": 60.0, "slurm": 300.0}
"""Seconds after which a round should be over."""

_MANY = 1000
"""More jobs than a round has."""

MARK = "HT_SOAK"
"""The environment variable by which the processes of a round are known."""


# --- what jobs do, and what may come of it ---------------------------------------------------------


def begin(directory: str, name: str) -> int:
    """Leave evidence of a start, and of another start that has not ended."""
    file = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(file, b"s")
    except BlockingIOError:
        os.write(file, b"sB")
    return file


def perform(directory: str, name: str, kind: str, size: int) -> Any:
    """Do what a job of this kind does, and leave evidence of its start and of its success."""
    file = begin(directory, name)
    try:
        value = act_as(kind, size, os.path.getsize(f"{directory}/{name}"))
        os.write(file, b"e")
        return name, value
    finally:
        with contextlib.suppress(OSError):
            os.close(file)


def act_as(kind: str, size: int, n_written: int) -> Any:
    import tasks

    how = kind.partition("-")[2]
    if kind in {"slow", "late"}:
        time.sleep(size / 2000 if kind == "slow" else 600)
    elif kind.startswith("die-"):
        tasks.end_as(how)
    elif kind == "retried" and n_written == 1:
        os._exit(9)
    elif kind == "unpicklable":
        return threading.Lock()
    elif kind.startswith("unloadable-"):
        import asyncio  # not for each worker, at 0.1 s of a CPU

        kinds = {**vars(__import__("builtins")), "CancelledError": asyncio.CancelledError}
        return tasks.Unloadable(kinds[how])
    elif kind == "awkward":
        tasks.raise_awkward()
    elif kind == "large":
        return bytes(30_000_000 + size)
    elif kind == "child":
        import subprocess

        subprocess.Popen(["sleep", "600"], start_new_session=bool(size % 2))
    elif kind == "closed":
        os.closerange(0, 3) if size % 2 else os.closerange(3, 256)
    elif kind == "fork" and os.fork() == 0:
        return "of the child"
    return bytes(size * 1500) if kind == "bulky" else size


SCRIPT = """\
exec 9>>"$1/$2"; printf s >&9
case $3 in
slow) sleep "$(($4 / 2000))";; late) sleep 600; exit 5;;
die-SIGKILL) kill -9 $$;; die-sys.exit) exit 4;;
retried) [ "$(cat "$1/$2")" = s ] && exit 9;;
child) sleep 600 9>&- >/dev/null 2>&1 & ;;
esac
printf '["%s", %s]' "$2" "$4" >"$AIOHYPERTUNITY_OUTPUT_FILE" && printf e >&9
"""
OK = "ok"
SCRIPTS = {
    "good": {OK}, "slow": {OK}, "late": {"JobTimeout"}, "retried": {OK}, "child": {OK},
    "die-SIGKILL": {"JobCrashed"}, "die-sys.exit": {"JobFailed"},
}  # fmt: skip
CALLABLES = {
    "good": {OK}, "slow": {OK}, "late": {"JobTimeout"}, "retried": {OK}, "child": {OK},
    "bulky": {OK}, "large": {OK}, "fork": {OK, "JobCrashed"}, "closed": {OK, "JobCrashed", "JobFailed", "ResultLost"},
    "die-SIGKILL": {"JobCrashed"}, "die-os._exit": {"JobCrashed"}, "die-segfault": {"JobCrashed"},
    "die-sys.exit": {"JobFailed"}, "die-KeyboardInterrupt": {"JobFailed"}, "die-raise": {"JobFailed"},
    "unpicklable": {"PayloadError"}, "awkward": {"JobFailed", "PayloadError"},
    **{f"unloadable-{name}": {"PayloadError"} for name in (
        "ValueError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError")},
}  # fmt: skip
"""Kinds of jobs, and what becomes of them if nobody harms them."""


# --- the actor -------------------------------------------------------------------------------------


class Actor:
    """One scheduler with its jobs, collectors and cancels.

    Args:
        plan: What the judge wants.
        number: Of the scheduler in the round.
    """

    def __init__(self, plan: dict[str, Any], number: int) -> None:
        import aiohypertunity as ht

        self.ht, self.plan = ht, plan
        self.prefix = f"{number}-"
        self.random = random.Random(f"{plan['seed']}/{number}")
        self.is_slurm = plan["slurm"]
        self.wanted: dict[str, dict[str, Any]] = {}
        self.handles: dict[str, Any] = {}
        self.given: Counter[str] = Counter()
        self.private: set[str] = set()
        self.closing = False
        self.directories: list[str] = []

    def job(self, number: int) -> Any:
        rng, name = self.random, f"{self.prefix}{number}"
        form = rng.choice(("callable", "callable", "function", "script"))
        kinds = SCRIPTS if form == "script" else CALLABLES
        kind = rng.choice(list(kinds)) if rng.random() < 0.6 else rng.choice(("good", "slow"))
        self.wanted[name] = {"kind": kind, "form": form, "allowed": sorted(kinds[kind])}
        size = rng.randrange(1, 1000) * (20 if self.is_slurm and kind == "slow" else 1)
        args = (self.plan["evidence"], name, kind, size)
        task: Any = {"callable": perform, "function": f"{__file__}:perform"}.get(form)
        if form == "script":
            task, args = f"{self.plan['directory']}/script.sh", tuple(map(str, args))
        if kind in {"bulky", "large"}:
            size = size * 1500 if kind == "bulky" else 30_000_000 + size
        self.wanted[name]["size"] = size
        options: dict[str, Any] = {"timeout": rng.uniform(0.2, 1.5) if kind == "late" else None}
        options["retries"] = 2 if kind == "retried" else rng.choice((0, 0, 1))
        if form == "script":
            options["meta"] = {"output": "env"}
        return (self.ht.SlurmJob if self.is_slurm else self.ht.Job)(task, args, name, **options)

    def slurm(self) -> Any:
        return self.ht.Slurm(workdir=self.plan["workdir"]) if self.is_slurm else None

    async def run(self) -> None:
        rng = self.random
        n_jobs = self.plan["n_jobs"]
        scheduler = self.ht.Scheduler(rng.randint(1, 4), slurm=self.slurm(), kill_grace=0.5)
        async with scheduler:
            helpers = [self._collect(scheduler, random.Random(rng.random())) for _ in range(3)]
            doing = [asyncio.create_task(one) for one in (*helpers, self._cancel())]
            if not self.is_slurm:
                doing.append(asyncio.create_task(self._map(scheduler)))
            while len(self.wanted) < n_jobs:
                first, n_next = len(self.wanted), rng.randint(1, n_jobs)
                jobs = [self.job(n) for n in range(first, min(first + n_next, n_jobs))]
                batch = scheduler.dispatch(jobs, private=(private := rng.random() < 0.1))
                self.handles |= {str(handle.id): handle for handle in batch}
                self.private |= {str(h.id) for h in batch} if private else set()
                await asyncio.sleep(rng.choice((0, 0.01, 0.2)))
            if rundir := getattr(scheduler, "_rundir", None):
                self.directories = [*rundir.buffer_directories]
            if rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, 8 if self.is_slurm else 2))
                self.closing = True
            else:
                for handle in self.handles.values():
                    await handle
                await asyncio.wait(doing)
            await scheduler.aclose()
        for one in doing:
            one.cancel()
        await asyncio.wait(doing)
        for one in doing:
            if not one.cancelled() and not self.closing:
                one.result()

    async def _collect(self, scheduler: Any, rng: random.Random) -> None:
        """Collect in pieces that break off, time out, or are cancelled."""
        expected = (self.ht.CollectTimeout, self.ht.NotEnoughJobs, TimeoutError)
        while not self._is_over():
            wanted = rng.choice((None, 1, 3))
            with contextlib.suppress(*expected):
                async with asyncio.timeout(rng.uniform(0.05, 3)):
                    async for result in scheduler.collect(wanted, timeout=rng.uniform(0.01, 2)):
                        self.given[str(result.id)] += 1
                        if rng.random() < 0.1:
                            break
            await asyncio.sleep(0.02)

    def _is_over(self) -> bool:
        public = self.handles.keys() - self.private
        return self.closing or (
            len(self.handles) == self.plan["n_jobs"] and public <= self.given.keys()
        )

    async def _cancel(self) -> None:
        while not self._is_over():
            await asyncio.sleep(self.random.expovariate(2))
            left = [name for name, handle in self.handles.items() if not handle.done()]
            if left and self.random.random() < 0.5:
                for name in self.random.sample(left, min(len(left), self.random.randint(1, 3))):
                    self.wanted[name]["cancelled"] = True
                    self.handles[name].cancel()

    async def _map(self, scheduler: Any) -> None:
        """Map, until it is all or a worker has been killed."""
        import tasks

        values = []
        with contextlib.suppress(self.ht.JobCrashed):
            values = [value async for value in scheduler.map(tasks.double, range(50), ordered=True)]
        assert values in ([], [2 * n for n in range(50)]), f"map gave {values}"

    def unfinished(self) -> str:
        """Describe the jobs that have not ended, and the results that nobody was given."""
        left = {
            name: f"{self.wanted[name]['kind']}, {handle.status.name}, Slurm job {handle.slurm_id}, {handle.pending_reason}"
            for name, handle in self.handles.items()
            if not handle.done()
        }
        kept = self.handles.keys() - self.private - self.given.keys() - left.keys()
        return f"unfinished: {left}; not given to a collector: {sorted(kept)}"

    async def outcomes(self) -> list[dict[str, Any]]:
        found = []
        for name, wanted in self.wanted.items():
            if not self.handles[name].done():
                found.append({**wanted, "name": name, "got": "nothing", "attempts": 0})
                continue
            result = await self.handles[name]
            got = type(result.error).__name__ if result.error else OK
            told = {"got": got, "attempts": result.attempts, "said": str(result.error)[:600]}
            if got == OK:
                owner, value = result.data
                size = len(value) if isinstance(value, bytes) else value
                told["true"] = owner == name and size == wanted["size"]
            told["given"] = None if name in self.private else self.given[name]
            found.append({**wanted, "name": name, "closed": self.closing, **told})
        self.handles.clear()
        return found


def holdings() -> dict[str, Any]:
    """Count what this process holds that it should give back."""
    gc.collect()
    files = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    names = Counter(os.readlink(f).partition(":")[0] for f in files if os.path.islink(f))
    # The package keeps a few idle threads for all schedulers of a process.
    threads = sorted(t.name for t in threading.enumerate() if t.name != "aiohypertunity")
    return {"descriptors": dict(names), "threads": threads}


def act(plan: dict[str, Any]) -> None:
    """Play a round, and write down what came of it."""
    import aiohypertunity as ht

    actors = [Actor(plan, number) for number in range(plan["n_schedulers"])]
    report: dict[str, Any] = {}

    async def warm_up() -> None:
        async with ht.Scheduler(1) as scheduler:
            await scheduler.dispatch(ht.Job(abs, (-1,)))[0]

    def tell() -> None:
        sys.stderr.writelines(f"{actor.unfinished()}\n" for actor in actors)
        sys.stderr.writelines(f"{task}\n" for task in asyncio.all_tasks())

    async def play() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
        async with asyncio.TaskGroup() as group:
            for actor in actors:
                group.create_task(actor.run())
        report["outcomes"] = [each for actor in actors for each in await actor.outcomes()]
        tasks = asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
        report["tasks"] = [str(task) for task in tasks]

    asyncio.run(warm_up())
    before = holdings()
    asyncio.run(play())
    after = holdings()
    report["held"] = None if after == before else {"before": before, "after": after}
    report["files"] = [d for actor in actors for d in actor.directories if os.path.exists(d)]
    Path(plan["report"]).write_text(json.dumps(report))


# --- the judge -------------------------------------------------------------------------------------


class Violation(Exception):
    """An account of what must not happen."""


class Judge:
    """Plays rounds, does harm, and judges.

    Args:
        seed: Of all that is chosen.
        cluster: A Slurm cluster; None for local rounds.
    """

    def __init__(self, seed: int, cluster: Any = None) -> None:
        self.seed, self.cluster = seed, cluster
        self.kind = "slurm" if cluster else "local"
        self.counts: Counter[str] = Counter()

    def play(self, number: int, most_faults: int | None = None) -> None:
        """Play a round.

        Raises:
            Violation: Something happened that must not.
        """
        self.random = random.Random(f"{self.seed}/{self.kind}/{number}")
        if most_faults is None:
            most_faults = self.random.randint(0, 12)
        self.journal: list[str] = []
        self.harm: Counter[str] = Counter()
        self.stopped: list[tuple[float, int]] = []
        self.n_oom_kills = n_oom_kills()
        self.began = time.monotonic()
        directory = tempfile.mkdtemp(prefix="soak-")
        for name in ("evidence", "tmp", "work"):
            os.mkdir(f"{directory}/{name}")
        Path(f"{directory}/script.sh").write_text(SCRIPT)
        plan = {
            "seed": f"{self.seed}/{self.kind}/{number}", "slurm": self.cluster is not None,
            "n_schedulers": 1 if self.cluster else self.random.randint(1, 3),
            "n_jobs": 100 if self.cluster else self.random.randint(10, 60),
            "directory": directory, "evidence": f"{directory}/evidence",
            "workdir": f"{directory}/work", "report": f"{directory}/report",
        }  # fmt: skip
        mark = f"{MARK}={os.path.basename(directory)}"
        try:
            self._act(plan, mark, most_faults)
            self._judge(plan, mark)
        except Violation as violation:
            evidence = "\n".join(self.journal[-60:])
            words = f"seed {self.seed}, {self.kind} round {number}: {violation}"
            raise Violation(f"{words}\n\nWhat was done to it:\n{evidence}") from None
        finally:
            for pid in marked(mark):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(directory, ignore_errors=True)

    def _act(self, plan: dict[str, Any], mark: str, most_faults: int) -> None:
        env = os.environ | {"TMPDIR": f"{plan['directory']}/tmp", MARK: mark.partition("=")[2]}
        env |= {"SLURM_CONF": str(self.cluster.conf)} if self.cluster else {}
        said = Path(f"{plan['directory']}/said")
        argv = [sys.executable, "-X", "faulthandler", __file__, "--act", json.dumps(plan)]
        with said.open("wb") as file:
            actor = subprocess.Popen(argv, env=env, stdin=-3, stdout=file, stderr=file)
        try:
            while actor.poll() is None:
                if time.monotonic() > self.began + BOUND[self.kind]:
                    actor.send_signal(
                        signal.SIGUSR1
                    )  # it tells what is unfinished, if its loop runs
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        actor.wait(3)
                    actor.send_signal(signal.SIGABRT)  # faulthandler shows where it hangs
                    actor.wait()
                    raise Violation(f"it does not end in {BOUND[self.kind]:g} s\n{tail_of(said)}")
                time.sleep(self.random.uniform(0.01, 0.1) * (8 if self.cluster else 1))
                self._continue(time.monotonic())
                if self.harm.total() < most_faults:
                    self._harm_cluster(mark) if self.cluster else self._harm(actor.pid)
                elif self.cluster:
                    self._mend()
        finally:
            self._continue(math.inf)
            actor.kill()
            actor.wait()
        if actor.returncode:
            raise Violation(f"the scheduler's process exits {actor.returncode}\n{tail_of(said)}")

    def _note(self, what: str) -> None:
        self.journal.append(f"{time.monotonic() - self.began:7.2f} s  {what}")

    def _signal(self, pids: list[int], what: str) -> None:
        """Send one of them a signal that it may or may not survive."""
        if not pids:
            return
        pid = self.random.choice(pids)
        how = self.random.choice(("SIGKILL", "SIGTERM", "SIGSTOP"))
        with contextlib.suppress(OSError):
            os.kill(pid, signal.Signals[how])
            self.harm[f"{how} to {what}"] += 1
            self._note(f"{how} to {what} {pid}")
        if how == "SIGSTOP":
            self.stopped.append((time.monotonic() + self.random.uniform(0, 0.7), pid))

    def _continue(self, until: float) -> None:
        """Continue the processes that were to be stopped until then."""
        due = [pid for at, pid in self.stopped if at <= until]
        self.stopped = [(at, pid) for at, pid in self.stopped if at > until]
        for pid in due:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def _harm(self, actor: int) -> None:
        from slurm_cluster import descendants

        from aiohypertunity._executors.workers import child
        from aiohypertunity._host import guardian

        lines = {pid: command_of(pid) for pid in descendants(actor)}
        of = {
            "guardian": [pid for pid, line in lines.items() if guardian.__file__ in line],
            "worker": [pid for pid, line in lines.items() if child.__name__ in line],
            "script": [pid for pid, line in lines.items() if "script.sh" in line],
        }
        weights = {"guardian": 1, "worker": 20, "script": 8}
        there = [what for what, pids in of.items() if pids]
        if there:
            what = self.random.choices(there, [weights[what] for what in there])[0]
            self._signal(of[what], what)

    def _harm_cluster(self, mark: str) -> None:
        from slurm_cluster import ClusterError

        cluster, rng = self.cluster, self.random
        jobs = cluster.run("squeue", "-hr", "-tPD,R", "-o%i", check=False).split()
        what = rng.choices(
            ("shell", "python", "slurmd", "slurmctld", "lost state", "requeue", "hold", "scancel"),
            (4, 4, 1, 2, 1, 3, 3, 3),
        )[0]
        if what in {"shell", "python"}:
            word = "slurm_script" if what == "shell" else "aiohypertunity_node"
            self._signal([p for p in marked(mark) if word in command_of(p)], what)
            return
        if not jobs:
            return
        job = rng.choice(jobs)
        self.harm[what] += 1
        self._note(f"{what} (of {len(jobs)} jobs, {job})")
        if what == "slurmd":
            cluster.kill_slurmd(node := rng.choice(cluster.nodes))
            time.sleep(rng.choice((0, 0, 30)))
            with contextlib.suppress(ClusterError):  # drained, for an id that was given twice
                cluster.start_slurmd(node)
        elif what in {"slurmctld", "lost state"}:
            cluster.kill_controller()
            if what == "lost state":
                shutil.rmtree(cluster.directory / "state")
                (cluster.directory / "state").mkdir()
            time.sleep(rng.uniform(0, 10))
            cluster.start_controller()
        elif what == "hold":
            cluster.run("scontrol", "hold", job, check=False)
        else:
            verb = ("scontrol", "requeue") if what == "requeue" else ("scancel",)
            cluster.run(*verb, job, check=False)

    def _mend(self) -> None:
        """Let those go on that Slurm holds back: for minutes after a requeue, or for ever."""
        for job in self.cluster.run("squeue", "-hr", "-tPD", "-o%i", check=False).split():
            self.cluster.run("scontrol", "release", job, check=False)
            self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        for node in self.cluster.nodes:
            line = ("update", f"NodeName={node}", "State=RESUME")
            self.cluster.run("scontrol", *line, check=False)

    def _judge(self, plan: dict[str, Any], mark: str) -> None:
        report = json.loads(Path(plan["report"]).read_text())
        deadline = time.monotonic() + (60 if self.cluster else 5)
        while (left := self._left(plan, mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        problems = [f"left behind: {each}" for each in left]
        problems += [f"{key}: {report[key]}" for key in ("held", "tasks", "files") if report[key]]
        excuses = self._excuses()
        for told in report["outcomes"]:
            evidence = Path(plan["evidence"], told["name"])
            left_by = evidence.read_text() if evidence.exists() else ""
            # Others may use the same machine, and tell of it no more than that something was killed.
            if told["got"] == "OutOfMemory" and n_oom_kills() > self.n_oom_kills:
                told["got"] = "JobCrashed"
            excuses -= self._excused(told)
            # slurmctld saves its state seconds late: killed before, it revives what was cancelled.
            if told["got"] == "JobCancelled" and excuses >= _MANY:
                told["attempts"] = max(told["attempts"], left_by.count("s"))
            if problem := judge(told, left_by, excused=excuses >= 0):
                problems.append(f"{problem}; evidence {left_by!r}\n      {told}")
            self.counts[told["got"]] += 1
        self.counts["jobs"] += len(report["outcomes"])
        self.counts["rounds"] += 1
        self.counts["faults"] += self.harm.total()
        if problems:
            raise Violation("\n  - ".join(("", *problems[:10], f"{len(problems)} in all")))

    def _left(self, plan: dict[str, Any], mark: str) -> list[str]:
        found = [f"process {pid} {command_of(pid)}" for pid in marked(mark)]
        for name in ("tmp", "work"):
            found += map(str, Path(plan["directory"], name).iterdir())
        if self.cluster:
            found += self.cluster.run("squeue", "-h", "-o%i %T %r", check=False).splitlines()
        return found

    def _excuses(self) -> int:
        """Return how many jobs the harm that was done may have cost."""
        many = self.harm["slurmd"] + self.harm["lost state"] + self.harm["slurmctld"]
        return 2 * _MANY * many + sum(n for what, n in self.harm.items() if "SIGSTOP" not in what)

    def _excused(self, told: dict[str, Any]) -> bool:
        harmed = told["got"] in {"JobCrashed", "NodeFailed", "JobFailed", "JobCancelled"}
        ours = told["got"] == "JobCancelled" and (told.get("cancelled") or told["closed"])
        return harmed and not ours and told["got"] not in told["allowed"]


def judge(told: dict[str, Any], evidence: str, *, excused: bool) -> str | None:
    """Say what is wrong with an outcome, given what its job left; None if nothing is."""
    got, n_starts = told["got"], evidence.count("s")
    allowed = {*told["allowed"]}
    if told.get("cancelled") or told.get("closed"):
        allowed.add("JobCancelled")
        if told["kind"] == "retried":  # nothing is tried again then: the first attempt counts
            allowed |= {"JobCrashed", "JobFailed"}
    if excused:
        allowed |= {"JobCrashed", "NodeFailed", "JobFailed", "JobCancelled"}
    if got not in allowed:
        return f"a job of kind {told['kind']} ends as {got}"
    if n_starts > told["attempts"]:
        return f"a job started {n_starts} times and tells of {told['attempts']}"
    if "B" in evidence:
        return "a job ran beside itself"
    if got == OK and not ("e" in evidence and told["true"]):
        return "a success is reported that did not happen, or another's value"
    if told["given"] is not None and told["given"] > 1:
        return f"a result was given {told['given']} times"
    if told["given"] == 0 and not told["closed"]:
        return "a result was given to nobody"
    return None


def marked(mark: str) -> list[int]:
    """List the processes that carry the mark of a round."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def n_oom_kills() -> int:
    """Return how many processes this machine has killed for want of memory."""
    words = Path("/proc/vmstat").read_text().split()
    return int(words[words.index("oom_kill") + 1])


def command_of(pid: int) -> str:
    """Return the command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:300]
    except OSError:
        return ""


def tail_of(path: Path) -> str:
    """Return the last lines of a file."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-60:])


def main() -> int:
    """Run the soak, and print what it came to."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--local-faults", type=int, default=0, metavar="N")
    parser.add_argument("--slurm-rounds", type=int, default=0, metavar="M")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), metavar="S")
    parser.add_argument("--minutes", type=float, default=1e9, metavar="X", help="at most")
    parser.add_argument("--act", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.act:
        act(json.loads(given.act))
        return 0
    end = time.monotonic() + 60 * given.minutes
    counts: Counter[str] = Counter()
    try:
        local, number = Judge(given.seed), 0
        local.counts = counts
        while counts["faults"] < given.local_faults and time.monotonic() < end:
            local.play(number, given.local_faults - counts["faults"])
            number += 1
            if number % 10 == 0:
                sys.stderr.write(f"{number} rounds, {counts['faults']} faults\n")
        if given.slurm_rounds and time.monotonic() < end:
            soak_slurm(given, counts, end)
    except Violation as violation:
        sys.stdout.write(f"{violation}\n")
        return 1
    finally:
        told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        sys.stdout.write(f"seed {given.seed}: {told}\n")
    return 0


def soak_slurm(given: argparse.Namespace, counts: Counter[str], end: float) -> None:
    """Play rounds on a real cluster."""
    from slurm_cluster import SlurmCluster

    with tempfile.TemporaryDirectory() as directory, SlurmCluster(Path(directory)) as cluster:
        judge_of_slurm = Judge(given.seed, cluster)
        judge_of_slurm.counts = counts
        for number in range(given.slurm_rounds):
            if time.monotonic() < end:
                judge_of_slurm.play(number)


if __name__ == "__main__":
    sys.exit(main())
