"""Scripts and programs as jobs."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
import tasks
from helpers import PATIENCE, is_alive, number_in, script, until

from aiohypertunity import (
    Job,
    JobCancelled,
    JobCrashed,
    JobFailed,
    JobTimeout,
    Result,
    ResultLost,
    Scheduler,
    Status,
)

pytestmark = pytest.mark.anyio

ECHO = """
    import json, os, sys
    print(json.dumps([sys.argv[1:], os.environ["AIOHYPERTUNITY_OUTPUT_FILE"]]))
"""


async def run(scheduler: Scheduler, task: Any, args: Any = (), **kwargs: Any) -> Result[Any]:
    with anyio.fail_after(PATIENCE):
        return await scheduler.dispatch(Job(task, args=args, **kwargs))[0]


async def words(scheduler: Scheduler, *given: Any, **kwargs: Any) -> tuple[list[str], str]:
    result = await run(scheduler, *given, **kwargs)
    argv, output = json.loads(result.stdout)
    return argv, output


class TestArguments:
    """As the ancestor gave them."""

    async def test_a_tuple(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """`a b c OUTPUT`."""
        echo = script(tmp_path / "echo.py", ECHO)
        argv, output = await words(scheduler, echo, ("a", 2, 0.5, Path("/x")))
        assert argv == ["a", "2", "0.5", "/x", output]

    async def test_a_dict(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """`--key value ... --output_file OUTPUT`; a key with a dash is passed as it is."""
        echo = script(tmp_path / "echo.py", ECHO)
        argv, output = await words(scheduler, echo, {"lr": 0.1, "-v": 2, "--n-jobs": 3})
        assert argv == ["--lr", "0.1", "-v", "2", "--n-jobs", "3", "--output_file", output]

    async def test_none(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """No arguments, nothing appended; the path is in the environment all the same."""
        echo = script(tmp_path / "echo.py", ECHO)
        for args in ((), {}):
            argv, output = await words(scheduler, echo, args)
            assert argv == []
            assert output

    async def test_output_by_environment(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """`meta={"output": "env"}` appends nothing ever."""
        echo = script(tmp_path / "echo.py", ECHO)
        argv, output = await words(scheduler, echo, ("a",), meta={"output": "env"})
        assert argv == ["a"]
        assert output

    async def test_words_are_not_for_a_shell(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Whatever is in them arrives as it is."""
        echo = script(tmp_path / "echo.py", ECHO)
        odd = ("a b", "$HOME", "'\"", "*", "", "ü")
        assert tuple((await words(scheduler, echo, odd))[0][:-1]) == odd


