"""RULES: Slurm as text. Options in, batch script out, ids and states in.

Nothing here touches a file, a process or a clock.

The batch script is plain POSIX shell, and every element of an array runs the same. It claims its
element, runs the job as a child, waits for it through signals, and leaves word of how it ended in the *name* of
a file, since a name can be left on a disk that is full:

    5.0.run              element 5, restart 0, is claimed
    5.0.on.77.node7      it runs, as of array 77, on node7, or its shell was killed; took the claim's place
    5.0.result           what a callable returned or raised
    5.0.end.77.143.TERM  the child is gone: its exit code, and why as far as the shell knows; took the
                         place of the one before
    log.5  out.5.0.pkl  buffer.5.0.0     its output, what a script left, a large part of a result
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

RESERVED = {
    "job-name": "it marks the jobs of a run",
    "comment": "it marks the jobs of a submission",
    "array": "jobs are made into arrays by themselves: dispatch several",
    "output": "each job's output is kept for its result",
    "error": "each job's output is kept for its result",
    "parsable": "the answer of sbatch is read by us",
    "wait": "collect waits",
    "open-mode": "a requeued job goes on in the same log",
    "chdir": "say it with Job(cwd=...)",
    "wrap": "the job's task says what is run",
    "input": "jobs have no stdin",
    "test-only": "jobs are meant to run",
    "quiet": "the answer of sbatch is read by us",
    "clusters": "one cluster is asked; set SLURM_CONF for another",
}

_OPTION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
_SHORT = re.compile(r"[A-Za-z]\Z")
_GPU = re.compile(r"(?:[\w.-]+:)?\d+\Z")
_MEMORY = re.compile(r"\d+[KMGT]?\Z")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})\Z")


def check_options(options: object, what: str = "meta['options']") -> None:
    """Refuses what can't be an option of sbatch, and those that we need ourselves.

    Raises:
        TypeError: It isn't a dict of strings and plain values.
        ValueError: A name can't be one, or is ours.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"{what}={options!r}: must be a dict")
    for name, value in options.items():
        if not isinstance(name, str):
            raise TypeError(f"{what} has the key {name!r}: names of options are strings")
        long = option_name(name)
        if _SHORT.match(name):
            raise ValueError(f"{what}[{name!r}]: give the option by its long name")
        if not _OPTION.match(long):
            raise ValueError(
                f"{what}[{name!r}]: write a long option's name without dashes before it"
            )
        if long in RESERVED:
            raise ValueError(f"{what}[{name!r}] can't be set: {RESERVED[long]}")
        if value is not None and not isinstance(value, str | int | float | os.PathLike):
            raise TypeError(
                f"{what}[{name!r}]={value!r}: must be a string, a number, True, or None"
            )
        if "\n" in str(value) or "\0" in str(value):
            raise ValueError(f"{what}[{name!r}]={value!r}: must be one line")


def option_name(name: str) -> str:
    """An option's name as sbatch spells it: `cpus_per_task` is `cpus-per-task`."""
    return name.replace("_", "-")


def check_resources(resources: object) -> None:
    """Refuses resources that can't be asked for.

    Raises:
        TypeError: It isn't a dict, or an amount is of the wrong type.
        ValueError: A resource is unknown, or an amount impossible.
    """
    if not isinstance(resources, Mapping):
        raise TypeError(f"meta['resources']={resources!r}: must be a dict")
    for name, value in resources.items():
        if name not in _RESOURCES:
            known = ", ".join(_RESOURCES)
            raise ValueError(f"meta['resources'] has the unknown key {name!r}; it knows {known}")
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise TypeError(f"meta['resources'][{name!r}]={value!r}: must be a number or a string")
        pattern, wanted = _RESOURCES[name]
        if not pattern.match(str(value).upper() if name == "memory" else str(value)):
            raise ValueError(f"meta['resources'][{name!r}]={value!r}: must be {wanted}")


