"""Slurm as text, verdicts, and when to look: rules, tested from tables without any Slurm."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import tasks
from helpers import is_alive, number_in, script, wait_until
from hypothesis import given
from hypothesis import strategies as st

import aiohypertunity as ht
from aiohypertunity import SlurmJob
from aiohypertunity._executors.slurm import shell, text
from aiohypertunity._executors.slurm.nodecode import node_code
from aiohypertunity._executors.slurm.pace import Budget, Mood, next_look
from aiohypertunity._executors.slurm.report import Ending, report
from aiohypertunity._executors.slurm.shell import Sign
from aiohypertunity._executors.slurm.verdict import Facts, Fate, judge
from aiohypertunity._model.sbatch_options import RESERVED, sbatch_options, seconds
from aiohypertunity._wire import payloads as _payload
from aiohypertunity._wire import spool
from aiohypertunity._wire.node import _check_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_our_own_options_are_refused_by_name(name: str) -> None:
    """An option that we need ourselves is refused when the job is made, and the error names it."""
    with pytest.raises(ValueError, match=name):
        SlurmJob(len, ([],), meta={"options": {name: "x"}})
    with pytest.raises(ValueError, match="can't be set"):
        ht.Slurm(options={name.replace("-", "_"): "x"})


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("commen", "comment"), ("out", "output"), ("job_nam", "job-name"), ("cluster", "clusters"),
        ("wai", "wait"), ("open", "open-mode"), ("no-req", "no-requeue"), ("requ", "requeue"),
    ],
)  # fmt: skip
def test_abbreviations_of_our_own_options_are_refused(name: str, wanted: str) -> None:
    """sbatch takes the beginning of an option's name for it: so don't we."""
    with pytest.raises(ValueError, match=f"would take it for '{wanted}'"):
        SlurmJob(len, ([],), meta={"options": {name: "x"}})


def test_names_that_only_look_like_abbreviations() -> None:
    """Options whose names begin as others' do are their own."""
    names = (
        "time",
        "time-min",
        "mem",
        "gpus",
        "gpus-per-node",
        "nodes",
        "export",
        "exclude",
        "wait-all-nodes",
    )
    SlurmJob(len, ([],), meta={"options": dict.fromkeys(names, "1")})


@pytest.mark.parametrize(
    ("for_all", "for_job", "wanted"),
    [
        ({}, {}, True),
        ({"requeue": False}, {}, False),
        ({"no-requeue": True}, {}, False),
        ({"no_requeue": False}, {}, True),
        ({"requeue": False, "no-requeue": True}, {}, False),
        ({"requeue": False}, {"requeue": True}, True),
        ({"no-requeue": True}, {"requeue": True}, True),
        ({"requeue": True}, {"no_requeue": True}, False),
        ({"requeue": False}, {"requeue": None}, True),
        ({"requeue": False, "no-requeue": None}, {}, False),
    ],
)
def test_requeue_is_always_said(
    for_all: dict[str, Any], for_job: dict[str, Any], wanted: bool
) -> None:
    """Exactly one of requeue and no-requeue is given, and the job's own word counts."""
    said = [o for o in sbatch_options(for_all, for_job, {}) if "requeue" in o]
    assert said == ["--requeue" if wanted else "--no-requeue"]


@pytest.mark.parametrize(
    "options", [{"requeue": "no"}, {"requeue": True, "no-requeue": True}, {"no_requeue": 5}]
)
def test_impossible_words_on_requeue(options: dict[str, Any]) -> None:
    """Both at once, or neither, is refused when the job is made."""
    with pytest.raises((TypeError, ValueError), match="requeue"):
        SlurmJob(len, ([],), meta={"options": options})


@pytest.mark.parametrize(
    "meta",
    [
        {"options": {"--partition": "x"}},
        {"options": {"p": "x"}},
        {"options": {"exclude": "a\nb"}},
        {"resources": {"cpus": 2}},
        {"resources": {"cpu": 0}},
        {"resources": {"gpu": "a100:many"}},
        {"resources": {"memory": "8X"}},
        {"resources": {"time": "soon"}},
    ],
)
def test_impossible_requests(meta: dict[str, Any]) -> None:
    """What can't be asked for is refused when the job is made."""
    with pytest.raises(ValueError):
        SlurmJob(len, ([],), meta=meta)


@pytest.mark.parametrize(
    "wrong",
    [
        {"workdir": 5}, {"python": []}, {"setup": "module load x"}, {"max_in_flight": 0}, {"keep": "all"},
        {"give_up_after": -1}, {"connect": {}}, {"host": ""}, {"options": []}, {"workdir": "/a%b"},
        {"workdir": "/a\\b"}, {"host": "there", "workdir": "~/a%b"},
        {"host": "there", "connect": {"options": object()}},
    ],
)  # fmt: skip
def test_impossible_clusters(wrong: dict[str, Any]) -> None:
    """A mistake in `Slurm(...)` fails where it's made."""
    with pytest.raises((TypeError, ValueError)):
        ht.Slurm(**wrong)


def test_a_relative_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It's below the directory where it was named, and checked as such; another host knows its own."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/me")
    slurm = ht.Slurm(workdir="work")
    assert slurm.workdir == f"{here}/work"
    assert dataclasses.replace(slurm, keep="failed").workdir == f"{here}/work"
    assert ht.Slurm(workdir="~/work").workdir == "/home/me/work"
    assert ht.Slurm("there", workdir="~/work").workdir == "~/work"
    assert ht.Slurm().workdir is None
    monkeypatch.setenv("HOME", "/home/%u")
    with pytest.raises(ValueError, match="%"):
        ht.Slurm()
    (tmp_path / "a%jb").mkdir()
    monkeypatch.chdir(tmp_path / "a%jb")
    with pytest.raises(ValueError, match="a%jb/work"):
        ht.Slurm(workdir="work")


