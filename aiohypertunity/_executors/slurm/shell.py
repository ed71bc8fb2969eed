"""RULES: what shells run there: the batch script of an array, the watcher of the spool.

The batch script is plain POSIX shell, and every element of an array runs the same. It claims its
element, runs the job as a child, waits for it through signals, and leaves word of how it ended in the *name* of
a file, since a name can be left on a disk that is full:

    claim.5              element 5 belongs to the array whose id is in it; or to the driver, which has
                         fenced it off: made once for all restarts, and never removed
    5.0.run              element 5, restart 0, is claimed
    5.0.on.77.node7      it runs, as of array 77, on node7, or its shell was killed; took the claim's place
    5.0.result           what a callable returned or raised
    5.0.end.77.143.TERM  the child is gone: its exit code, and why as far as the shell knows; took the
                         place of the one before
    5.stop               nobody wants element 5 any more: whoever runs it ends it
    log.5  out.5.0.pkl  buffer.5.0.0     its output, what a script left, a large part of a result
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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
    head = _HEAD.format(shell=shell, directory=shlex.quote(directory), missed=MISSED)
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
    return "\n".join((*lines, f"ht_job() {{\nexec {_command(command, element.env)}\n}}\n"))


def _change_directory(path: str, *, needed: bool) -> str:
    if not needed:
        return f"cd {path} 2>/dev/null || :"
    sorry = f'echo "aiohypertunity: no directory "{path}" on ${{SLURMD_NODENAME:-this node}}" >&2'
    return f"cd {path} || {{ {sorry}; exit {NO_CWD}; }}"


def _command(command: Callable | Script, env: tuple[tuple[str, str], ...]) -> str:
    if isinstance(command, Callable):
        words = _with_env((*command.python, "-c", _BOOT, command.nodes_code), env)
        return f'{words} "$ht_dir" "$ht_index" "$ht_key" "$ht_mark"'
    words = f"$ht_setsid {_with_env(command.words, env)}"
    if command.output_words is None:
        return words
    return f'{words} {shlex.join(command.output_words)} "$ht_out"'


def _with_env(words: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> str:
    """A command with more environment, of whatever names: the shell's own variables aren't touched."""
    if not env:
        return shlex.join(words)
    # env takes for a variable what has a "=" in it.
    through = ("sh", "-c", 'exec "$0" "$@"') if "=" in words[0] else ()
    return shlex.join(("env", "--", *(f"{name}={value}" for name, value in env), *through, *words))


NODE_PACKAGE = "_aiohypertunity_node"
"""The name under which our code for the node is importable there, whatever else is installed."""

# Old Pythons must get as far as the message.
_BOOT = f"""\
import sys
if sys.version_info < (3, 10):
    sys.exit("aiohypertunity: Python 3.10 or later is needed on the nodes, and %s is %s"
             % (sys.executable, sys.version.split()[0]))
sys.path.insert(0, sys.argv[1])
from {NODE_PACKAGE} import node
del sys.path[0]
node.main(*sys.argv[2:])
"""

TABLE = "elements"
NO_DIRECTORY, CLAIM_FAILED, NO_CWD = 72, 73, 74

MISSED = 10
"""Seconds without an element's mark after which its directory is taken for removed."""