_RESOURCES = {
    "cpu": (re.compile(r"[1-9]\d*\Z"), "a whole number from 1"),
    "gpu": (_GPU, "a count, or 'type:count'"),
    "memory": (re.compile(_MEMORY.pattern.replace(r"\Z", r"B?\Z")), "megabytes, or as '8G'"),
    "time": (
        re.compile(rf"{_TIME.pattern[:-2]}\Z|UNLIMITED\Z"),
        "minutes, 'h:mm:ss', 'd-hh:mm:ss' or another time of Slurm's",
    ),
}


def seconds(limit: str) -> float | None:
    """A time of Slurm's in seconds; None for no limit.

    As sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds.
    """
    match = _TIME.match(limit)
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        units = (3600, 60, 1)
    else:
        units = (3600, 60, 1) if len(parts) == 3 else (60, 1, 0)
    amount = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return float(int(match["days"] or 0) * 86400 + amount)


def sbatch_options(
    for_all: Mapping[str, Any], for_job: Mapping[str, Any], resources: Mapping[str, Any]
) -> tuple[str, ...]:
    """The options of a job on the command line of sbatch: what is nearer to the job wins."""
    options = {option_name(name): value for name, value in (*for_all.items(), *for_job.items())}
    options.update(_resource_options(resources))
    if options.get("requeue") is None and options.get("no-requeue") is None:
        # Slurm's own default is a site's: never leave it open.
        options["requeue"] = True
    options["kill-on-invalid-dep"] = "yes"
    return tuple(_option(name, value) for name, value in sorted(options.items()) if is_on(value))


def is_on(value: object) -> bool:
    """Whether an option is there at all."""
    return value is not None and value is not False


def _option(name: str, value: object) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def _resource_options(resources: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "cpu" in resources:
        yield "cpus-per-task", str(resources["cpu"])
    if "gpu" in resources and str(resources["gpu"]) != "0":
        yield "gres", f"gpu:{resources['gpu']}"
    if "memory" in resources:
        yield "mem", str(resources["memory"]).upper().removesuffix("B")
    if "time" in resources:
        yield "time", str(resources["time"])


class Callable(NamedTuple):
    """An element that calls something in Python.

    Attributes:
        python: What runs it: a program and its options.
        nodes_code: The directory with the code for the node.
    """

    python: tuple[str, ...]
    nodes_code: str


class Script(NamedTuple):
    """An element that runs a command.

    Attributes:
        words: The command, less where it writes its result.
        output_words: What to put before the path of the result; None to append nothing.
        output: Where the user wants the result; None for a place of ours.
    """

    words: tuple[str, ...]
    output_words: tuple[str, ...] | None
    output: str | None


class Element(NamedTuple):
    """One job of an array.

    Attributes:
        command: What it runs.
        cwd: The directory to run in; None for the home directory.
        cwd_needed: Whether it can't run elsewhere.
        env: Environment variables to set.
        timeout: Seconds that it may run, or None.
    """

    command: Callable | Script
    cwd: str | None = None
    cwd_needed: bool = False
    env: tuple[tuple[str, str], ...] = ()
    timeout: float | None = None


def batch_script(
    directory: str, setup: Sequence[str], elements: Sequence[Element]
) -> tuple[str, str | None]:
    """The script for the stdin of sbatch; and, where the elements differ, the table it sources.

    Args:
        directory: Of the submission, where the table is to be put as `TABLE`.
        setup: Shell lines to run before each job, in its directory.
        elements: In the order of their indices, from 0.
    """
    distinct = list(dict.fromkeys(elements))
    table = None
    job = _element(distinct[0])
    if len(distinct) > 1:
        cases = "".join(f"{i})\n{_element(element)};;\n" for i, element in enumerate(elements))
        table = f"case $ht_index in\n{cases}esac\n"
        job = f'. "$ht_dir/{TABLE}"\n'
    # What people write in a setup is meant for bash.
    shell = "/bin/bash" if setup else "/bin/sh"
    head = _HEAD.format(shell=shell, directory=shlex.quote(directory))
    script = head + job + "\n".join((*setup, _TAIL))
    return script, table


def _element(element: Element) -> str:
    """The shell of an element: goes to its directory, and says how to run it."""
    lines = []
    command = element.command
    if element.cwd is not None:
        lines.append(_change_directory(shlex.quote(element.cwd), needed=element.cwd_needed))
    if element.timeout is not None:
        lines.append(f"ht_timeout={element.timeout:f}")
    if isinstance(command, Script):
        # A callable has a guard of its own, which costs no process.
        lines.append("ht_guard=1")
        output = (
            '"$ht_dir/out.${ht_key##*/}.pkl"'
            if command.output is None
            else shlex.quote(command.output)
        )
        lines.append(f"ht_out={output}")
        lines.append('if [ -e "$ht_out" ]; then mv -f "$ht_out" "$ht_out.before"; fi')
        lines.append('export AIOHYPERTUNITY_OUTPUT_FILE="$ht_out"')
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in element.env]
    return "\n".join((*lines, f"ht_job() {{\n{''.join(exports)}exec {_command(command)}\n}}\n"))