def test_a_password_is_in_no_repr() -> None:
    """What connects may hold a secret."""
    assert "secret" not in repr(ht.Slurm("me@there", connect={"password": "secret"}))


def test_the_nearer_option_wins() -> None:
    """A job's options go before those for all, resources before both; requeue is always said."""
    options = sbatch_options(
        {"partition": "a", "mem": "1G", "hold": True},
        {"partition": "b", "hold": None},
        {"memory": "2gb", "gpu": "a100:2"},
    )
    assert set(options) == {
        "--partition=b",
        "--mem=2G",
        "--gres=gpu:a100:2",
        "--requeue",
        "--kill-on-invalid-dep=yes",
    }


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        ("3", 180),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("1-2", 93600),
        ("1-0:30", 88200),
        ("UNLIMITED", None),
    ],
)
def test_times(limit: str, wanted: float | None) -> None:
    """Slurm's ways to write a time."""
    assert seconds(limit) == wanted


# --- what Slurm says -----------------------------------------------------------------------------


@given(st.sets(st.integers(0, 3000), min_size=1))
def test_indices_there_and_back(indices: set[int]) -> None:
    """What is cancelled by a list of ranges is what the list was made from."""
    listed = text.parse_ids(f"7_[{text.format_indices(indices)}]")
    assert sorted(listed) == [("7", index) for index in sorted(indices)]


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ("12_3", [3]),
        ("12_[5-7%4]", [5, 6, 7]),
        ("12_[0,4-8:2]", [0, 4, 6, 8]),
        ("12", []),
        ("12_[5-", []),
        ("", []),
    ],
)
def test_ids(ids: str, wanted: list[int]) -> None:
    """The ways in which squeue names elements; what isn't one is none."""
    assert [index for _, index in text.parse_ids(ids)] == wanted


def test_a_look() -> None:
    """States lose their trimmings, and a reason may hold anything."""
    answer = "9_[1-2]|PENDING|run.1||(Reason, with | and spaces)\n9_0|CANCELLED by 0|run.1|n1|None\nwelcome to the cluster\n"
    seen = text.parse_look(answer)
    assert seen["9", 2].reason == "(Reason, with | and spaces)"
    assert seen["9", 0] == text.Seen("CANCELLED", "run.1", "n1", "")
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("stdout", "wanted"),
    [
        ("123\n", "123"),
        ("123;cluster\n", "123"),
        ("welcome\n123\nbye 5\n", "123"),
        ("Submitted batch job\n", None),
        ("", None),
    ],
)
def test_what_sbatch_says(stdout: str, wanted: str | None) -> None:
    """The id, among whatever banners and plugins write."""
    assert text.parse_submitted(stdout) == wanted


POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
REFUSALS = {
    "limit": [
        POLICY,
        "Job violates accounting policy (job submit limit, the user's size and/or time limits)",
        f"AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: {POLICY}",
        f"AssocGrpSubmitJobsLimit\nsbatch: error: Batch job submission failed: {POLICY}",
        f"QOSGrpSubmitJobsLimit\nsbatch: error: Batch job submission failed: {POLICY}",
        "QOSMaxSubmitJobPerUserLimit",
    ],
    "busy": [
        "Batch job submission failed: Socket timed out on send/recv operation",
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Communication connection failure",
        "Message receive failure",
        "Unable to create job record, try again",
        "Slurm backup controller in standby mode",
        "Controller is in standby mode, try a different controller",
        "Slurm temporarily unable to accept job, sleeping and retrying",
        "Zero Bytes were transmitted or received",
        "Unexpected missing socket error",
    ],
    "again": [
        "oops",
        "Unspecified error",
        "I/O error writing script/environment to file",
        "Requested operation is presently disabled",
        "System submissions disabled",
        "Requested nodes are busy",
        "Invalid authentication credential",
        "Authentication credential invalid",
        "Protocol authentication error",
        "Requested reservation not usable now",
    ],
    "never": [
        f"QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: {POLICY}",
        f"AssocMaxCpuPerJobLimit\nsbatch: error: Batch job submission failed: {POLICY}",
        f"QOSMinGRES\nsbatch: error: Batch job submission failed: {POLICY}",
        "Invalid partition name specified",
        "No partition specified or system default partition",
        "Access/permission denied",
        "User's group not permitted to use this partition",
        "Requested nodes not in this partition",
        "More processors requested than permitted",
        "Node count specification invalid",
        "Job size specification needs to be provided",
        "Pathname of a file, directory or other parameter too long",
        "Requested node configuration is not available",
        "Requested partition configuration not available now",
        "Invalid node name specified",
        "Task distribution specification invalid",
        "Invalid feature specification",
        "Requested operation not supported on this system",
        "Job dependency problem",
        "Circular job dependency",
        "Requested more tasks than available processors",
        "Memory required by task is not available",
        "Invalid account or account/partition combination specified",
        "Job has invalid qos",
        "Invalid qos specification",
        "Invalid wckey specification",
        "Invalid license specification",
        "Requested time limit is invalid (missing or exceeds some limit)",
        "Requested time limit exceeds partition limit",
        "Access denied to requested reservation",
        "Requested reservation is invalid",
        "Required partition not available (inactive or drain)",
        "Invalid generic resource (gres) specification",
        "Requested account has breached requested QOS usage threshold",
        "Invalid job array specification",
        "Burst Buffer resource limit exceeded",
        "Invalid Trackable RESource (TRES) specification",
        "Requested GRES option unsupported by configured SelectType plugin",
        "Time limit specification required, but not provided",
        "Multiple partition job request not supported when a partition is set in the association",
        "Job exceeds what a user may have",
        "cli_filter plugin terminated with error",
        "unrecognized option '--nonsense'",
        "option '--t' is ambiguous; possibilities: '--time' '--time-min'",
        "option '--time' requires an argument",
    ],
}