# No command is started in it that needn't be: a hundred elements start at once on a busy node.
_HEAD = """\
#!{shell}
ht_dir={directory}
ht_index=$SLURM_ARRAY_TASK_ID
ht_key=$ht_dir/$ht_index.${{SLURM_RESTART_COUNT:-0}}
ht_why=0 ht_child= ht_helpers= ht_timeout= ht_guard= ht_out= ht_begun= ht_setsid=

cd "$ht_dir" || exit 72
ht_unwritable() {{
    echo "aiohypertunity: can't write in $ht_dir on ${{SLURMD_NODENAME:-this node}}" >&2
    exit 73
}}
# Two names that can be made once. The first decides over all restarts which array has the element:
# a restart of the same array goes on with it, another array leaves.
ht_claim=claim.$ht_index ht_owner=
set -C
{{ {{ ht_owner=$SLURM_ARRAY_JOB_ID; echo "$ht_owner"; }} >"$ht_claim"; }} 2>/dev/null
if [ -z "$ht_owner" ]; then
    [ -e "$ht_claim" ] || ht_unwritable
    # Another one may have made it and not written it yet.
    for ht_nap in 0.2 1 3; do
        read -r ht_owner <"$ht_claim" && break
        sleep "$ht_nap"
    done
    [ "$ht_owner" = "$SLURM_ARRAY_JOB_ID" ] || exit 0
fi
# The second decides between two of the same restart, which a slurmctld starts that has lost its state.
if ! {{ true >"$ht_key.run"; }} 2>/dev/null; then
    [ -e "$ht_key.run" ] && exit 0
    ht_unwritable
fi
set +C
for ht_mark in "$ht_key".on.* "$ht_key".end.* "$ht_dir/$ht_index.stop"; do
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
    ht_end=$ht_key.end.$SLURM_ARRAY_JOB_ID.$1.$ht_why
    mv "$ht_mark" "$ht_end" || true >"$ht_end"
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
# Ends the job when this shell was killed, where Slurm doesn't, or when nobody wants it any more.
ht_guardian() {{
    trap 'kill "$ht_nap"; exit' TERM
    ht_missed=-1000000
    # A look at the mark costs no message while the node's memory of it is fresh. It's only missed
    # if it was there, and if the disk is.
    while kill -s 0 $$ && [ "$ht_missed" -lt {missed} ]; do
        if [ -e "$ht_mark" ]; then ht_missed=0
        elif [ -e "$ht_dir/$ht_index.stop" ]; then break
        elif [ -e "${{ht_dir%/*/*}}" ]; then ht_missed=$((ht_missed + 1)); fi
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
trap '[ -z "$ht_child" ] || kill -s USR2 "$ht_child"' USR2
trap 'ht_why=TIME' ALRM
cd || cd /
"""
_TAIL = """\
if [ "$ht_why" = TERM ] || [ -e "$ht_dir/$ht_index.stop" ]; then exit 143; fi
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
        why: What was signalled to the shell before: "TERM", "TIME" (our own limit). Or why the
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


def stop(directory: str, elements: Iterable[int]) -> str:
    """The command after which no start of these elements runs on, wherever it may be.

    Each that ran leaves an `end` within two seconds; across a network it may take a minute, for which
    nodes remember that a name was there. One that starts later leaves at once, and a node that is
    dead says nothing.
    """
    names = (f": >{index}.stop && rm -f {index}.*.on.*" for index in elements)
    return "\n".join((f"cd {shlex.quote(directory)} || exit 1", *names))


_DRIVER = "driver"


def fence(directory: str, elements: Iterable[int]) -> str:
    """Return the command that takes elements for the driver: no array can start them afterwards.

    It writes the indices that an array has taken before, one a line; those may run or have run. It
    may be run again.
    """
    indices = " ".join(map(str, elements))
    return _FENCE.format(directory=shlex.quote(directory), indices=indices, driver=_DRIVER)


_FENCE = """\
cd {directory} || exit 1
set -C
for index in {indices}; do
    {{ echo {driver} >claim.$index; }} 2>/dev/null
    owner=
    read -r owner <claim.$index
    [ "$owner" = {driver} ] || echo $index
done
:
"""


def remove_tree(path: str) -> str:
    """The command that removes a directory, into which a job that was ended may still write a last word."""
    # On NFS a file that is still open leaves a name behind: that goes with the run's directory.
    return f"for nap in 0.2 0.5 1 0; do rm -rf {shlex.quote(path)} 2>/dev/null && break; sleep $nap; done"


def watcher(directory: str) -> str:
    """The command that says which names are in the submissions below `directory`.

    Each line is the name of a submission's directory and all names of interest in it; a directory
    is listed again only when it has changed. It wants a line on its stdin well within a minute; one that
    isn't empty becomes the lease in `directory`.
    """
    return _WATCHER.format(directory=shlex.quote(directory))


# No process is started but the nap. It leaves when its stdin ends, or when nothing came on it for a
# minute: then whoever started it is gone, or can't say so.
_WATCHER = """\
LC_ALL=C
cd {directory} || exit 1
ht_dir=$PWD quiet=0 age=0
exec 3<&0
# Before the first line can come: it would kill this shell.
trap 'age=0' USR1
trap 'kill $reader; exit' TERM
(umask 077; while read -r line; do
    kill -s USR1 $$
    [ -z "$line" ] || {{ printf '%s\\n' "$line" >lease.new && mv lease.new lease; }}
done; kill -s TERM $$) <&3 >/dev/null 2>&1 & reader=$!
while [ $age -lt 60000 ]; do
    changed=
    for sub in s[0-9]*; do
        # The name is evaluated below.
        case ${{sub#s}} in *[!0-9]*) continue ;; esac
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
