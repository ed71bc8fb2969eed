"""RULES: Slurm's commands as text: their lines out, what they say in."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


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


# Before the general words on a policy Slurm may say which: that of a job's own size won't change.
_TOO_MUCH = re.compile(r"\b(?:QOS|Assoc)(?!\w*Submit)\w+")
_LIMIT = re.compile(
    r"submit limit|MaxSubmit|GrpSubmit|MaxJobCount|too many jobs|job count", re.IGNORECASE
)
# Words of sbatch that time may mend: slurmctld is away, busy, or has enough of us for now.
_TRANSIENT = re.compile(
    r"timed out|unable to contact|connection refused|connection reset|communication|connect failure"
    r"|zero bytes|zero length|transport endpoint|temporar|try again|slurm_receive|slurm_send"
    r"|backup controller|message (send|receive) failure|missing socket|entire message"
    r"|error receiving|invalid protocol|munge|broken pipe|controller.*(busy|standby)",
    re.IGNORECASE,
)
_DEFINITE = re.compile(
    # A credential is also refused while munged is restarted.
    r"(?<!credential )invalid(?! (authentication|job) credential)|unrecognized option"
    r"|requires an argument|ambiguous|not available|violates|not permitted|denied|specification"
    r"|(not|no partition) specified|not supported|unsupported|not a batch script|look like a batch"
    r"|script is empty|more (processors|tasks)|must specify|too (large|long)|exceed|breached|isn't"
    r"|not in this partition|not found|dependency|cli_filter|already completing",
    re.IGNORECASE,
)


def refusal(words: str) -> str:
    """What is to be made of the words of an sbatch that failed.

    Args:
        words: Its stderr. Where some lines have the command's name before them, they alone count.

    Returns:
        "limit": it holds as many jobs of ours as it will, perhaps. "never": what was asked can't be
        had. "busy": time will mend it. "again": nobody knows.
    """
    words = "\n".join(re.findall(r"^s(?:batch|cancel): .*", words, re.MULTILINE)) or words
    if _TOO_MUCH.search(words):
        return "never"
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
    # Not --array, which Slurm 22.05 doesn't know: elements that have started are listed one by one
    # without it, and a range of waiting ones is understood.
    return f"sacct --noheader --parsable2 --starttime={since} --jobs={ids} --format={fields}"


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


def cancel_command(
    run: str,
    elements: Iterable[tuple[str, int]],
    whole: Iterable[str] = (),
    options: Sequence[str] = (),
) -> str:
    """Return the command that ends elements and whole arrays of a run.

    A slurmctld that has lost its state gives ids out again. So only ids that Slurm lists under the
    run's name are cancelled. `scancel --name` would do that too, but sends a request for each
    running task where one for an array is enough (22.05: 8 for 8 tasks).

    Args:
        run: The run's token, the name of its jobs.
        elements: Array ids and indices.
        whole: Ids of arrays.
        options: More options of scancel.
    """
    arrays: dict[str, list[int]] = {}
    for array, index in elements:
        arrays.setdefault(array, []).append(index)
    ids = [*whole, *(f"{array}_[{format_indices(indices)}]" for array, indices in arrays.items())]
    listed = shlex.join(("squeue", "--noheader", "--states=all", f"--name={run}", "--format=%F"))
    return _CANCEL.format(listed=listed, ids=shlex.join(ids), options=shlex.join(options))


_CANCEL = """\
known=$({listed}) || exit 1
known=" $(echo $known) "
set --
for id in {ids}; do
    case $known in *" ${{id%%_*}} "*) set -- "$@" "$id" ;; esac