@pytest.mark.parametrize("wanted", REFUSALS)
def test_refusals(wanted: str) -> None:
    """What time may mend is told from what it won't: all that sbatch says for itself or for slurmctld."""
    found = {words: text.refusal(f"sbatch: error: {words}") for words in REFUSALS[wanted]}
    assert found == dict.fromkeys(found, wanted)


def test_noise_before_a_refusal() -> None:
    """What a setup complains of is no word of sbatch's."""
    noise = "bash: line 2: nvidia-smi: command not found\n"
    assert text.refusal(f"{noise}sbatch: error: Socket timed out on send/recv operation") == "busy"
    assert text.refusal(f"{noise}sbatch: error: oops") == "again"
    assert text.refusal("sh: 1: sbatch: not found") == "never"


NO_CONFIGURATION = """\
echo 'scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host' >&2
echo 'scontrol: error: fetch_config: DNS SRV lookup failed' >&2
echo 'scontrol: fatal: Could not establish a configuration source' >&2
exit 1
"""
NO_CONTROLLER = "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1\n"
CONFIGURATION = """\
echo 'KillWait                = 7 sec'
echo 'MaxArraySize            = {}'
echo 'SLURM_VERSION           = 22.05.8'
"""


@pytest.mark.parametrize(
    ("scontrol", "hopeless", "complaint", "max_array"),
    [
        (NO_CONFIGURATION, "this machine has sbatch, but no slurm.conf", "DNS SRV", 1000),
        (NO_CONTROLLER, None, "Unable to contact", 1000),
        (CONFIGURATION.format(50), None, "", 50),
        ("echo 'plugin not found: no such file' >&2\n" + CONFIGURATION.format(50), None, "", 50),
        (CONFIGURATION.format(0), "MaxArraySize", "", 1),
    ],
)
def test_a_site(
    scontrol: str, hopeless: str | None, complaint: str, max_array: int, tmp_path: Path
) -> None:
    """A cluster that can't be used is told from one that is away, whatever is written around it."""
    script(tmp_path / "scontrol", f"#!/bin/sh\n{scontrol}", mode=0o755)
    script(tmp_path / "sbatch", "#!/bin/sh\n", mode=0o755)
    stdout = answer_of(tmp_path)
    found = text.hopeless(stdout)
    assert (found is None) == (hopeless is None)
    assert (hopeless or "") in (found or "")
    assert complaint in text.complaint(stdout)
    assert bool(complaint) == bool(text.complaint(stdout))
    site = text.parse_site(stdout)
    assert site.max_array == max_array
    assert site.kill_wait == (7 if "KillWait" in scontrol else 30)


def test_no_site(tmp_path: Path) -> None:
    """No sbatch, and a configuration that isn't there, are said in plain words."""
    assert "no sbatch on PATH" in str(text.hopeless(answer_of(tmp_path)))
    script(tmp_path / "sbatch", "#!/bin/sh\n", mode=0o755)
    assert text.hopeless(answer_of(tmp_path)) is None
    assert "/no/where can't be read" in str(text.hopeless(answer_of(tmp_path, "/no/where")))


def answer_of(path: Path, conf: str = "") -> str:
    noise = "echo 'MaxArraySize = 3'; echo 'bash: nvidia-smi: command not found' | tee /dev/stderr"
    command = f"{noise}\n{text.SITE_COMMAND}"
    env = {
        "PATH": f"{path}:/usr/bin:/bin" if (path / "scontrol").exists() else f"{path}",
        "SLURM_CONF": conf,
    }
    return subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, env=env, check=False
    ).stdout


@pytest.mark.parametrize(
    ("next_id", "boot", "wanted"),
    [(8, "b", False), (7, "b", True), (1, "b", True), (7, "a", False), (0, "b", False)],
)
def test_what_proves_a_loss(next_id: int, boot: str, wanted: bool) -> None:
    """Only a slurmctld that was started anew, and has yet to give out our id, has lost our array."""
    answer = f"BOOT_TIME               = {boot}\nNEXT_JOB_ID             = {next_id}\n"
    assert text.parse_controller(answer).has_lost("7", "a") is wanted


@pytest.mark.parametrize(
    ("reason", "failed", "held"),
    [
        ("launch failed requeued held", True, False),
        ("launch_failed_requeued_held", True, False),
        ("JobHoldMaxRequeue", True, False),
        ("JobHeldUser", False, True),
        ("JobHeldAdmin", False, True),
        ("job requeued in held state", False, True),
        ("Priority", False, False),
    ],
)
def test_holds(reason: str, failed: bool, held: bool) -> None:
    """Slurm's holds are told from those of people, and both only while the job waits."""
    seen = text.Seen("PENDING", "run.1", "", reason)
    assert (text.launch_failed(seen), text.is_held(seen)) == (failed, held)
    assert not text.launch_failed(seen._replace(state="CANCELLED"))


