"""Reads what elements left that have ended, makes outcomes of it, and cleans up behind it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from ..._host.threads import in_thread
from ..._model.errors import TransportError
from ..._model.results import Outcome, Status
from ..._rules import messages
from ..._transports.protocol import LinkLost, Wanted
from ..._wire import spool
from ..._wire.payloads import described
from ..scripts import parse_result
from . import report, shell
from .cluster import BREATH
from .verdict import Fate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..._model.slurm import Slurm
    from ..calls import ScriptCall
    from .accounting import Accounting
    from .cluster import Cluster
    from .elements import Element, Submission
    from .rescue import Rescuer
    from .state import State
    from .watcher import Watcher

_TAIL = 65_536
"""Bytes of a log that are kept."""

_KEPT = {Status.FAILED, Status.CRASHED, Status.TIMED_OUT}
_TRIES = 5
_FIRST, _MOST = 8, 64
"""Elements that are read at once."""

_BYTES = 32 << 20
"""Bytes of results that are to be read at once."""

_GARBAGE = 256


class Reader:
    """Finishes elements whose fate is known.

    Args:
        slurm: What to keep.
        cluster: Where the spool is.
        state: Where the endings are.
        accounting: Knows more about failures.
        watcher: To be told of names that it hasn't seen.
        rescuer: Takes those that Slurm has lost.
    """

    def __init__(
        self,
        slurm: Slurm,
        cluster: Cluster,
        state: State,
        accounting: Accounting,
        watcher: Watcher,
        rescuer: Rescuer,
    ) -> None:
        self._slurm = slurm
        self._cluster = cluster
        self._state = state
        self._accounting = accounting
        self._watcher = watcher
        self._rescuer = rescuer
        self._n_at_once = _FIRST

    async def run(self) -> None:
        """Reads what has ended, for ever."""
        async with anyio.create_task_group() as self._lost:
            await self._read_forever()

    async def _read_forever(self) -> None:
        while True:
            await self._state.ended.wait()
            self._state.ended.clear()
            while self._state.endings:
                batch = self._state.endings[: self._n_at_once]
                del self._state.endings[: self._n_at_once]
                try:
                    await self._read(batch)
                except LinkLost:
                    self._state.endings[:0] = [pair for pair in batch if not pair[0].done]
                    await asyncio.sleep(BREATH)
                except TimeoutError:
                    self._state.endings += [pair for pair in batch if not pair[0].done]
                except messages.NotNow:  # this process has no file descriptor left
                    await asyncio.sleep(BREATH)
                    self._state.endings += [pair for pair in batch if not pair[0].done]
                except TransportError as error:
                    await asyncio.sleep(BREATH)
                    for element, fate in batch:
                        self._conclude_unread(element, fate, str(error))
                except Exception as error:  # a fault of ours
                    self._isolate(batch, error)
                await self.flush_garbage()

    async def _rescue(
        self,
        rescue: Callable[[Sequence[tuple[Element, Fate]]], Awaitable[None]],
        lost: Sequence[tuple[Element, Fate]],
    ) -> None:
        try:
            await rescue(lost)
        except Exception as error:  # a fault of ours is these elements' alone
            self._state.fault((element for element, _ in lost if not element.done), error)

    def _isolate(self, batch: Sequence[tuple[Element, Fate]], error: Exception) -> None:
        """Fail the element at which reading failed; of several, find it by reading them one by one."""
        left = [pair for pair in batch if not pair[0].done]
        if len(left) > 1:
            self._n_at_once = 1
            self._state.endings[:0] = left
        else:
            self._state.fault((element for element, _ in left), error)

    async def _read(self, batch: Sequence[tuple[Element, Fate]]) -> None:
        batch = await self._confirm([pair for pair in batch if not pair[0].done])
        lost = [pair for pair in batch if _is_lost(*pair)]
        if lost:
            started = [pair for pair in lost if pair[0].claims]
            others = [pair for pair in lost if pair not in started]
            self._lost.start_soon(self._rescue, self._rescuer.stop, started)
            self._lost.start_soon(self._rescue, self._rescuer.submit_again, others)
            batch = [pair for pair in batch if pair not in lost]
        if not batch:
            return
        failed = [e for e, fate in batch if fate not in {Fate.READ, Fate.CANCELLED}]
        if failed and self._accounting.answers():
            await self._accounting.ask(
                [e for e in failed if e.account is None or e.account.max_rss is None]
            )
        wanted = [files for element, fate in batch for files in _wanted(element, fate)]
        contents = await self._cluster.get(wanted)
        self._adapt(contents)
        rest = iter(contents)
        for element, fate in batch:
            log, end, result = next(rest), next(rest), next(rest)
            if isinstance(result, TransportError):
                self._conclude_unread(element, fate, str(result))
            else:
                await self._conclude(element, fate, _held(log), _held(end), result)

    def _adapt(self, contents: Sequence[bytes | TransportError | None]) -> None:
        """The more there is to a job, the fewer are read at once: memory is bounded."""
        n_bytes = 3 * sum(len(_held(content) or b"") for content in contents) / len(contents)
        self._n_at_once = max(1, min(_MOST, int(_BYTES / max(n_bytes, 1))))

    def _conclude_unread(self, element: Element, fate: Fate, why: str) -> None:
        """It's over, and what it left can't be read now: tries again, but not for ever."""
        if element.done:
            return
        element.bad_tries += 1
        if element.bad_tries < _TRIES:
            self._state.endings.append((element, fate))
            return
        ending = dataclasses.replace(element.ending(), lost=why)
        lost = Fate.LOST if fate is Fate.READ else fate
        self._finish(element, report.report(element.entry.job, lost, ending), ending)

    async def _confirm(self, batch: Sequence[tuple[Element, Fate]]) -> list[tuple[Element, Fate]]:
        """Looks into the spool once more for those whose shell has left no word: the watcher may be stuck."""
        silent = [e for e, fate in batch if fate is not Fate.READ and e.end is None]
        await self._watcher.list_now(silent)
        changed = {e for e in silent if e.result is not None or e.end is not None}
        for element in changed:
            element.reading = False
            self._state.suspect(element)
        return [(e, fate) for e, fate in batch if e not in changed]

    async def _conclude(
        self,
        element: Element,
        fate: Fate,
        log: bytes | None,
        end: bytes | None,
        result: bytes | None,
    ) -> None:
        ending = element.ending(log, end)
        if fate is not Fate.READ:
            if element.expired and fate is Fate.CANCELLED:
                outcome = report.waited_too_long(
                    element.entry.job,
                    element.reason or "",
                    element.slurm_id,
                    started=bool(element.claims),
                )
            else:
                outcome = report.report(element.entry.job, fate, ending)
        elif element.is_script:
            outcome = await in_thread(_script_outcome, element, result, ending)
        else:
            try:
                outcome = await self._callable_outcome(element, result, ending.log)
            except spool.BadFile as error:
                self._distrust(element, str(error))
                return
        self._finish(element, outcome, ending)

    def _finish(self, element: Element, outcome: Outcome, ending: report.Ending) -> None:
        if element.done:  # it was given up while it was read
            return
        outcome.slurm_id = element.slurm_id
        outcome.stdout = ending.log
        if outcome.started_at is None:
            outcome.started_at = element.started_at
        outcome.host = outcome.host or ending.node or None
        self._conclude_files(element, outcome)
        self._state.finish(element, outcome)

    async def _callable_outcome(self, element: Element, content: bytes | None, log: str) -> Outcome:
        if content is None:
            raise spool.BadFile("it is gone")
        reply = await in_thread(spool.parse_result, content)
        assert element.submission is not None
        files = []
        for name, size in reply.files:
            path = element.fetched.get(name) or await self._fetch(
                f"{element.submission.directory}/{name}"
            )
            if not os.path.exists(path) or os.path.getsize(path) != size:
                element.fetched.pop(name, None)
                raise spool.BadFile(f"its part {name} isn't whole")
            element.fetched[name] = path
            files.append(path)
        outcome = await in_thread(
            messages.from_reply, element.entry.job, reply.kind, reply.blob, files, log
        )
        facts = reply.facts
        outcome.host, outcome.pid = facts["host"], facts["pid"]
        outcome.started_at, outcome.finished_at = facts["started"], facts["finished"]
        outcome.max_rss = facts["max_rss"]
        outcome.exit_code = 0 if outcome.status is Status.SUCCEEDED else 1
        return outcome

    async def _fetch(self, path: str) -> str:
        try:
            return await self._cluster.fetch(path)
        except LinkLost:
            raise
        except TransportError as error:
            raise spool.BadFile(str(error)) from error

    def _distrust(self, element: Element, why: str) -> None:
        """Its result isn't whole: reads it again, and takes it for lost if that doesn't help."""
        element.reading = False
        element.bad_tries += 1
        if element.bad_tries >= _TRIES:
            element.bad_result, element.result = why, None
        self._state.suspect(element)

    def _conclude_files(self, element: Element, outcome: Outcome) -> None:
        submission = element.submission
        assert submission is not None
        if self._slurm.keep == "failed" and outcome.status in _KEPT:
            submission.kept = True
            outcome.log_path = Path(f"{submission.directory}/log.{element.index}")
        else:
            submission.garbage += _names_of(element)

    async def flush_garbage(self) -> None:
        """Removes what has been read: with its whole directory, where that is over."""
        commands = []
        over = []
        swept: list[tuple[Submission, int]] = []
        for submission in self._state.submissions.values():
            directory = shlex.quote(submission.directory)
            if submission.n_left == 0 and not submission.kept and not submission.fenced:
                commands.append(shell.remove_tree(submission.directory))
                over.append(submission)
            elif len(submission.garbage) >= _GARBAGE or (
                submission.n_left == 0 and submission.garbage
            ):
                commands.append(f"cd {directory} && rm -f {' '.join(submission.garbage)}")
                swept.append((submission, len(submission.garbage)))
        if commands:
            try:
                await self._cluster.shell("\n".join(commands))
            except (TransportError, TimeoutError):
                return  # done with the next, or in the end with the run's directory
        # Not before: whoever is cancelled here leaves it to the next.
        for submission in over:
            self._state.forget(submission)
        for submission, n_names in swept:
            del submission.garbage[:n_names]
        if all(s.n_left == 0 for s in self._state.submissions.values()):
            self._watcher.rest()


def _is_lost(element: Element, fate: Fate) -> bool:
    """Return True if it may run on, or can be submitted again, though Slurm has lost it."""
    if element.stopped:
        return False
    if fate is Fate.CANCELLED:
        # An scancel does not reach what slurmctld has forgotten.
        forgotten = element.submission is not None and element.submission.forgotten
        return forgotten and bool(element.claims) and element.end is None
    return fate in {Fate.FORGOTTEN, Fate.UNLAUNCHED} or (fate is Fate.NODE and bool(element.claims))


def _held(content: bytes | TransportError | None) -> bytes | None:
    return content if isinstance(content, bytes) else None


def _output_path(element: Element) -> str:
    """Where a script's last start was to leave its result."""
    assert element.submission is not None
    call: ScriptCall = element.entry.call
    restart = max(element.claims, default=0)
    return call.output or f"{element.submission.directory}/out.{element.index}.{restart}.pkl"