def _change_directory(path: str, *, needed: bool) -> str:
    if not needed:
        return f"cd {path} 2>/dev/null || :"
    sorry = f'echo "aiohypertunity: no directory "{path}" on ${{SLURMD_NODENAME:-this node}}" >&2'
    return f"cd {path} || {{ {sorry}; exit {NO_CWD}; }}"


def _command(command: Callable | Script) -> str:
    if isinstance(command, Callable):
        words = shlex.join((*command.python, "-c", _BOOT, command.nodes_code))
        return f'{words} "$ht_dir" "$ht_index" "$ht_key"'
    words = f"$ht_setsid {shlex.join(command.words)}"
    if command.output_words is None:
        return words
    return f'{words} {shlex.join(command.output_words)} "$ht_out"'


NODE_PACKAGE = "_aiohypertunity_node"
"""The name under which our code for the node is importable there, whatever else is installed."""

# Old Pythons must get as far as the message.
_BOOT = f"""\
import sys
if sys.version_info < (3, 10):
    sys.exit("aiohypertunity: Python 3.10 or later is needed on the nodes, and %s is %s"
             % (sys.executable, sys.version.split()[0]))
sys.path.insert(0, sys.argv[1])
from {NODE_PACKAGE}._slurm import node
del sys.path[0]
node.main(*sys.argv[2:])
"""

TABLE = "elements"
NO_DIRECTORY, CLAIM_FAILED, NO_CWD = 72, 73, 74