def test_only_ids_of_the_run_are_cancelled(tmp_path: Path) -> None:
    """An id that Slurm does not list under the run's name is not cancelled."""
    script(tmp_path / "squeue", "#!/bin/sh\nprintf '7\\n9\\n'\n", mode=0o755)
    script(tmp_path / "scancel", '#!/bin/sh\necho "$@"\n', mode=0o755)
    command = text.cancel_command("run", [("7", 0), ("7", 1), ("8", 2)], ["9", "10"], ["--x"])
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.check_output(["sh", "-c", command], text=True, env=env)
    assert said == "--x 9 7_[0-1]\n"


def test_accounts() -> None:
    """Steps add what they know to their job; jobs of others with the same id are none of ours."""
    found = text.parse_accounts(
        "7_0|mine|FAILED|0:9|n1|\n7_0.batch|batch|OUT_OF_MEMORY|0:125|n1|5000K\n7_1|other|COMPLETED|0:0|n1|\n",
        "mine",
    )
    assert found == {("7", 0): text.Accounted("OUT_OF_MEMORY", 0, 9, "n1", 5000 * 1024)}


@given(st.text("0123456789.onrudltec-abc", max_size=30))
def test_any_name_in_the_spool(name: str) -> None:
    """No file's name upsets the reader of names."""
    sign = shell.parse_sign(name)
    assert sign is None or sign.element >= 0


def test_signs() -> None:
    """What names tell."""
    assert shell.parse_sign("5.0.end.77.143.TERM") == Sign(5, 0, "end", "77", 143, "TERM")
    assert shell.parse_sign("5.1.on.77.node7.site") == Sign(5, 1, "on", "77", node="node7.site")
    assert shell.parse_sign("5.0.result") == Sign(5, 0, "result")
    assert shell.parse_sign("[0-9]*") is None
    assert shell.parse_sign("5.stop") is None


@pytest.mark.parametrize("program", ["sh", "bash", "dash"])
def test_the_batch_script_is_shell(program: str) -> None:
    """The script and its table are right for every shell, whatever stands in them."""
    if shutil.which(program) is None:
        pytest.skip(f"no {shell} here")
    awkward = 'it\'s "$HOME" `x` \\ \n%'
    elements = [
        shell.Element(
            shell.Script(("run", awkward), ("--output_file",), awkward),
            awkward,
            True,
            (("A", awkward),),
            0.5,
        ),
        shell.Element(shell.Callable((awkward, "-u"), awkward)),
    ]
    for piece in shell.batch_script(awkward, ["true"], elements):
        assert piece is not None
        subprocess.run([program, "-n"], input=piece, text=True, check=True)


class Node:
    """Runs a batch script as Slurm would."""

    def __init__(self, directory: Path, *elements: shell.Element) -> None:
        self.directory = directory / "ht-run" / "s1"
        self.directory.mkdir(parents=True)
        script, table = shell.batch_script(str(self.directory), [], elements)
        (self.directory / shell.TABLE).write_text(table or "")
        self.script = directory / "batch"
        self.script.write_text(script, errors="surrogateescape")

    @contextlib.contextmanager
    def start(
        self, index: int = 0, *, array: str = "7", restart: int = 0
    ) -> Iterator[subprocess.Popen[bytes]]:
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": array}
        env["SLURM_RESTART_COUNT"] = str(restart)
        batch = subprocess.Popen(["sh", self.script], env=env | {"SLURMD_NODENAME": "n1"})
        with batch:
            try:
                yield batch
            finally:
                batch.kill()

    def run(self, **options: Any) -> int:
        with self.start(**options) as batch:
            return batch.wait(20)

    def fence(self, *elements: int) -> list[str]:
        command = shell.fence(str(self.directory), elements)
        return subprocess.check_output(["sh", "-c", command], text=True).split()

    def stop(self, *elements: int) -> None:
        subprocess.run(["sh", "-c", shell.stop(str(self.directory), elements)], check=True)

    def names(self) -> set[str]:
        return {path.name.removesuffix(".0") for path in self.directory.glob("[0-9]*")}


def announcing(pid: Path) -> shell.Element:
    words = ("sh", "-c", f"sleep 60 & echo $! >{shlex.quote(str(pid))}; wait")
    return shell.Element(shell.Script(words, None, None))


def calling(directory: Path, *python: str) -> shell.Element:
    """An element that calls what is packed; our own code stands in for the node's."""
    for name, content in node_code().items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return shell.Element(shell.Callable(python or (sys.executable,), str(directory)))