done
[ $# -eq 0 ] || scancel {options} "$@"
"""


def cancel_run_command(run: str) -> str:
    """Return the command that ends all jobs of a run, those whose ids are not known included."""
    return f"scancel --name={run}"


def format_indices(indices: Iterable[int]) -> str:
    """Indices as Slurm takes them: `0-3,7`."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class Controller(NamedTuple):
    """What one `scontrol show config` tells of slurmctld's memory.

    Attributes:
        boot: When it was started, in its own words; another value means another start.
        next_id: The id of the next job; 0 if unknown.
    """

    boot: str = ""
    next_id: int = 0

    def has_lost(self, array: str, boot: str) -> bool:
        """Return True if slurmctld must have forgotten an array.

        Ids only grow while slurmctld keeps its state. One that was given out and lies ahead was
        given out by a slurmctld whose state is lost.

        Args:
            array: The id that sbatch was given, before this was asked.
            boot: The start of slurmctld that was known before.
        """
        return self.boot != boot and 0 < self.next_id <= int(array)


CONTROLLER_COMMAND = "scontrol show config"


def parse_controller(stdout: str) -> Controller:
    """Return what the answer to `CONTROLLER_COMMAND` or `SITE_COMMAND` tells of slurmctld's memory."""
    pairs = (line.partition("=") for line in stdout.splitlines())
    config = {name.strip(): value.strip() for name, _, value in pairs}
    return Controller(config.get("BOOT_TIME", ""), _number(config.get("NEXT_JOB_ID", "")))


_LAUNCH_FAILED = re.compile(
    r"launch[ _]failed[ _]requeued[ _]held|JobHoldMaxRequeue", re.IGNORECASE
)
_HELD = re.compile(r"JobHeld(User|Admin)|job[ _]requeued[ _]in[ _]held[ _]state", re.IGNORECASE)


def launch_failed(seen: Seen) -> bool:
    """Return True if Slurm could not launch a job, and never tries again by itself."""
    return seen.state in WAITING and _LAUNCH_FAILED.fullmatch(seen.reason) is not None


def is_held(seen: Seen) -> bool:
    """Return True if somebody holds a job back until they release it."""
    return seen.state in WAITING and _HELD.fullmatch(seen.reason) is not None


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


# Between marks of ours: what a setup or a shell's own files write is none of our business.
_MARK = "aiohypertunity-site:"
SITE_COMMAND = f"""\
echo '{_MARK} begin'
command -v sbatch >/dev/null || echo '{_MARK} no sbatch'
ht_words= ht_code=0
if [ -n "${{SLURM_CONF-}}" ] && [ ! -r "$SLURM_CONF" ]; then
    # Slurm's own commands would wait a minute for it.
    echo "{_MARK} no $SLURM_CONF"
    ht_code=1
else
    {{ ht_words=$(scontrol show config 2>&1 >&3) || ht_code=$?; }} 3>&1
fi
echo '{_MARK} words'
echo "$ht_words"
echo "{_MARK} $ht_code"
(exit "$ht_code")"""

_NO_CONFIGURATION = re.compile(
    r"establish a configuration source|resolve_ctls_from_dns_srv|unable to process configuration"
    r"|s_p_parse_file",
    re.IGNORECASE,
)


def hopeless(stdout: str) -> str | None:
    """Why Slurm can't be used at all, by the answer to `SITE_COMMAND`; None if it can, or if time may mend it."""
    if f"{_MARK} no sbatch" in stdout:
        return "there is no sbatch on PATH: Slurm(setup=...) takes shell lines that put it there"
    if f"{_MARK} no " in stdout:
        path = stdout.partition(f"{_MARK} no ")[2].partition("\n")[0]
        return f"SLURM_CONF={path} can't be read"
    words = complaint(stdout)
    if _NO_CONFIGURATION.search(words):
        return (
            f"this machine has sbatch, but no slurm.conf: is it a login node? ({last_words(words)})"
        )
    if _config(stdout).get("MaxArraySize") == "0":
        return "it takes no job arrays (MaxArraySize is 0 in its slurm.conf), and all jobs are submitted as such"
    return None


def complaint(stdout: str) -> str:
    """What scontrol complained of in the answer to `SITE_COMMAND`; empty if it did its work."""
    words, _, code = stdout.partition(f"{_MARK} words\n")[2].partition(f"{_MARK} ")
    return "" if code.strip().startswith("0") else words.strip()


def _config(stdout: str) -> dict[str, str]:
    answer = stdout.partition(f"{_MARK} begin\n")[2].partition(f"{_MARK} words\n")[0]
    pairs = (line.partition("=") for line in answer.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_site(stdout: str) -> Site:
    """What the answer to `SITE_COMMAND` tells; what it doesn't is as Slurm has it by default."""
    config = _config(stdout)

    def number(name: str, default: float) -> float:
        match = re.match(r"\d+", config.get(name, ""))
        return float(match[0]) if match else default

    default = Site()
    return Site(
        version=config.get("SLURM_VERSION", ""),
        # The top index is one less than this, and the first is 0.
        max_array=max(int(number("MaxArraySize", default.max_array)), 1),
        message_timeout=number("MessageTimeout", default.message_timeout),
        kill_wait=number("KillWait", default.kill_wait),
        accounting="slurmdbd" in config.get("AccountingStorageType", ""),
    )