# No command is started in it that needn't be: a hundred elements start at once on a busy node.
_HEAD = """\
#!{shell}
ht_dir={directory}
ht_index=$SLURM_ARRAY_TASK_ID
ht_key=$ht_dir/$ht_index.${{SLURM_RESTART_COUNT:-0}}
ht_why=0 ht_child= ht_helpers= ht_timeout= ht_guard= ht_out= ht_begun= ht_setsid=

cd "$ht_dir" || exit 72
# The claim: a name that can be made once. Whoever comes second leaves.
set -C
if ! {{ true >"$ht_key.run"; }} 2>/dev/null; then
    [ -e "$ht_key.run" ] && exit 0
    echo "aiohypertunity: can't write in $ht_dir on ${{SLURMD_NODENAME:-this node}}" >&2
    exit 73
fi
set +C
for ht_mark in "$ht_key".on.* "$ht_key".end.*; do
    [ -e "$ht_mark" ] && {{ rm -f "$ht_key.run"; exit 0; }}
done
ht_mark=$ht_key.on.$SLURM_ARRAY_JOB_ID.${{SLURMD_NODENAME:-unknown}}
mv "$ht_key.run" "$ht_mark"

# Whether it was for memory that something here was killed.
ht_look_killed() {{
    while IFS=: read -r ht_rest ht_kinds ht_at; do
        case ,$ht_kinds, in
        *,memory,*) ht_at=/sys/fs/cgroup/memory$ht_at ht_file=memory.oom_control ;;
        ,,) ht_at=/sys/fs/cgroup$ht_at ht_file=memory.events ;;
        *) continue ;;
        esac
        while :; do
            case $ht_at in */job_*) ;; *) break ;; esac
            while read -r ht_rest ht_count; do
                [ "$ht_rest" = oom_kill ] || continue
                if [ "$ht_count" -gt 0 ]; then ht_why=OOM; return; fi
                ht_why=KILL
            done <"$ht_at/$ht_file"
            ht_at=${{ht_at%/*}}
        done
    done </proc/self/cgroup
}} 2>/dev/null
ht_now() {{ read -r ht_up ht_rest </proc/uptime || ht_up=$(date +%s); }} 2>/dev/null
ht_ended() {{
    trap '' TERM USR2 ALRM
    [ -z "$ht_helpers" ] || kill $ht_helpers 2>/dev/null
    [ "$1" -eq 0 ] && [ -e "$ht_key.result" ] && return
    [ "$1.$ht_why" != 137.0 ] || ht_look_killed
    ht_now
    echo "${{SLURMD_NODENAME:--}} $ht_begun $ht_up" >>"$ht_mark"
    mv "$ht_mark" "$ht_key.end.$SLURM_ARRAY_JOB_ID.$1.$ht_why"
}} 2>/dev/null
ht_kill() {{
    [ -n "$ht_child" ] || return
    kill -s "$1" -- "-$ht_child" || kill -s "$1" "$ht_child"
}} 2>/dev/null
# Ends the job when its time is up: Slurm's own limit counts minutes.
ht_timer() {{
    trap 'kill "$ht_nap"; exit' TERM
    sleep "$ht_timeout" & ht_nap=$!
    wait "$ht_nap"
    kill -s ALRM $$
    ht_kill TERM
    sleep 5 & ht_nap=$!
    wait "$ht_nap"
    ht_kill KILL
}} 2>/dev/null
# Ends the job when this shell was killed, where Slurm doesn't.
ht_guardian() {{
    trap 'kill "$ht_nap"; exit' TERM
    while kill -s 0 $$; do
        sleep 1 & ht_nap=$!
        wait "$ht_nap"
    done
    ht_kill KILL
}} 2>/dev/null
ht_now
ht_begun=$ht_up
trap 'ht_ended $?' EXIT
# Slurm's cgroups give a signal to the shell alone, unless it's KILL.
trap 'ht_why=TERM; ht_kill TERM' TERM
trap 'ht_why=USR2; [ -z "$ht_child" ] || kill -s USR2 "$ht_child"' USR2
trap 'ht_why=TIME' ALRM
cd || cd /
"""
_TAIL = """\
[ "$ht_why" = TERM ] && exit 143
if command -v setsid >/dev/null; then ht_setsid=setsid; fi
ht_job &
ht_child=$!
[ -z "$ht_guard" ] || { ht_guardian & ht_helpers=$!; }
[ -z "$ht_timeout" ] || { ht_timer & ht_helpers="$ht_helpers $!"; }
# A signal ends a wait, but not the child.
while :; do
    wait "$ht_child"
    ht_code=$?
    kill -s 0 "$ht_child" 2>/dev/null || break
done
exit "$ht_code"
"""


class Sign(NamedTuple):
    """What a file's name in a submission's directory tells.

    Attributes:
        element: Its index.
        restart: How many times Slurm had started it before.
        kind: "run", "on", "result" or "end".
        array: The array's id, for "on" and "end": it tells what sbatch may have kept to itself.
        node: For "on".
        code: The child's exit code, as the shell has it; for "end".
        why: What was signalled to the shell before: "TERM", "USR2", "TIME" (our own limit). Or why the
            child was killed: "OOM" for memory, "KILL" surely not for memory. Or "0".
    """

    element: int
    restart: int
    kind: str
    array: str = ""
    code: int = 0
    why: str = "0"
    node: str = ""


