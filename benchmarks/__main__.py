"""`python -m benchmarks [NAME ...] [--json FILE]`: measures everything, or what is named."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import sys

from benchmarks._harness import (
    BENCHMARKS,
    N_TURNS,
    N_WORKERS,
    ContenderError,
    Row,
    machine,
    table,
    write_json,
)  # fmt: skip

_LOCAL = ("callables", "searches", "load", "holds", "programs")


def main() -> None:
    """Measures, and prints one table."""
    for name in _LOCAL:
        importlib.import_module(f"benchmarks.{name}")
    if importlib.util.find_spec("benchmarks.slurm") and shutil.which("sbatch"):
        importlib.import_module("benchmarks.slurm")
        importlib.import_module("benchmarks.ssh")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"out of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there, too")
    given = parser.parse_args()
    for name in given.names:
        if name not in BENCHMARKS:
            parser.error(f"there is no {name!r}, only {', '.join(BENCHMARKS)}")
    rows: list[Row] = []
    suites: list[str] = []
    for name in given.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows += BENCHMARKS[name]()
        except ContenderError as error:  # the rest is still worth knowing
            rows.append(
                Row(figure=name, ours=str(error), against="-", ratio=None, must_be="-", met=False)
            )
        suite = BENCHMARKS[name].__module__.rpartition(".")[2]
        suites += [suite] * (len(rows) - len(suites))
    print(f"{machine()}; {N_WORKERS} workers, medians of {N_TURNS} runs in turns\n")
    print(table(rows))
    if given.json:
        write_json(given.json, rows, suites)


if __name__ == "__main__":
    main()