def test_what_is_stopped_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs a stopped element ends it within two seconds or so, and says so; its siblings run on.

    They end as well when the directory is removed.
    """
    monkeypatch.setattr(shell, "MISSED", 2)
    node = Node(tmp_path, announcing(tmp_path / "0"), announcing(tmp_path / "1"))
    with node.start(0) as stopped, node.start(1) as other:
        pids = [number_in(tmp_path / name) for name in ("0", "1")]
        node.stop(0)
        assert stopped.wait(20) == 137
        wait_until(lambda: not is_alive(pids[0]))
        assert node.names() == {"0.stop", "0.0.end.7.137", "1.0.on.7.n1"}
        assert node.run() == 0  # a second one doesn't begin
        shutil.rmtree(node.directory)
        assert other.wait(30) == 137
    wait_until(lambda: not is_alive(pids[1]))


def test_an_element_belongs_to_one_array(tmp_path: Path) -> None:
    """A restart of the array that has it runs; another array does not, whatever its restart."""
    node = Node(tmp_path, shell.Element(shell.Script(("true",), None, None)))
    assert node.run() == 0
    assert node.run(array="8") == 0
    assert node.run(array="8", restart=1) == 0
    assert node.run(restart=1) == 0
    assert node.names() == {"0.0.end.7.0", "0.1.end.7.0"}


def test_a_claim_that_is_not_written_yet(tmp_path: Path) -> None:
    """A restart waits for a claim that has been made and holds nothing yet."""
    node = Node(tmp_path, shell.Element(shell.Script(("true",), None, None)))
    (node.directory / "claim.0").touch()
    with node.start(restart=1) as batch:
        (node.directory / "claim.0").write_text("7\n")
        assert batch.wait(20) == 0
    assert node.names() == {"0.1.end.7.0"}


def test_a_fence(tmp_path: Path) -> None:
    """A fenced element starts in no array; one that has started is named, however often it is asked."""
    element = shell.Element(shell.Script(("true",), None, None))
    node = Node(tmp_path, element, element)
    assert node.run(index=1) == 0
    assert node.fence(0, 1) == node.fence(0, 1) == ["1"]
    assert node.run() == node.run(array="8") == node.run(restart=1) == 0
    assert node.names() == {"1.0.end.7.0"}


def test_a_callable_that_is_stopped_ends(tmp_path: Path) -> None:
    """The same for a callable, which has a guard of its own."""
    node = Node(tmp_path, calling(tmp_path / "node"), calling(tmp_path / "node"))
    function, _ = _payload.pack_function(tasks.announce, None)
    paths = [tmp_path / name for name in ("0", "1")]
    calls = [spool.Packed(function, pickle.dumps((str(path),))) for path in paths]
    here = {"python": list(sys.version_info[:2]), "sys_path": sys.path}
    (node.directory / spool.CALLS).write_bytes(spool.pack(calls, here))
    with node.start(0) as stopped, node.start(1) as other:
        pids = list(map(number_in, paths))
        node.stop(0)
        assert stopped.wait(20) == 137
        shutil.rmtree(node.directory)
        assert other.wait(30) == 137
    assert not any(map(is_alive, pids))


def test_a_session_of_its_own(tmp_path: Path) -> None:
    """What starts a callable may have made it the leader of a session: so much the better."""
    node = Node(tmp_path, calling(tmp_path / "node", "setsid", sys.executable))
    pack = spool.pack(
        [spool.Packed(_payload.pack_function(len, None)[0], pickle.dumps(("abc",)))],
        {"python": list(sys.version_info[:2]), "sys_path": sys.path},
    )
    (node.directory / spool.CALLS).write_bytes(pack)
    assert node.run() == 0
    assert "0.0.result" in node.names()


def test_functions_by_name_need_no_cloudpickle(tmp_path: Path) -> None:
    """A call by reference, or of a script's function, imports no cloudpickle on its node."""
    path = tmp_path / "of_a_script.py"
    path.write_text("import sys\ndef loaded(name): return name in sys.modules")
    named = _payload.name_function("loaded", path=str(path), module=None)
    packed = [_payload.pack_function(tasks.is_loaded, None)[0], named]
    node = Node(tmp_path, *(calling(tmp_path / "node") for _ in packed))
    payload = pickle.dumps(("cloudpickle",))
    here = {"python": list(sys.version_info[:2]), "sys_path": sys.path}
    pack = spool.pack([spool.Packed(function, payload) for function in packed], here)
    (node.directory / spool.CALLS).write_bytes(pack)
    for index in range(2):
        with node.start(index) as process:
            assert process.wait(60) == 0
        reply = spool.parse_result((node.directory / f"{index}.0.result").read_bytes())
        assert _payload.loads(reply.blob) is False


def test_any_environment(tmp_path: Path) -> None:
    """A job's environment may have any names, and touches no variable of the script's own."""
    env = (
        ("my.var", "it's"),
        ("ht_dir", "/nowhere"),
        ("ht_key", "x"),
        ("-u", "y"),
        ("A", "\udcff"),
    )
    words = (
        sys.executable,
        "-c",
        "import os, sys; open(sys.argv[1], 'w').write(ascii(os.environ))",
    )
    node = Node(
        tmp_path, shell.Element(shell.Script((*words, f"{tmp_path}/env"), (), None), env=env)
    )
    assert node.run() == 0
    found = (tmp_path / "env").read_text()
    for name, value in (*env, ("AIOHYPERTUNITY_OUTPUT_FILE", f"{node.directory}/out.0.0.pkl")):
        assert f"{name!r}: {value!r}" in found
    assert node.names() == {"0.0.end.7.0"}


def test_a_program_that_looks_like_a_variable(tmp_path: Path) -> None:
    """A program with a "=" in its path gets its environment too."""
    program = script(tmp_path / "a=b", '#!/bin/sh\necho "$1 $A" >"${0%/*}/found"\n', mode=0o755)
    command = shell.Script((str(program), "x"), None, None)
    assert Node(tmp_path, shell.Element(command, env=(("A", "y"),))).run() == 0
    assert (tmp_path / "found").read_text() == "x y\n"