def parse_sign(name: str) -> Sign | None:
    """What a file's name tells, or None if it tells nothing."""
    number, restart, kind, array, rest, *_ = (*name.split(".", 4), "", "", "", "", "")
    try:
        if kind in {"run", "result"}:
            return Sign(int(number), int(restart), kind)
        if kind == "on":
            return Sign(int(number), int(restart), kind, array, node=rest)
        if kind == "end":
            code, _, why = rest.partition(".")
            return Sign(int(number), int(restart), kind, array, int(code), why)
    except ValueError:
        pass
    return None


def listing(directory: str) -> str:
    """The command that says the same of one submission, now."""
    return f"cd {shlex.quote(directory)} && echo [0-9]*"


def watcher(directory: str) -> str:
    """The command that says which names are in the submissions below `directory`.

    Each line is the name of a submission's directory and all names of interest in it; a directory
    is listed again only when it has changed. It wants a line on its stdin well within a minute.
    """
    return _WATCHER.format(directory=shlex.quote(directory))


# No process is started but the nap. It leaves when its stdin ends, or when nothing came on it for a
# minute: then whoever started it is gone, or can't say so.
_WATCHER = """\
LC_ALL=C
cd {directory} || exit 1
ht_dir=$PWD quiet=0 age=0
exec 3<&0
(while read -r line; do kill -s USR1 $$; done; kill -s TERM $$) <&3 >/dev/null 2>&1 & reader=$!
trap 'age=0' USR1
trap 'kill $reader; exit' TERM
while [ $age -lt 60000 ]; do
    changed=
    for sub in s[0-9]*; do
        cd "$ht_dir/$sub" 2>/dev/null || continue
        set -- [0-9]*
        cd "$ht_dir" || exit 1
        now=$*
        eval "before=\\$before_$sub"
        [ "$now" = "$before" ] && continue
        eval "before_$sub=\\$now"
        changed=1
        printf '%s %s\\n' "$sub" "$now"
    done
    if [ -n "$changed" ]; then quiet=0; else quiet=$((quiet + ms)); fi
    if [ $quiet -lt 30000 ]; then ms=100 nap=0.1; else ms=400 nap=0.4; fi
    age=$((age + ms))
    sleep $nap
done
kill $reader
"""


def submit_command(
    options: Sequence[str], *, directory: str, run: str, submission: str, n_elements: int
) -> str:
    """The command line of sbatch, which takes the script on its stdin.

    Args:
        options: Of the jobs.
        directory: Of the submission.
        run: The run's token, the name of its jobs.
        submission: The submission's token, the comment of its jobs.
        n_elements: How many.
    """
    ours = (
        "--parsable",
        f"--job-name={run}",
        f"--comment={submission}",
        f"--array=0-{n_elements - 1}",
        f"--chdir={directory}",
        f"--output={directory}/log.%a",
        "--open-mode=append",
    )
    return shlex.join(("sbatch", *ours, *options))


_PARSABLE = re.compile(r"^(\d+)(?:;[\w.-]+)?\s*$", re.MULTILINE)


def parse_submitted(stdout: str) -> str | None:
    """The job's id in what `sbatch --parsable` wrote, whatever banners and plugins write around it."""
    found = _PARSABLE.findall(stdout)
    return found[-1] if found else None


# Words of sbatch that time may mend: slurmctld is away, busy, or has enough of us for now.
_TRANSIENT = re.compile(
    r"timed out|unable to contact|connection refused|connection reset|communication|connect failure"
    r"|zero bytes|transport endpoint|temporar|try again|slurm_receive|slurm_send|backup controller"
    r"|error receiving|invalid protocol|munge|broken pipe|controller.*(busy|standby)",
    re.IGNORECASE,
)
_LIMIT = re.compile(
    r"submit limit|MaxSubmit|AssocMaxSubmit|QOSMaxSubmit|MaxJobCount|too many jobs|job count",
    re.IGNORECASE,
)
_DEFINITE = re.compile(
    r"invalid|unrecognized option|not available|violates|not permitted|denied|not a batch script"
    r"|specification|more processors|unsupported|must specify|too large|exceed|isn't|not found",
    re.IGNORECASE,
)


