"""How everything is measured: contenders in turns, each in a process of its own, medians, one table.

A *contender* is a generator function, sync or async: it sets up what it measures, warm, and then yields the
figures of one run after another. Each contender lives in its own process, where it waits while it's another's
turn: so they share nothing but the machine, and whatever else disturbs that disturbs all of them alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import operator
import os
import platform
import statistics
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)  # fmt: skip
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias, cast

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

N_TURNS = 5
"""Runs of each contender, whose median counts. The first one, which warms it up, isn't among them."""

N_WORKERS = 2
"""Worker processes of every contender."""

Figures: TypeAlias = "dict[str, float]"
Contender: TypeAlias = "Callable[[], Iterator[Figures] | AsyncIterator[Figures]]"

_PATIENCE = 120.0
_COMPARISONS = {"≥": operator.ge, "≤": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        figure: What was measured.
        ours: How we did.
        against: How the others did.
        ratio: Ours, divided by the best of the others; None if there is nothing to divide by.
        must_be: What it should be, in words.
        met: Whether it is; None if nothing is asked of it.
        runs: Every single measurement, by contender.
    """

    figure: str
    ours: str
    against: str
    ratio: float | None
    must_be: str
    met: bool | None
    runs: Mapping[str, Sequence[float]] = field(default_factory=dict)


Benchmark: TypeAlias = "Callable[[], list[Row]]"
BENCHMARKS: dict[str, Benchmark] = {}
"""All that can be measured, by name, in the order of the table."""


def benchmark(function: Benchmark) -> Benchmark:
    """Registers a function that measures something and returns its rows, under its own name."""
    BENCHMARKS[function.__name__] = function
    return function


# --- measuring ---------------------------------------------------------------------------------


class Runs:
    """What the contenders of one comparison did, turn by turn.

    Args:
        figures: Their figures, by name; ours first.
        missing: Why others gave none, by name.
    """

    def __init__(self, figures: dict[str, list[Figures]], missing: dict[str, str]) -> None:
        self.missing = missing
        self._figures = figures

    def against(self, *names: str) -> Runs:
        """Ours, and those of these others."""
        ours = next(iter(self._figures))
        figures = {n: runs for n, runs in self._figures.items() if n in (ours, *names)}
        return Runs(figures, {n: reason for n, reason in self.missing.items() if n in names})

    def of(self, key: str) -> dict[str, list[float]]:
        """Each measurement of one figure, by contender."""
        return {name: [run[key] for run in runs] for name, runs in self._figures.items()}

    def medians(self, key: str) -> dict[str, float]:
        """The median of one figure, by contender."""
        return {name: statistics.median(values) for name, values in self.of(key).items()}

    def row(
        self,
        figure: str,
        key: str,
        must: str,
        bound: float,
        *,
        unit: str = "",
        better: Callable[[Sequence[float]], float] = min,
        of_ratio: bool = True,
    ) -> Row:
        """A line of the table: our median of a figure against the others'.

        Args:
            figure: What was measured.
            key: Under which name.
            must: "≥", "≤" or "<".
            bound: What our share of the best of the others, or our own figure, is held against.
            unit: Of the figure.
            better: `min` where less is better, else `max`.
            of_ratio: Whether `bound` is one of the ratio.
        """
        ours, *others = self.medians(key).items()
        best = better([value for _, value in others]) if others else None
        ratio = ours[1] / best if best else None
        held = ratio if of_ratio else ours[1]
        against = [f"{name} {amount(value, unit)}" for name, value in others]
        against += [f"{name}: {reason}" for name, reason in self.missing.items()]
        return Row(
            figure=figure,
            ours=amount(ours[1], unit),
            against="; ".join(against) or "-",
            ratio=ratio,
            must_be=f"{must} {amount(bound, '' if of_ratio else unit)}{' of the best other' if of_ratio else ''}",
            met=None if held is None else bool(_COMPARISONS[must](held, bound)),
            runs=self.of(key),
        )


def in_turns(
    contenders: Mapping[str, Contender],
    *,
    n_turns: int = N_TURNS,
    warm_up: bool = True,
    fresh: bool = False,
) -> Runs:
    """Runs all contenders in turns: A B C A B C ...

    Args:
        contenders: Functions of a module, by name; ours first.
        n_turns: How often each has its turn.
        warm_up: Whether a run before the first one doesn't count.
        fresh: Whether each run needs a new process.
    """
    figures: dict[str, list[Figures]] = {name: [] for name in contenders}
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        seats: dict[str, _Seat] = {}
        for turn in range(n_turns + warm_up):
            for name, contender in contenders.items():
                if name in missing:
                    continue
                try:
                    if fresh:
                        with _Seat(contender) as seat:
                            run = seat.run()
                    else:
                        if name not in seats:
                            seats[name] = stack.enter_context(_Seat(contender))
                        run = seats[name].run()
                except ContenderError as error:
                    missing[name] = str(error)
                    continue
                if turn >= warm_up:
                    figures[name].append(run)
    ours = next(iter(contenders))
    if ours in missing:
        raise ContenderError(f"{ours}: {missing[ours]}")
    return Runs({name: runs for name, runs in figures.items() if name not in missing}, missing)


class ContenderError(Exception):
    """A contender could not be measured."""


class _Seat:
    """A contender in its own process."""

    def __init__(self, contender: Contender) -> None:
        # Spawned, so that no contender finds anything of another, or of us, in its memory.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(contender, theirs))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def run(self) -> Figures:
        """One run.

        Raises:
            ContenderError: It failed, or took too long.
        """
        try:
            self._pipe.send(True)
            if not self._pipe.poll(_PATIENCE):
                raise ContenderError(f"took longer than {_PATIENCE:g} s")
            answer: Figures | str = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ContenderError("its process died") from error
        if isinstance(answer, str):
            raise ContenderError(answer)
        return answer


def _play(contender: Contender, pipe: Connection) -> None:
    try:
        runs = contender()
        if isinstance(runs, AsyncIterator):
            asyncio.run(_play_async(runs, pipe))
        else:
            with contextlib.closing(cast("Generator[Figures, None, None]", runs)) as generator:
                while pipe.recv():
                    pipe.send(next(generator))
    except (EOFError, ConnectionError):
        pass  # nobody waits for it any more
    except ImportError as error:
        pipe.send(f"not installed ({error.name})")
    except Exception as error:
        pipe.send(f"failed ({type(error).__name__}: {error})")


async def _play_async(runs: AsyncIterator[Figures], pipe: Connection) -> None:
    # One task for all of it: anyio's pool of processes ends with the task that began it.
    async with contextlib.aclosing(cast("AsyncGenerator[Figures, None]", runs)) as generator:
        while pipe.recv():
            pipe.send(await anext(generator))


class Stopwatch:
    """Seconds spent in a `with`."""

    def __enter__(self) -> Self:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._since


# --- telling -----------------------------------------------------------------------------------


def amount(value: float, unit: str = "") -> str:
    """A number to three digits, and its unit."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".strip()


def table(rows: Sequence[Row]) -> str:
    """The rows, as a Markdown table."""
    lines = ["| figure | ours | against | ratio | must be | met? |", "|---|---|---|---|---|---|"]
    words = {True: "yes", False: "**no**", None: "-"}
    for row in rows:
        ratio = "-" if row.ratio is None else amount(row.ratio)
        cells = (row.figure, row.ours, row.against, ratio, row.must_be, words[row.met])
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """This machine, in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return (
        f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def write_json(path: str, rows: Sequence[Row], suites: Sequence[str]) -> None:
    """Write the rows with every single measurement, each with the name of its suite.

    The documentation's page on performance is made from such a file, `docs/figures.json`.
    """
    pairs = zip(suites, rows, strict=True)
    content = {
        "machine": f"{machine()}; {N_WORKERS} workers, medians of {N_TURNS} runs in turns",
        "rows": [{"suite": suite, **dataclasses.asdict(row)} for suite, row in pairs],
    }
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
