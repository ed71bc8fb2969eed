"""A job is frozen data, and what is wrong with it is an error where it's made."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import os
import pickle
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import tasks
from helpers import script

from aiohypertunity import Job, JobFailed, Result, SlurmJob, Status
from aiohypertunity._model.jobs import FunctionRef, ScriptRef
from aiohypertunity.sync import Scheduler as SyncScheduler

Sample = namedtuple("Sample", "lr depth")


@pytest.fixture
def happy(tmp_path: Path) -> Path:
    return script(
        tmp_path / "happy.py",
        """
        import sibling
        def smile(n=1): return sibling.FACE * n
        class Face:
            @staticmethod
            def wide(): return ":-D"
        """,
    )


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"task": 7}, TypeError, "must be a callable"),
        ({"task": None}, TypeError, "must be a callable"),
        ({"task": ""}, ValueError, "names no script"),
        ({"task": "nowhere.py"}, ValueError, "there is no script"),
        ({"task": "nowhere.py:f"}, ValueError, "there is no script"),
        ({"task": "no_such_module_here:f"}, ValueError, "no module"),
        ({"task": tasks.add, "args": 3}, TypeError, r"write args=\(3,\)"),
        ({"task": tasks.add, "args": [1, 2]}, TypeError, "must be a tuple"),
        ({"task": tasks.add, "args": "ab"}, TypeError, "must be a tuple"),
        ({"task": tasks.add, "args": {1: 2}}, TypeError, "must be strings"),
        ({"task": tasks.add, "args": ()}, TypeError, "don't fit"),
        ({"task": tasks.add, "args": (1, 2, 3)}, TypeError, "don't fit"),
        ({"task": tasks.add, "args": {"a": 1, "c": 2}}, TypeError, "don't fit.*no argument 'c'"),
        ({"task": tasks.double, "args": {"xx": 1}}, TypeError, "'xx': did you mean 'x'"),
        ({"task": tasks.double, "args": {}}, TypeError, "missing a required argument: 'x'"),
        ({"task": tasks.pid, "timeout": 0}, ValueError, "more than 0"),
        ({"task": tasks.pid, "timeout": float("nan")}, ValueError, "more than 0"),
        ({"task": tasks.pid, "timeout": "1"}, TypeError, "number of seconds"),
        ({"task": tasks.pid, "timeout": True}, TypeError, "number of seconds"),
        ({"task": tasks.pid, "retries": -1}, ValueError, "retries=-1"),
        ({"task": tasks.pid, "retries": 1.5}, ValueError, "retries=1.5"),
        ({"task": tasks.pid, "env": ["A"]}, TypeError, "dict of strings"),
        ({"task": tasks.pid, "env": {"A": 1}}, TypeError, "must be strings"),
        ({"task": tasks.pid, "env": {"A=B": "1"}}, ValueError, "no environment"),
        ({"task": tasks.pid, "cwd": "/no/such/place"}, ValueError, "no such directory"),
        ({"task": tasks.pid, "id": 1.5}, TypeError, "id=1.5"),
        ({"task": tasks.pid, "id": True}, TypeError, "id=True"),
        ({"task": tasks.pid, "meta": 3}, TypeError, "must be a dict"),
        ({"task": tasks.pid, "meta": {"colour": 1}}, ValueError, "unknown key 'colour'"),
        ({"task": tasks.pid, "meta": {"binary": "bash"}}, ValueError, "is for scripts"),
        ({"task": tasks.pid, "meta": {"resources": 3}}, TypeError, "must be a dict"),
        ({"task": tasks.pid, "meta": {"resources": {"cpu": 0}}}, ValueError, "from 1"),
        ({"task": tasks.pid, "meta": {"resources": {"gpu": -1}}}, ValueError, "from 0"),
        (
            {"task": tasks.pid, "meta": {"resources": {"memory": "8G"}}},
            ValueError,
            "memory is for a SlurmJob",
        ),
        ({"task": "/bin/true", "meta": {"output": "x"}}, ValueError, "'env'"),
        ({"task": "/bin/true", "meta": {"binary": "no-such-interpreter"}}, ValueError, "binary"),
    ],
)
def test_a_wrong_job_is_an_error_where_it_is_made(
    kwargs: dict[str, Any], kind: type[Exception], words: str
) -> None:
    """Every mistake that can be seen fails in the line that makes the job, and says what would be right."""
    with pytest.raises(kind, match=words):
        Job(**kwargs)


def test_a_script_that_cannot_run_is_an_error_where_it_is_made(tmp_path: Path) -> None:
    """A file that is neither executable nor of a known ending needs an interpreter's name."""
    plain = script(tmp_path / "plain", "echo")
    with pytest.raises(ValueError, match="isn't executable"):
        Job(plain)
    assert Job(plain, meta={"binary": "bash"}).target.path == str(plain)
    plain.chmod(0o755)
    assert Job(plain).target.binary == ()