def refusal(words: str) -> str:
    """What is to be made of the words of an sbatch that failed.

    Returns:
        "limit": it holds as many jobs of ours as it will. "never": what was asked can't be had.
        "busy": time will mend it. "again": nobody knows.
    """
    if _LIMIT.search(words):
        return "limit"
    if _TRANSIENT.search(words):
        return "busy"
    return "never" if _DEFINITE.search(words) else "again"


def last_words(text: str) -> str:
    """What a command said, on one line, without the name of the command before each piece."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(line for line in lines[-5:] if line) or "it said nothing"


class Seen(NamedTuple):
    """What Slurm says of an element.

    Attributes:
        state: The state's long name, without its trimmings.
        submission: The submission's token.
        node: The node it is or was on, or "".
        reason: Why it is in this state, or "".
    """

    state: str
    submission: str
    node: str = ""
    reason: str = ""


def look_command(run: str) -> str:
    """The command that shows the state of all jobs of a run.

    A pending array is one line, so what it costs doesn't grow with the jobs. The reason comes last:
    it may hold anything.
    """
    # SLURM_BITSTR_LEN=0: or a long list of indices is cut.
    return (
        f"SLURM_BITSTR_LEN=0 squeue --noheader --states=all --name={run} --format='%i|%T|%k|%N|%r'"
    )


def parse_look(stdout: str) -> dict[tuple[str, int], Seen]:
    """The elements in the answer to `look_command`, by array id and index."""
    found: dict[tuple[str, int], Seen] = {}
    for line in stdout.splitlines():
        parts = line.strip().split("|", 4)
        if len(parts) == 5:
            ids, state, submission, node, reason = parts
            seen = Seen(clean_state(state), submission, node, "" if reason == "None" else reason)
            found.update(dict.fromkeys(parse_ids(ids), seen))
    return found


_IDS = re.compile(r"(?P<array>\d+)_(?:(?P<one>\d+)|\[(?P<many>[\d,:-]*)(?:%\d+)?\])\Z")


def parse_ids(text: str) -> list[tuple[str, int]]:
    """The elements that an id of Slurm's stands for: `12_3`, `12_[0-3,7,10-20:5%4]`."""
    match = _IDS.match(text)
    if match is None:
        return []
    if match["one"]:
        return [(match["array"], int(match["one"]))]
    return [
        (match["array"], i) for part in match["many"].split(",") if part for i in _indices(part)
    ]


def _indices(part: str) -> range:
    bounds, _, step = part.partition(":")
    first, _, last = bounds.partition("-")
    return range(int(first), int(last or first) + 1, int(step or 1))


def element_id(array: str, index: int) -> str:
    """An element's id, as squeue prints it."""
    return f"{array}_{index}"


def clean_state(state: str) -> str:
    """`CANCELLED by 0`, `COMPLETED+`, `cancelled` without the trimmings."""
    words = state.split()
    return words[0].rstrip("+").upper() if words else ""


ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL",
        "OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
    }
)  # fmt: skip
"""States that are an end. Any other, those of later versions included, isn't known to be one."""

WAITING = frozenset(
    {
        "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
        "CONFIGURING",
    }
)  # fmt: skip
"""States in which a job waits for its turn, or for another one."""


def account_command(arrays: Iterable[str], since: str) -> str:
    """The command that asks the accounting about arrays.

    Args:
        arrays: Their ids.
        since: A time before they were submitted, as Slurm writes it; its window starts at midnight otherwise.
    """
    fields = "JobID,JobName,State,ExitCode,NodeList,MaxRSS"
    ids = ",".join(arrays)
    return (
        f"sacct --noheader --parsable2 --array --starttime={since} --jobs={ids} --format={fields}"
    )