class TestResults:
    """A pickle or JSON where the script was told."""

    @pytest.mark.parametrize(
        ("text", "data"),
        [
            (
                "import pickle, sys; pickle.dump({'a': (1, 2)}, open(sys.argv[-1], 'wb'))",
                {"a": (1, 2)},
            ),
            ("import json, sys; json.dump({'a': [1, 2]}, open(sys.argv[-1], 'w'))", {"a": [1, 2]}),
            (
                "import pickle, sys; pickle.dump(b'x' * (3 << 20), open(sys.argv[-1], 'wb'))",
                b"x" * (3 << 20),
            ),
            ("", None),
            ("import sys; print('only text', file=sys.stderr)", None),
        ],
    )
    async def test_what_a_script_may_leave(
        self, scheduler: Scheduler, tmp_path: Path, text: str, data: Any
    ) -> None:
        """No file and exit code 0 is None; text on stderr is only text."""
        result = await run(scheduler, script(tmp_path / "s.py", text), ("x",))
        assert result.data == data
        assert (result.exit_code, result.signal) == (0, None)

    @pytest.mark.parametrize(
        "content", [b"", b"garbage", b"\x80\x05garbage", pickle.dumps(1)[:-1], b"{"]
    )
    async def test_garbage(self, scheduler: Scheduler, tmp_path: Path, content: bytes) -> None:
        """Is `ResultLost`, with the path and what is wrong with it."""
        path = script(tmp_path / "s.py", f"import sys; open(sys.argv[-1], 'wb').write({content!r})")
        result = await run(scheduler, path, ("x",))
        assert isinstance(result.error, ResultLost)
        assert "can't be read" in str(result.error)
        assert (await run(scheduler, tasks.pid)).ok

    async def test_an_output_file_of_ones_own(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Is read and stays; what lay there before is moved away and can't pass for a result."""
        writer = script(
            tmp_path / "w.py",
            "import sys, pickle\nif '--write' in sys.argv: pickle.dump(7, open(sys.argv[2], 'wb'))",
        )
        out = tmp_path / "out.pkl"
        out.write_bytes(pickle.dumps("old"))
        assert (await run(scheduler, writer, {"output_file": out})).data is None
        assert pickle.loads((tmp_path / "out.pkl.before-1").read_bytes()) == "old"
        assert (await run(scheduler, writer, {"output_file": out, "--write": 1})).data == 7
        assert pickle.loads(out.read_bytes()) == 7

    async def test_a_relative_output_file(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Is relative to where the script runs."""
        text = "import sys, json; json.dump([1], open(sys.argv[2], 'w'))"
        path = script(tmp_path / "s.py", text)
        (tmp_path / "d").mkdir()
        result = await run(scheduler, path, {"output_file": "o.json"}, cwd=tmp_path / "d")
        assert result.data == [1]
        assert (tmp_path / "d" / "o.json").exists()

    async def test_json_by_its_ending(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """A path that ends in .json can only be JSON."""
        text = "import sys, pickle; pickle.dump(1, open(sys.argv[2], 'wb'))"
        result = await run(
            scheduler, script(tmp_path / "s.py", text), {"output_file": tmp_path / "o.json"}
        )
        assert isinstance(result.error, ResultLost)
        assert "JSON" in str(result.error)


class TestKinds:
    """Python, bash, executables, other interpreters."""

    async def test_bash(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """A .sh needs no mode; JSON can be written by `echo`."""
        path = script(tmp_path / "s.sh", 'echo "[1, \\"$1\\"]" > "$AIOHYPERTUNITY_OUTPUT_FILE"')
        assert (await run(scheduler, path, ("a",))).data == [1, "a"]

    async def test_an_executable(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Runs as it is; so does a program on PATH."""
        path = script(tmp_path / "tool", "#!/bin/sh\necho tool $1", mode=0o755)
        assert (await run(scheduler, path, ("a",))).stdout == "tool a\n"
        assert (await run(scheduler, "true")).ok

    async def test_an_interpreter_with_options(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """`meta={"binary": [...]}`."""
        path = script(tmp_path / "s", "echo $-")
        result = await run(scheduler, path, meta={"binary": ["bash", "-e", "-u"]})
        assert {"e", "u"} <= set(result.stdout)

    async def test_env_and_cwd(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Of this job alone, on top of the present environment."""
        path = script(tmp_path / "s.sh", "echo $A $HOME; pwd")
        result = await run(scheduler, path, env={"A": "1"}, cwd=tmp_path)
        assert result.stdout.splitlines() == [f"1 {os.environ['HOME']}", str(tmp_path)]

    async def test_standard_input_is_empty(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """A script that reads it doesn't wait for a terminal."""
        assert (await run(scheduler, script(tmp_path / "s.sh", "cat"))).stdout == ""


class TestFailures:
    """Each a clear error; the scheduler lives."""

    async def test_exit_code(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """`JobFailed` with the code and the last lines."""
        path = script(tmp_path / "s.sh", "echo out; echo the reason >&2; exit 3")
        result = await run(scheduler, path)
        assert isinstance(result.error, JobFailed)
        assert (result.error.exit_code, result.exit_code) == (3, 3)
        assert "exited with code 3" in str(result.error)
        assert "the reason" in str(result.error)
        assert (result.stdout, result.stderr) == ("out\n", "the reason\n")

    @pytest.mark.parametrize(
        ("text", "args", "is_told"),
        [
            (
                "import argparse; p = argparse.ArgumentParser(); p.add_argument('--lr'); p.parse_args()",
                {"lr": 1},
                True,
            ),
            ("import sys; open(sys.argv[-1])", ("x",), True),
            ("import sys; sys.exit('no such option: --output_file')", {"lr": 1}, True),
            ("import sys; sys.exit('usage: s.py [--output_file FILE]')", {"lr": 1}, False),
            ("import sys; sys.exit(2)", {"lr": 1}, False),
            ("import sys; sys.exit('no such option: --output_file')", {"output_file": "x"}, False),
            ("import sys; sys.exit('no such option: --output_file')", (), False),
        ],
    )
    async def test_one_that_knows_no_output_file(
        self, scheduler: Scheduler, tmp_path: Path, text: str, args: Any, is_told: bool
    ) -> None:
        """Is told what was appended to its arguments, and what leaves it out."""
        result = await run(scheduler, script(tmp_path / "s.py", text), args)
        assert isinstance(result.error, JobFailed)
        assert ("aiohypertunity appended" in str(result.error)) is is_told
        if is_told:
            assert "meta={'output': 'env'} leaves that out" in str(result.error)

    async def test_a_signal(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """`JobCrashed` with its number."""
        result = await run(scheduler, script(tmp_path / "s.sh", "echo last; kill -SEGV $$"))
        assert isinstance(result.error, JobCrashed)
        assert (result.error.signal, result.signal, result.exit_code) == (signal.SIGSEGV,) * 2 + (
            None,
        )
        assert "last" in str(result.error)

    async def test_missing_or_not_executable_by_now(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """It was there when the job was made."""
        gone = script(tmp_path / "gone", "#!/bin/sh\n", mode=0o755)
        locked = script(tmp_path / "locked", "#!/bin/sh\n", mode=0o755)
        jobs = [Job(gone), Job(locked)]
        gone.unlink()
        locked.chmod(0o644)
        results = [await handle for handle in scheduler.dispatch(jobs)]
        assert all(isinstance(r.error, JobFailed) for r in results)
        assert "could not be started" in str(results[0].error)
        assert "Permission denied" in str(results[1].error)

    async def test_no_program_at_all(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Executable, but nothing that the kernel can run."""
        path = script(tmp_path / "s", "just text", mode=0o755)
        result = await run(scheduler, path)
        assert isinstance(result.error, JobFailed)
        assert "Exec format error" in str(result.error)

    async def test_one_gigabyte_of_output(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """Little of it stays in memory or on disk; the result has the end."""
        path = script(tmp_path / "s.sh", "head -c 1073741824 /dev/zero; echo the end")
        rundir = scheduler._rundir
        assert rundir is not None
        (handle,) = scheduler.dispatch(Job(path))
        most = 0
        while not handle.done():
            # Blocks, not length: what was cut off is a hole.
            most = max(most, sum(e.stat().st_blocks * 512 for e in os.scandir(rundir.path)))
            await asyncio.sleep(0.01)
        result = await handle
        assert result.ok
        assert result.stdout.endswith("the end\n")
        assert len(result.stdout) <= 65_536
        assert most < 1 << 29


class TestEnding:
    """Timeout and cancel end the whole tree."""

    HANG = """
        import subprocess, sys, time
        print("hanging", flush=True)
        child = subprocess.Popen(["sleep", "600"], start_new_session=sys.argv[2] == "own")
        open(sys.argv[1], "w").write(f"{child.pid}\\n")
        time.sleep(600)
    """

    @pytest.mark.parametrize("session", ["same", "own"])
    @pytest.mark.parametrize("how", ["timeout", "cancel"])
    async def test_grandchildren_go_with_it(
        self, scheduler: Scheduler, tmp_path: Path, session: str, how: str
    ) -> None:
        """Also those with a session of their own: gone when the result is there."""
        path = script(tmp_path / "s.py", self.HANG)
        timeout = 1.5 if how == "timeout" else None
        (handle,) = scheduler.dispatch(Job(path, args=(tmp_path / "pid", session), timeout=timeout))
        grandchild = await asyncio.to_thread(number_in, tmp_path / "pid")
        if how == "cancel":
            handle.cancel()
        with anyio.fail_after(PATIENCE):
            result = await handle
        assert not is_alive(grandchild)
        assert isinstance(result.error, JobTimeout if how == "timeout" else JobCancelled)
        if how == "timeout":
            assert "hanging" in str(result.error)

    async def test_term_comes_first(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """So that a script can tidy up; it's cancelled all the same."""
        text = "trap 'echo tidied; exit 0' TERM; touch $1; while :; do sleep 0.01; done"
        path = script(tmp_path / "s.sh", text)
        (handle,) = scheduler.dispatch(Job(path, args=(tmp_path / "on",)))
        while not (tmp_path / "on").exists():
            await asyncio.sleep(0.005)
        handle.cancel()
        result = await handle
        assert "tidied" in result.stdout
        assert result.status in {Status.CANCELLED, Status.SUCCEEDED}

    async def test_kill_comes_after_the_grace(self, tmp_path: Path) -> None:
        """To one that doesn't listen."""
        path = script(tmp_path / "s.sh", "trap '' TERM; touch $1; while :; do sleep 0.01; done")
        async with Scheduler(n_parallel=1, kill_grace=0.1) as scheduler:
            (handle,) = scheduler.dispatch(Job(path, args=(tmp_path / "on",)))
            while not (tmp_path / "on").exists():
                await asyncio.sleep(0.005)
            handle.cancel()
            with anyio.fail_after(PATIENCE):
                assert (await handle).signal == signal.SIGKILL

    async def test_a_grandchild_that_holds_the_output_open(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """Doesn't keep the result waiting."""
        path = script(tmp_path / "s.sh", "sleep 600 & echo $! > $1; echo done")
        result = await run(scheduler, path, (tmp_path / "pid",))
        assert result.stdout == "done\n"
        grandchild = number_in(tmp_path / "pid")
        await until(lambda: not is_alive(grandchild), 2)

    async def test_cancelled_while_it_is_started(
        self, scheduler: Scheduler, tmp_path: Path
    ) -> None:
        """In every turn of the loop: nothing hangs, nothing is left."""
        path = script(tmp_path / "s.sh", "sleep 600")
        for turns in range(12):
            (handle,) = scheduler.dispatch(Job(path))
            for _ in range(turns):
                await asyncio.sleep(0)
            handle.cancel()
            with anyio.fail_after(PATIENCE):
                assert (await handle).status is Status.CANCELLED
        assert scheduler.statistics().n_running == 0

    async def test_retries(self, scheduler: Scheduler, tmp_path: Path) -> None:
        """A script that fails once."""
        path = script(tmp_path / "s.sh", 'echo x >> $1; [ "$(wc -l < $1)" = 2 ]')
        result = await run(scheduler, path, (tmp_path / "n",), retries=3)
        assert (result.ok, result.attempts) == (True, 2)


async def test_logs_keep_everything(tmp_path: Path) -> None:
    """The whole output is in `log_path`."""
    async with Scheduler(n_parallel=1, logs=tmp_path / "logs") as scheduler:
        path = script(tmp_path / "s.sh", "head -c 200000 /dev/zero; echo why >&2; exit 1")
        result = await run(scheduler, path)
    assert result.log_path is not None
    assert (result.log_path / "stdout").stat().st_size == 200_000
    assert (result.log_path / "stderr").read_text() == "why\n"


async def test_logs_keep_every_attempt(tmp_path: Path) -> None:
    """One after the other; the result has what the last one said."""
    async with Scheduler(n_parallel=1, logs=tmp_path / "logs", retries=1) as scheduler:
        path = script(
            tmp_path / "s.sh", 'echo x >> $1; echo $(wc -l < $1); [ "$(wc -l < $1)" = 2 ]'
        )
        result = await run(scheduler, path, (tmp_path / "n",))
    assert (result.attempts, result.stdout.strip()) == (2, "2")
    assert result.log_path is not None
    assert (result.log_path / "stdout").read_text().split() == ["1", "2"]


async def test_calling_a_scripts_job(tmp_path: Path) -> None:
    """`job()` runs a script as a scheduler would; also under a running loop."""
    path = script(tmp_path / "s.sh", "echo 5 > $AIOHYPERTUNITY_OUTPUT_FILE")
    assert Job(path)().data == 5


@pytest.mark.parametrize("umask", [0o000, 0o027])
async def test_logs_are_for_nobody_else_to_write(tmp_path: Path, umask: int) -> None:
    """The umask counts, and without one directories are 0755 and files 0644; of callables and of scripts."""
    logs = tmp_path / "above" / "logs"
    before = os.umask(umask)
    try:
        async with Scheduler(n_parallel=1, logs=logs) as scheduler:
            scheduler.dispatch([Job(tasks.pid), Job("true")])
            assert len([r async for r in scheduler.collect()]) == 2
    finally:
        os.umask(before)
    found = [logs.parent, *logs.parent.rglob("*")]
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in found}
    assert len(found) == 8
    assert modes == {(True, 0o755 & ~umask), (False, 0o644 & ~umask)}
