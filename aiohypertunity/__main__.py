"""`python -m aiohypertunity`: the command line, which has one command, `doctor`."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from ._slurm import Slurm

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m aiohypertunity")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say whether Slurm can be used from here")
    doctor.add_argument("--host", help="where sbatch is, as for ssh; this machine if left out")
    doctor.add_argument("--workdir", help="a directory that the nodes see, too")
    doctor.add_argument("--python", help="what runs callables on the nodes")
    doctor.add_argument("--setup", action="append", default=[], help="a shell line to run first")
    doctor.add_argument(
        "--option", action="append", default=[], help="an option of sbatch: name=value"
    )
    given = parser.parse_args(argv)
    options = dict(option.partition("=")[::2] for option in given.option)
    try:
        slurm = Slurm(
            given.host,
            workdir=given.workdir,
            python=shlex.split(given.python) if given.python else None,
            setup=given.setup,
            options={name: value or True for name, value in options.items()},
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    from ._doctor import main as examine

    return examine(slurm)


if __name__ == "__main__":
    sys.exit(main())