class Accounted(NamedTuple):
    """What the accounting knows of an element.

    Attributes:
        state: As in `Seen`.
        exit_code: Of the job.
        signal: That killed it, or 0.
        node: Where it ran, or "".
        max_rss: The most memory that a step of it held, in bytes; None if it wasn't looked at.
    """

    state: str
    exit_code: int
    signal: int
    node: str
    max_rss: int | None


def parse_accounts(stdout: str, run: str) -> dict[tuple[str, int], Accounted]:
    """The elements in the answer to `account_command` that belong to a run: ids are used again."""
    found: dict[tuple[str, int], Accounted] = {}
    for line in stdout.splitlines():
        parts = line.split("|")
        if len(parts) != 6:
            continue
        job, name, state, exit_code, node, rss = parts
        whole, _, step = job.partition(".")
        codes = exit_code.split(":")
        for element in parse_ids(whole):
            if not step and name == run:
                found[element] = Accounted(
                    clean_state(state), _number(codes[0]), _number(codes[-1]), node, None
                )
            elif step and element in found:
                known = found[element]
                most = max(known.max_rss or 0, parse_size(rss) or 0) or None
                # A step killed for memory knows it better than the job, which was only ended.
                oom = clean_state(state) == "OUT_OF_MEMORY"
                found[element] = known._replace(
                    max_rss=most, state="OUT_OF_MEMORY" if oom else known.state
                )
    return found


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int | None:
    """An amount of memory as Slurm writes it (`1234K`), in bytes."""
    match = re.match(r"([\d.]+)([KMGT]?)\Z", text.strip())
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def cancel_command(elements: Iterable[tuple[str, int]], whole: Iterable[str] = ()) -> str:
    """The one scancel that ends these elements, and these arrays as a whole."""
    arrays: dict[str, list[int]] = {}
    for array, index in elements:
        arrays.setdefault(array, []).append(index)
    ids = [*whole, *(f"{array}_[{format_indices(indices)}]" for array, indices in arrays.items())]
    return f"scancel {shlex.join(ids)}"


def format_indices(indices: Iterable[int]) -> str:
    """Indices as Slurm takes them: `0-3,7`."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class Site(NamedTuple):
    """What a cluster's configuration says that matters to us.

    Attributes:
        version: Slurm's.
        max_array: How many elements an array may have.
        message_timeout: Seconds that a message to slurmctld may take.
        kill_wait: Seconds between TERM and KILL.
        accounting: Whether there is any.
    """

    version: str = ""
    max_array: int = 1000
    message_timeout: float = 10.0
    kill_wait: float = 30.0
    accounting: bool = False


SITE_COMMAND = """\
command -v sbatch >/dev/null || echo 'there is no sbatch on PATH' >&2
scontrol show config"""

_HOPELESS = re.compile(
    r"no sbatch|not found|establish a configuration source|unable to process configuration|no such file",
    re.IGNORECASE,
)


def hopeless(stderr: str) -> str | None:
    """Why Slurm can't be used at all, in its words; None if it can, or if time may mend it."""
    return last_words(stderr) if _HOPELESS.search(stderr) else None


def parse_site(stdout: str) -> Site:
    """What `scontrol show config` says; what it doesn't is as Slurm has it by default."""
    pairs = (line.partition("=") for line in stdout.splitlines())
    config = {name.strip(): value.strip() for name, _, value in pairs}

    def number(name: str, default: float) -> float:
        match = re.match(r"\d+", config.get(name, ""))
        return float(match[0]) if match else default

    default = Site()
    return Site(
        version=config.get("SLURM_VERSION", ""),
        # The top index is one less than this, and the first is 0.
        max_array=int(number("MaxArraySize", default.max_array)),
        message_timeout=number("MessageTimeout", default.message_timeout),
        kill_wait=number("KillWait", default.kill_wait),
        accounting="slurmdbd" in config.get("AccountingStorageType", ""),
    )