def test_the_watcher_lists_and_leaves(tmp_path: Any) -> None:
    """The watcher says what is there and what changes, and leaves when nobody listens any more."""
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "0.0.run").touch()
    watcher = subprocess.Popen(
        ["sh", "-c", shell.watcher(str(tmp_path))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "s1 0.0.run\n"
        (tmp_path / "s1" / "0.0.result").touch()
        assert watcher.stdout.readline() == "s1 0.0.result 0.0.run\n"
        watcher.stdin.close()
        watcher.wait(5)


def test_another_python() -> None:
    """Bytecode of another Python is refused, with what to do; a function that is only named isn't."""
    with pytest.raises(RuntimeError, match=r"Python 2\.7"):
        _check_python(b"... CodeType ...", [2, 7])
    _check_python(b"a name", [2, 7])


# --- verdicts ------------------------------------------------------------------------------------

TERM = Sign(0, 0, "end", "1", 143, "TERM")
KILL = Sign(0, 0, "end", "1", 137, "0")
GRACEFUL = Sign(0, 0, "end", "1", 0, "TERM")
LONG = 1000.0


def gone(state: str) -> text.Accounted:
    return text.Accounted(state, 0, 0, "n1", None)


@pytest.mark.parametrize(
    ("facts", "now", "wanted"),
    [
        # A result wins over whatever else is said.
        ({"result": True, "state": "FAILED", "end": TERM}, 0, Fate.READ),
        ({"bad_result": "cut"}, 0, Fate.LOST),
        # The shell's word.
        ({"end": Sign(0, 0, "end", "1", 3)}, LONG, Fate.EXITED),
        ({"end": Sign(0, 0, "end", "1", 3)}, 0.1, Fate.WAIT),
        ({"end": Sign(0, 0, "end", "1", 3), "is_script": True}, 0.1, Fate.EXITED),
        ({"end": Sign(0, 0, "end", "1", 0), "is_script": True}, 0, Fate.READ),
        ({"end": Sign(0, 0, "end", "1", 143, "TIME")}, 0, Fate.OUR_LIMIT),
        ({"end": Sign(0, 0, "end", "1", 137, "OOM")}, 0, Fate.MEMORY),
        ({"end": Sign(0, 0, "end", "1", 137, "KILL")}, 1, Fate.CRASHED),
        ({"end": Sign(0, 0, "end", "1", spool.SPOOL_FAILED)}, 1, Fate.LOST),
        ({"end": Sign(0, 0, "end", "1", spool.SPOOL_FULL)}, 1, Fate.LOST),
        # Killed: Slurm knows what for.
        ({"end": KILL}, 1, Fate.WAIT),
        ({"end": KILL}, LONG, Fate.CRASHED),
        ({"end": KILL, "state": "OUT_OF_MEMORY", "state_at": 1.0}, 2, Fate.MEMORY),
        ({"end": KILL, "state": "FAILED", "state_at": 1.0}, 2, Fate.CRASHED),
        ({"end": TERM}, LONG, Fate.WAIT),
        ({"end": TERM, "cancelled_at": 0.0}, 1, Fate.CANCELLED),
        ({"end": TERM, "state": "RUNNING", "state_at": -1.0}, LONG, Fate.WAIT),
        ({"end": TERM, "state": "COMPLETING", "state_at": 1.0}, LONG, Fate.WAIT),
        ({"end": TERM, "state": "PENDING", "state_at": 1.0}, LONG, Fate.WAIT),
        ({"end": TERM, "state": "TIMEOUT", "state_at": 1.0}, 2, Fate.SLURM_LIMIT),
        ({"end": TERM, "state": "CANCELLED", "state_at": 1.0}, 2, Fate.CANCELLED_OUTSIDE),
        ({"end": TERM, "state": "PREEMPTED", "state_at": 1.0, "state_since": 1.0}, 2, Fate.WAIT),
        ({"end": TERM, "state": "PREEMPTED", "state_at": 1.0, "state_since": 1.0}, 9, Fate.PREEMPTED),
        ({"end": TERM, "state": "FAILED", "state_at": 1.0, "state_since": 1.0}, 2, Fate.WAIT),
        ({"end": TERM, "state": "FAILED", "state_at": 1.0, "state_since": 1.0}, 9, Fate.CRASHED),
        ({"end": TERM, "stopping": True}, 1, Fate.CANCELLED),
        ({"end": KILL, "stopping": True}, 1, Fate.CANCELLED),
        ({"end": TERM, "missing_since": 1.0}, 2, Fate.CANCELLED_OUTSIDE),
        ({"end": TERM, "missing_since": 1.0, "account_open": True}, LONG, Fate.WAIT),
        ({"end": KILL, "missing_since": 1.0, "account": gone("CANCELLED")}, 2, Fate.CANCELLED_OUTSIDE),
        # It was told to end, and made the best of it: Slurm knows why.
        ({"end": GRACEFUL, "is_script": True}, LONG, Fate.WAIT),
        ({"end": GRACEFUL, "is_script": True, "state": "PENDING", "state_at": 1.0}, LONG, Fate.WAIT),
        ({"end": GRACEFUL, "is_script": True, "state": "COMPLETING", "state_at": 1.0}, LONG, Fate.WAIT),
        ({"end": GRACEFUL, "is_script": True, "state": "COMPLETED", "state_at": -1.0}, LONG, Fate.WAIT),
        ({"end": GRACEFUL, "is_script": True, "state": "COMPLETED", "state_at": 1.0, "state_since": 1.0}, 2, Fate.WAIT),
        ({"end": GRACEFUL, "is_script": True, "state": "COMPLETED", "state_at": 1.0, "state_since": 1.0}, 9, Fate.READ),
        ({"end": GRACEFUL, "is_script": True, "state": "COMPLETED", "state_at": 1.0, "missing_since": 3.0}, 4, Fate.READ),
        ({"end": GRACEFUL, "is_script": True, "state": "TIMEOUT", "state_at": 1.0}, 2, Fate.SLURM_LIMIT),
        ({"end": GRACEFUL, "is_script": True, "state": "CANCELLED", "state_at": 1.0}, 2, Fate.CANCELLED_OUTSIDE),
        ({"end": GRACEFUL, "is_script": True, "cancelled_at": 0.0}, 1, Fate.CANCELLED),
        ({"end": GRACEFUL, "is_script": True, "missing_since": 1.0, "account": gone("COMPLETED")}, 2, Fate.READ),
        ({"end": GRACEFUL, "is_script": True, "missing_since": 1.0, "account": gone("TIMEOUT")}, 2, Fate.SLURM_LIMIT),
        ({"end": GRACEFUL, "is_script": True, "missing_since": 1.0}, 2, Fate.CANCELLED_OUTSIDE),
        ({"end": Sign(0, 0, "end", "1", 5, "TERM"), "state": "FAILED", "state_at": 1.0}, 9, Fate.EXITED),
        # Slurm's word alone.
        ({"state": "CANCELLED", "state_since": 0.0, "stopping": True}, 1, Fate.CANCELLED),
        ({"state": "COMPLETED", "state_since": 0.0}, 5, Fate.WAIT),
        ({"state": "COMPLETED", "state_since": 0.0}, 11, Fate.LOST),
        ({"state": "NODE_FAIL", "state_since": 0.0}, 3, Fate.WAIT),
        ({"state": "NODE_FAIL", "state_since": 0.0}, 7, Fate.NODE),
        ({"state": "FAILED", "state_since": 0.0, "n_claims": 1}, 2, Fate.CRASHED),
        ({"state": "OF_A_LATER_VERSION"}, LONG, Fate.WAIT),
        ({"state": "COMPLETING"}, LONG, Fate.WAIT),
        # Absence, which proves little.
        ({"missing_since": 0.0, "n_missing": 1, "siblings": True}, 5, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 2, "siblings": True}, 9, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 2, "siblings": True}, 11, Fate.CANCELLED_OUTSIDE),
        ({"missing_since": 0.0, "n_missing": 2, "siblings": True, "account_open": True}, 11, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 2, "account": gone("COMPLETED")}, 11, Fate.LOST),
        ({"missing_since": 0.0, "n_missing": 2, "siblings": True, "stopping": True}, 1, Fate.CANCELLED),
        ({"missing_since": 0.0, "n_missing": 1, "siblings": True, "stopping": True}, 1, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 9}, 5, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 9}, 11, Fate.NEVER),
        ({"missing_since": 0.0, "n_missing": 9, "n_claims": 1}, 11, Fate.LOST),
        ({"missing_since": 2.0, "cancelled_at": 1.0}, 3, Fate.CANCELLED),
        ({"missing_since": 0.0, "cancelled_at": 1.0}, 3, Fate.WAIT),
        ({}, LONG, Fate.WAIT),
        # What slurmctld has forgotten, or may have.
        ({"missing_since": 0.0, "forgotten": True}, 1, Fate.WAIT),
        ({"missing_since": 0.0, "forgotten": True}, 2, Fate.FORGOTTEN),
        ({"missing_since": 0.0, "forgotten": True, "n_claims": 1}, 2, Fate.FORGOTTEN),
        ({"missing_since": 0.0, "forgotten": True, "n_claims": 1, "result": True}, 2, Fate.READ),
        ({"missing_since": 0.0, "forgotten": True, "stopping": True, "n_missing": 2}, 2, Fate.CANCELLED),
        ({"missing_since": 0.0, "forgotten": True, "end": TERM}, 2, Fate.FORGOTTEN),
        ({"missing_since": 0.0, "forgotten": True, "end": Sign(0, 0, "end", "1", 3)}, 2, Fate.EXITED),
        ({"missing_since": 0.0, "n_claims": 1, "restarted": True}, 11, Fate.FORGOTTEN),
        ({"missing_since": 0.0, "n_claims": 1, "restarted": None}, 11, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 9, "restarted": None}, 11, Fate.WAIT),
        ({"missing_since": 0.0, "n_missing": 9, "restarted": True}, 11, Fate.NEVER),
        # What could not be launched.
        ({"state": "PENDING", "state_at": 1.0, "launch_failed": 1}, LONG, Fate.WAIT),
        ({"state": "PENDING", "state_at": 1.0, "launch_failed": 2}, 2, Fate.UNLAUNCHED),
        ({"state": "PENDING", "state_at": 1.0, "launch_failed": 2, "stopping": True}, 2, Fate.WAIT),
        ({"state": "PENDING", "state_at": 1.0, "launch_failed": 2, "end": TERM}, 2, Fate.UNLAUNCHED),
        ({"state": "PENDING", "state_at": 1.0, "launch_failed": 2, "result": True}, 2, Fate.READ),
    ],
)  # fmt: skip
def test_verdicts(facts: dict[str, Any], now: float, wanted: Fate) -> None:
    """What became of an element, by what is known of it."""
    assert judge(Facts(**{"is_script": False} | facts), now) is wanted


