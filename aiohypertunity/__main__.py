"""`python -m aiohypertunity`: the command line, which has one command, `doctor`."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

import aiohypertunity

from ._model.slurm import Slurm

if TYPE_CHECKING:
    from collections.abc import Sequence


_OPTIONS: dict[str, dict[str, Any]] = {
    "--host": {"help": "where sbatch is, as for ssh; this machine if left out"},
    "--workdir": {"help": "a directory that the nodes see, too"},
    "--python": {"help": "what runs callables on the nodes"},
    "--setup": {"action": "append", "default": [], "help": "a shell line to run first"},
    "--option": {"action": "append", "default": [], "help": "an option of sbatch: name=value"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m aiohypertunity")
    parser.add_argument("--version", action="version", version=aiohypertunity.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say whether Slurm can be used from here")
    for option, how in _OPTIONS.items():
        doctor.add_argument(option, **how)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if words[0].partition("=")[0] in _OPTIONS:
        meant = shlex.join(word for word in words if word != "doctor")
        parser.error(f"the command comes first: did you mean: {parser.prog} doctor {meant}")
    given = parser.parse_args(words)
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
    from ._cli.doctor import main as examine

    return examine(slurm)


if __name__ == "__main__":
    sys.exit(main())