def test_a_function_that_a_script_does_not_define_is_refused(happy: Path) -> None:
    """A name that isn't in the script is an error that lists those that are."""
    with pytest.raises(ValueError, match="no 'frown'.*Face.*smile"):
        Job(f"{happy}:frown")


def test_a_script_that_is_no_python_is_refused(tmp_path: Path) -> None:
    """A function can't be taken out of a file with a syntax error."""
    broken = script(tmp_path / "broken.py", "def f(:")
    with pytest.raises(ValueError, match="isn't valid Python"):
        Job(f"{broken}:f")


def test_every_spelling_of_a_function_in_a_script(
    happy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One colon or two, relative or absolute, dotted names too: fixed to an absolute path at once."""
    monkeypatch.chdir(happy.parent)
    wanted = FunctionRef("smile", path=str(happy))
    assert Job("happy.py:smile").target == wanted
    assert Job("happy.py::smile").target == wanted
    assert Job(f"{happy}:smile").target == wanted
    assert Job("happy.py:Face.wide").target == FunctionRef("Face.wide", path=str(happy))
    assert Job("os.path:join", args=("a",)).target == FunctionRef("join", module="os.path")


def test_relative_scripts_are_fixed_when_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later chdir doesn't change which script a job means."""
    script(tmp_path / "s.py", "")
    monkeypatch.chdir(tmp_path)
    job = Job("s.py")
    monkeypatch.chdir("/")
    assert job.target == ScriptRef(str(tmp_path / "s.py"), (sys.executable,))


@pytest.mark.parametrize("task", ["s.py", "s.py:f"])
def test_a_script_is_not_looked_for_in_cwd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Where it only is there, the error says which directory counts."""
    (tmp_path / "sub").mkdir()
    script(tmp_path / "sub" / "s.py", "def f(): pass")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there is {tmp_path}/sub/s.py, but .* not to its cwd"):
        Job(task, cwd="sub")
    with pytest.raises(ValueError, match=r"there is no script .*/s\.py$"):
        Job(task)
    assert Job(f"sub/{task}", cwd="sub").cwd == str(tmp_path / "sub")


def test_a_script_with_a_colon_in_its_name_is_a_script(tmp_path: Path) -> None:
    """What exists as a file is one, whatever its name looks like."""
    odd = script(tmp_path / "odd.py:name", "#!/bin/sh\n", mode=0o755)
    assert Job(odd).target == ScriptRef(str(odd))


def test_interpreters_by_ending(tmp_path: Path) -> None:
    """.py is this Python, .sh is bash, a program on PATH is found there, `binary` has the last word."""
    assert Job(script(tmp_path / "a.py", "")).target.binary == (sys.executable,)
    assert Job(script(tmp_path / "a.sh", "")).target.binary == ("bash",)
    assert os.path.basename(Job("true").target.path) == "true"
    named = Job(tmp_path / "a.py", meta={"binary": "bash"}).target.binary
    assert os.path.basename(named[0]) == "bash"


def test_ids_count_up_and_are_free_again() -> None:
    """An unfinished job's id can't be taken; once the job is gone it can. No registry only grows."""
    job = Job(tasks.pid, id="mine")
    with pytest.raises(ValueError, match="'mine' is in use by a job that isn't finished"):
        Job(tasks.pid, id="mine")
    del job
    gc.collect()
    assert Job(tasks.pid, id="mine").id == "mine"
    assert Job(tasks.pid).id != Job(tasks.pid).id


def test_the_id_of_a_finished_job_is_free(tmp_path: Path) -> None:
    """Though its result is held: a notebook's cell runs again. So is its output file."""
    path = script(tmp_path / "s.py", "")
    held = []
    with SyncScheduler(n_parallel=1) as scheduler:
        for _ in range(2):
            job = Job(path, args={"output_file": tmp_path / "out"}, id="again")
            scheduler.dispatch(job)
            with pytest.raises(ValueError, match="isn't finished"):
                job.replace(id="again", args={})
            with pytest.raises(ValueError, match=r"output file .* is in use by job 'again'"):
                job.replace()
            held += scheduler.collect()
    assert [result.id for result in held] == ["again", "again"]


def test_the_id_of_a_job_that_was_called_is_free() -> None:
    """It has run as well."""
    first = Job(tasks.pid, id="called")()
    assert Job(tasks.pid, id="called")().id == first.id


def test_a_finished_job_whose_id_was_taken_cannot_be_dispatched() -> None:
    """It says so and takes none of the others; once the id is free the job may run again."""
    with SyncScheduler(n_parallel=1) as scheduler:
        old = Job(tasks.pid, id="taken")
        fine = Job(tasks.pid, id="fine")
        scheduler.dispatch([old, fine])
        scheduler.collect()
        new = Job(tasks.pid, id="taken")
        with pytest.raises(ValueError, match=r"'taken' is in use.*replace\(\)"):
            scheduler.dispatch([fine, old])
        Job(tasks.pid, id="fine")
        assert scheduler.dispatch(new)[0].result().ok
        assert scheduler.dispatch(old)[0].result().ok
        with pytest.raises(ValueError, match="'taken' is in use"):
            scheduler.dispatch([old, new])


def test_an_id_is_in_use_until_every_scheduler_is_done_with_it(tmp_path: Path) -> None:
    """A job may be in two schedulers at once."""
    gates = [tmp_path / "0", tmp_path / "1"]
    job = Job(tasks.gate, args=(str(gates[0]),), id="twice")
    with SyncScheduler(n_parallel=1) as one, SyncScheduler(n_parallel=1) as other:
        one.dispatch(Job(tasks.gate, args=(str(gates[1]),)))
        behind_it = one.dispatch(job)[0]
        gates[0].touch()
        assert other.dispatch(job)[0].result().ok
        with pytest.raises(ValueError, match="isn't finished"):
            job.replace(id="twice")
        gates[1].touch()
        assert behind_it.result().ok
    assert job.replace(id="twice").id == "twice"


def test_a_job_that_was_refused_keeps_no_id() -> None:
    """A job that failed its checks leaves its id free."""
    with pytest.raises(ValueError, match="retries"):
        Job(tasks.pid, id="refused", retries=-1)
    assert Job(tasks.pid, id="refused").id == "refused"


def test_an_automatic_id_steps_over_taken_ones() -> None:
    """The next unused number is one that no unfinished job was given by hand."""
    last = Job(tasks.pid).id
    assert isinstance(last, int)
    held = [Job(tasks.pid, id=last + n) for n in (1, 2, 3)]
    assert Job(tasks.pid).id == last + len(held) + 1


def test_two_unfinished_jobs_cannot_share_an_output_file(tmp_path: Path) -> None:
    """The second job to name a result file is refused, however the path is spelled."""
    one = script(tmp_path / "s.py", "")
    kept = Job(one, args={"output_file": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="two can't share one"):
        Job(one, args={"--output_file": f"{tmp_path}/./out"})
    assert kept.output_path == str(tmp_path / "out")


def test_jobs_are_frozen() -> None:
    """No field can be set."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Job(tasks.pid).timeout = 3  # type: ignore[misc]


def test_replace_makes_another_job() -> None:
    """With an id of its own, the changes made and checked, the rest as it was."""
    job = Job(tasks.add, args=(1, 2), retries=2)
    other = job.replace(args=(3, 4))
    assert (other.args, other.retries, other.task) == ((3, 4), 2, tasks.add)
    assert other.id != job.id
    with pytest.raises(TypeError, match="don't fit"):
        job.replace(args=())


@pytest.mark.parametrize(
    "task", [tasks.pid, lambda: 3, functools.partial(tasks.add, 1), "os:getpid"]
)
def test_jobs_survive_pickle_copy_repr_and_asdict(task: Any) -> None:
    """Lambdas included; what comes back from a pickle is the same job, and registers nothing."""
    job = Job(task, id="kept", timeout=3, env={"A": "1"})
    back = pickle.loads(pickle.dumps(job))
    assert (back.id, back.timeout, back.env, back.args) == ("kept", 3, {"A": "1"}, ())
    assert copy.copy(job).id != job.id
    assert copy.deepcopy(job) is job
    assert "'kept'" in repr(job)
    assert dataclasses.asdict(job)["id"] == "kept"


def test_a_job_has_a_hash_and_is_equal_only_to_itself() -> None:
    """Whatever its arguments: jobs go into sets and dicts."""
    job = Job(tasks.add, args=([1], {2: 3}))
    assert {job, job} == {job}
    assert job != job.replace()


def test_arguments_from_a_namedtuple() -> None:
    """The ancestor's idiom: a sample's fields as arguments."""
    sample = Sample(lr=0.5, depth=3)
    assert Job(tasks.add, args=(*sample,))().data == 3.5
    assert Job(tasks.add, args=sample)().data == 3.5


def test_slurm_jobs_check_themselves_too() -> None:
    """And aren't run by calling them."""
    with pytest.raises(ValueError, match="unknown key"):
        SlurmJob(tasks.pid, meta={"colour": 1})
    with pytest.raises(TypeError, match="Slurm's to run"):
        SlurmJob(tasks.pid)()


class TestCallingAJob:
    """`job()` runs it here and now."""

    def test_a_callable_runs_in_this_process(self) -> None:
        """So that a debugger works."""
        result = Job(tasks.pid)()
        assert result.data == result.pid == os.getpid()
        assert result.status is Status.SUCCEEDED

    def test_a_failure_is_a_value(self) -> None:
        """The result carries the error with the original as its cause; reading the data raises it."""
        result = Job(tasks.fail, args=("no",))()
        assert not result.ok
        with pytest.raises(JobFailed, match="raised ValueError: no") as caught:
            _ = result.data
        assert isinstance(caught.value.__cause__, ValueError)

    def test_environment_and_directory_are_the_jobs_own(self, tmp_path: Path) -> None:
        """They are as before once it's over."""
        before = (os.getcwd(), dict(os.environ))
        job = Job(lambda: (os.getcwd(), os.environ["A"]), env={"A": "1"}, cwd=tmp_path)
        assert job().data == (str(tmp_path), "1")
        assert (os.getcwd(), dict(os.environ)) == before


class TestResults:
    """Failed results are as well-behaved as others."""

    @pytest.fixture
    def failed(self) -> Result[Any]:
        return Job(tasks.fail, args=("no",))()

    @pytest.mark.parametrize(
        "reproduce",
        [copy.copy, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))],
    )
    def test_copies(self, failed: Result[Any], reproduce: Any) -> None:
        """A copy, deep or through a pickle, has the error, its job and its cause."""
        other = reproduce(failed)
        assert (other.id, other.status, other.ok) == (failed.id, Status.FAILED, False)
        with pytest.raises(JobFailed) as caught:
            _ = other.data
        assert caught.value.job.id == failed.id
        assert isinstance(caught.value.__cause__, ValueError)
        assert "Traceback" in str(caught.value.__cause__.__cause__)

    def test_repr_asdict_hasattr(self, failed: Result[Any]) -> None:
        """They look, and don't raise; `asdict` leaves out the data that isn't there."""
        assert "FAILED" in repr(failed)
        assert "JobFailed" in repr(failed)
        assert "data" not in dataclasses.asdict(failed)
        assert dataclasses.asdict(failed)["status"] is Status.FAILED
        with pytest.raises(JobFailed):
            hasattr(failed, "data")

    def test_asdict_of_a_good_one_has_its_data(self) -> None:
        """And all other fields."""
        fields = dataclasses.asdict(Job(tasks.add, args=(1, 2))())
        assert fields["data"] == 3
        assert fields["error"] is None

    def test_frozen(self, failed: Result[Any]) -> None:
        """No field can be set."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            failed.id = 3  # type: ignore[misc]

    def test_every_read_raises_a_fresh_error(self, failed: Result[Any]) -> None:
        """So that a traceback doesn't grow with each read."""
        errors = []
        for _ in range(2):
            try:
                _ = failed.data
            except JobFailed as error:
                errors.append(error)
        assert errors[0] is not errors[1]
        assert failed.error is not None
        assert failed.error.__traceback__ is None