def test_an_unknown_state_is_never_an_end() -> None:
    """Only states that are known to be an end make one, at whatever time."""
    for state in (
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "REQUEUE_HOLD",
        "RESIZING",
        "SIGNALING",
        "STAGE_OUT",
        "STOPPED",
        "X",
    ):
        assert (
            judge(Facts(is_script=False, state=state, state_at=5.0, state_since=5.0), 1e6)
            is Fate.WAIT
        )


# --- what is said of it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "options"),
    [
        ({"options": {"time": "1:30"}}, ()),
        ({"resources": {"time": "1:30"}}, ()),
        ({}, ("--partition=a", "--time=1:30")),
    ],
)
def test_a_limit_is_named_however_it_was_asked_for(
    meta: dict[str, Any], options: tuple[str, ...]
) -> None:
    """A time limit is known whether a resource, an option, or an option for all jobs asked for it."""
    job = SlurmJob(len, ([],), meta=meta)
    ending = Ending("7_0", end=TERM, elapsed=95.0, started=True, options=options)
    for fate in (Fate.SLURM_LIMIT, Fate.CANCELLED_OUTSIDE):
        outcome = report(job, fate, ending)
        assert isinstance(outcome.error, ht.JobTimeout)
        assert "its time limit (1:30)" in str(outcome.error)
    early = report(job, Fate.CANCELLED_OUTSIDE, dataclasses.replace(ending, elapsed=10.0))
    assert isinstance(early.error, ht.JobCancelled)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("DependencyNeverSatisfied", ": its dependency (afterok:5) can never be met"),
        ("Dependency", "somebody did it, or its dependency (afterok:5)"),
        ("Priority", "not by this scheduler"),
    ],
)
def test_a_dependency_that_cannot_be_met(reason: str, words: str) -> None:
    """Slurm cancels a job whose dependency can't be met: the error names that, and nobody's hand."""
    job = SlurmJob(len, ([],), meta={"options": {"dependency": "afterok:5"}})
    outcome = report(job, Fate.CANCELLED_OUTSIDE, Ending("7_0", state="CANCELLED", reason=reason))
    assert isinstance(outcome.error, ht.JobCancelled)
    assert words in str(outcome.error)


