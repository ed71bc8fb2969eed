"""The configuration of a Slurm cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .address import Address
from .sbatch_options import check_options


@dataclass(frozen=True)
class Slurm:
    """A Slurm cluster, and how to use it. Frozen, and checked when it's made.

    Args:
        host: Where `sbatch` is: `user@host:port` or an alias of `~/.ssh/config`; None for this machine.
        workdir: A directory for calls and results, which the nodes see under the same path;
            `~/.aiohypertunity` if None. Without a host it's made absolute. What is put there is
            removed again.
        python: What runs callables on the nodes, with cloudpickle: a program, or a list of it and its
            options; this very Python if None (`python3` across SSH).
        setup: Shell lines to run before `sbatch` and before each job: `module load ...`,
            `source venv/bin/activate`.
        options: Options of `sbatch` for all jobs, by their long names: `{"partition": "gpu"}`.
            A job's own go before them.
        max_in_flight: How many jobs may be with Slurm at a time, waiting ones included; None for all
            that Slurm takes.
        keep: `"failed"` keeps the log and the files of jobs that failed, None those of none.
        connect: Options of asyncssh's `connect`. And `prompt`: a function, sync or async, that answers
            when the host asks for a password or a code, such as `getpass.getpass`.
        give_up_after: Seconds of a broken link after which jobs fail with `TransportError`; None
            to wait for as long as it takes.
        files: Files that scripts need beside them, to be copied across SSH.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has an impossible value.
    """

    host: str | None = None
    workdir: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    python: str | Sequence[str] | None = field(default=None, kw_only=True)
    setup: Sequence[str] = field(default=(), kw_only=True)
    options: Mapping[str, Any] | None = field(default=None, kw_only=True)
    max_in_flight: int | None = field(default=None, kw_only=True)
    keep: Literal["failed"] | None = field(default=None, kw_only=True)
    # Not in the repr: it may hold a password.
    connect: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)
    give_up_after: float | None = field(default=None, kw_only=True)
    files: Sequence[str | os.PathLike[str]] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        _check_text("host", self.host)
        if self.host is not None:
            Address.parse(self.host)
        if self.connect is not None and "options" in self.connect:
            raise ValueError("connect['options'] can't be set: give the options themselves")
        if self.connect is not None and self.connect.get("known_hosts", ()) is None:
            raise ValueError("connect: known_hosts=None would trust any host: name a file of keys")
        if self.connect is not None and self.host is None:
            raise ValueError("connect is for a host: Slurm('user@host', connect=...)")
        if self.files and self.host is None:
            raise ValueError("files are copied across SSH; without a host they are where they are")
        _check_path("workdir", self.workdir)
        if self.host is None:
            path = os.path.expanduser(self.workdir or "~/.aiohypertunity")
            _check_path("workdir", os.path.abspath(path))
            if self.workdir is not None:
                object.__setattr__(self, "workdir", os.path.abspath(path))
        _check_words("python", self.python)
        _check_lines("setup", self.setup)
        check_options({} if self.options is None else self.options, "options")
        _check_count("max_in_flight", self.max_in_flight)
        if self.keep not in {None, "failed"}:
            raise ValueError(f"keep={self.keep!r}: must be 'failed' or None")
        _check_seconds("give_up_after", self.give_up_after)


def _check_text(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: must be a string or None")
    if value == "":
        raise ValueError(f"{name}='': is empty")


def _check_path(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={value!r}: must be a path or None")
    if value is not None and "\n" in str(value):
        raise ValueError(f"{name}={value!r}: must be one line")
    # Slurm puts numbers for a "%" in the path of a job's output; a "\\" stops it from doing so at all.
    if value is not None and ("%" in str(value) or "\\" in str(value)):
        raise ValueError(
            f"{name}={value!r}: sbatch can't write its logs below a path with a '%' or a '\\'"
        )


def _check_words(name: str, value: object) -> None:
    words = (value,) if isinstance(value, str) or value is None else value
    if not isinstance(words, Sequence) or not all(isinstance(w, str | None) for w in words):
        raise TypeError(f"{name}={value!r}: must be a program, or a list of it and its options")
    if not words or "" in words:
        raise ValueError(f"{name}={value!r}: names no program")


def _check_lines(name: str, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}={value!r}: must be a list of shell lines")
    for line in value:
        if not isinstance(line, str):
            raise TypeError(f"{name} has {line!r}: lines are strings")


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if type(value) is not int:
        raise TypeError(f"{name}={value!r}: must be a whole number or None")
    if value < 1:
        raise ValueError(f"{name}={value!r}: must be 1 or more")


def _check_seconds(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: must be a number of seconds or None")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name}={value!r}: must be more than 0 seconds")