def _wanted(element: Element, fate: Fate) -> list[Wanted]:
    """The log, the shell's last word, and the result of an element: just three."""
    assert element.submission is not None
    directory = element.submission.directory
    log = Wanted(f"{directory}/log.{element.index}", last=_TAIL)
    end = Wanted("")
    if element.end is not None:
        sign = element.end
        end = Wanted(
            f"{directory}/{sign.element}.{sign.restart}.end.{sign.array}.{sign.code}.{sign.why}"
        )
    result = Wanted("")
    if fate is Fate.READ and element.is_script:
        result = Wanted(_output_path(element))
    elif fate is Fate.READ:
        result = Wanted(f"{directory}/{element.index}.{element.result}.result")
    return [log, end, result]


def _script_outcome(element: Element, content: bytes | None, ending: report.Ending) -> Outcome:
    """What a script that exited with code 0 left."""
    try:
        data = None if content is None else parse_result(content, _output_path(element))
    except BaseException as error:  # loading a pickle runs code of the user
        reason = f"{_output_path(element)} can't be read: {described(error)}"
        return report.report(element.entry.job, Fate.LOST, dataclasses.replace(ending, lost=reason))
    return Outcome(Status.SUCCEEDED, data, exit_code=0)


def _names_of(element: Element) -> list[str]:
    """What may be removed of an element: all but its claims, which keep a twin from running."""
    index = element.index
    keys = [f"{index}.{restart}" for restart in element.claims]
    own = [f"log.{index}", *(f"{key}.result" for key in keys), *(f"out.{key}.pkl" for key in keys)]
    return own + [f"buffer.{key}.*" for key in keys]