# --- when to look --------------------------------------------------------------------------------


def test_looks_get_rarer() -> None:
    """The longer nothing happens, the rarer the looks; a slow one is not repeated soon."""
    pauses = [next_look(Mood(None, 0.0), now, now) - now for now in (0.0, 20.0, 300.0)]
    assert pauses == sorted(pauses)
    assert pauses[0] < 3
    assert pauses[-1] <= 15
    assert next_look(Mood(0.0, 0.0, duration=0.5), 0.0, 0.0) == 25
    assert next_look(Mood(0.0, 0.0), 0.0, 0.0) < 0.5


def test_failed_looks_wait() -> None:
    """After a look that failed the next comes later and later."""
    pauses = [next_look(Mood(0.0, 0.0, n_failed=n), 0.0, 0.0) for n in range(1, 6)]
    assert pauses == sorted(pauses)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 3)), max_size=50))
def test_a_budget_is_kept(steps: list[tuple[float, int]]) -> None:
    """Who waits until there is enough never spends more than burst and flow allow."""
    budget, now, spent = Budget(60, 30), 0.0, 0
    for pause, amount in steps:
        now = max(now + pause, budget.ready(amount, now + pause))
        budget.spend(amount, now)
        spent += amount
    assert spent <= 30 + now + 1e-6


def test_submissions_keep_no_look_away() -> None:
    """However far submissions have overdrawn the budget, a look comes two seconds after the last."""
    budget = Budget(60, 30)
    for submission in range(100):
        budget.spend(1, submission / 50)
    assert budget.ready(2, 2.0) > 60
    assert budget.look_at(1.0, 2.0) == 3.0
    assert budget.look_at(-1e9, 2.0) == 2.0


# --- files ---------------------------------------------------------------------------------------

REPLY = spool.Reply(b"v", b"pickle", (("buffer", 3),), {"host": "n1"})


def test_a_result_there_and_back() -> None:
    """What was written is what is read."""
    assert spool.parse_result(b"".join(spool.format_result(REPLY))) == REPLY


def test_a_damaged_result() -> None:
    """A result that was cut anywhere, or of which any byte changed, is never read."""
    whole = b"".join(spool.format_result(REPLY))
    for cut in itertools.chain((whole[:n] for n in range(len(whole))), (whole + b"x",)):
        with pytest.raises(spool.BadFile):
            spool.parse_result(cut)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        with pytest.raises(spool.BadFile):
            spool.parse_result(bytes(changed))


def test_a_pack_there_and_back(tmp_path: Any) -> None:
    """Each element finds its own call, and a function is packed once."""
    function = b"f" * 1000
    calls = [spool.Packed(function, b"%d" % i, (), (f"part.{i}",)) for i in range(20)]
    content = spool.pack(
        [*calls, spool.Packed(b"g", "part.0")], {"python": [3, 11], "sys_path": []}
    )
    (tmp_path / spool.CALLS).write_bytes(content)
    assert content.count(function) == 1
    call, surroundings = spool.read_call(str(tmp_path), 7)
    assert (call.function, call.payload, call.files) == (function, b"7", (f"{tmp_path}/part.7",))
    assert surroundings["python"] == [3, 11]
    assert spool.read_call(str(tmp_path), 20)[0].payload == f"{tmp_path}/part.0"
