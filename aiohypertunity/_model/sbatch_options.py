"""RULES: options of sbatch: what users may ask for, and as what Slurm gets it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

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

_REQUEUE = ("requeue", "no-requeue")

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
        # As getopt_long(3) does; no option of sbatch has a name that one of these begins with.
        for full in (*RESERVED, *_REQUEUE):
            if full != long and full.startswith(long):
                raise ValueError(f"{what}[{name!r}]: sbatch would take it for {full!r}")
        if value is not None and not isinstance(value, str | int | float | os.PathLike):
            raise TypeError(
                f"{what}[{name!r}]={value!r}: must be a string, a number, True, or None"
            )
        if "\n" in str(value) or "\0" in str(value):
            raise ValueError(f"{what}[{name!r}]={value!r}: must be one line")
        if long in _REQUEUE and value is not None and not isinstance(value, bool):
            raise TypeError(f"{what}[{name!r}]={value!r}: must be True, False, or None")
    _said_requeue(options, what)


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
    # Slurm's own default is a site's: never leave it open.
    said = (_said_requeue(level) for level in (for_job, for_all))
    requeue = next((answer for answer in said if answer is not None), True)
    options.update({"requeue": requeue, "no-requeue": not requeue})
    options["kill-on-invalid-dep"] = "yes"
    return tuple(_option(name, value) for name, value in sorted(options.items()) if is_on(value))


def _said_requeue(options: Mapping[str, Any], what: str = "options") -> bool | None:
    """Whether a job is to be requeued, as far as these options say it."""
    named = {option_name(name): value for name, value in options.items()}
    if not any(name in named for name in _REQUEUE):
        return None
    yes, no = (named.get(name) for name in _REQUEUE)
    if yes is not None and yes is no:
        raise ValueError(f"{what}: requeue and no-requeue are both {yes}")
    return no is not True if yes is None else bool(yes)


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
