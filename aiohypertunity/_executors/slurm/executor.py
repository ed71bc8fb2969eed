"""Runs entries as Slurm jobs: the one place where Slurm is met.

Jobs wait in a queue of ours until those that came at about the same time can go as one array. From
then on each is an `Element`, which gathers evidence: names that its batch shell leaves in the spool, what
squeue says, what the accounting says. The rules in `verdict` say what it means.

Six parts, each one loop on the event loop's thread, share that state. A seventh ends what other drivers left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import traceback
import warnings
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio

from ..._model.errors import HypertunityError, SubmitError, TransportError
from ..._transports.protocol import LinkLost
from . import report, shell, text
from .accounting import Accounting
from .arbiter import Arbiter
from .canceller import Canceller
from .cluster import PATIENCE, Cluster
from .elements import Element
from .looker import Looker
from .packing import Packer
from .reader import Reader
from .rescue import Rescuer
from .state import State
from .submitter import Submitter
from .sweeper import Sweeper
from .watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..._model.events import Event
    from ..._model.slurm import Slurm
    from ..._rules.ledger import Entry, Owner

E = TypeVar("E", bound=Exception)

_LINK_WITHIN = 3.0
"""Seconds for which leaving tries a link that fails."""

_CONTACT_WITHIN, _CONTACT_PAUSE = 30.0, 1.0
"""Seconds for which a Slurm that does not answer is waited for in the end; and between tries."""

_LOG = logging.getLogger("aiohypertunity.slurm")


class _Part(Protocol):
    async def run(self) -> None: ...


class SlurmExecutor:
    """Runs entries as Slurm jobs.

    Args:
        slurm: The cluster, and how to use it.
        owner: To whom to report.
        emit: Takes events of the link.
        directory: Of the run on this machine.
    """

    def __init__(
        self, slurm: Slurm, owner: Owner, *, emit: Callable[[Event], None], directory: str
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._cluster = cluster = Cluster(slurm, emit, self._fail_all, self._say, directory)
        self._state = state = State(cluster, owner, emit)
        self._packer = Packer(slurm, cluster)
        self._submitter = Submitter(slurm, cluster, state, self._packer)
        self._canceller = Canceller(cluster, state)
        accounting = Accounting(cluster)
        self._arbiter = Arbiter(cluster, state, accounting)
        watcher = Watcher(cluster, state)
        rescuer = Rescuer(cluster, state, watcher, self._arbiter)
        self._reader = Reader(slurm, cluster, state, accounting, watcher, rescuer)
        self._parts = (
            self._submitter,
            watcher,
            Looker(cluster, state, accounting, self._arbiter),
            self._arbiter,
            self._canceller,
            self._reader,
            Sweeper(cluster),
        )
        self._main: asyncio.Task[None] | None = None

    def start(self, entry: Entry) -> None:
        """Queues it, to be submitted with those that come at about the same time."""
        element = Element(entry, self._submitter.group_of(entry.job), self._cluster.now())
        entry.place = element
        try:
            element.pinned = self._packer.pin(entry.job)
        except OSError as error:
            words = f"can't read {error.filename}: {error.strerror}"
            self._loop.call_soon(self._state.finish, element, report.refused(TransportError(words)))
            return
        self._state.queue.add(element)
        self._state.queued.set()
        self._arbiter.limit_turn(element)
        if self._main is None or self._main.done():
            self._main = self._loop.create_task(self._live())

    def stop(self, entry: Entry) -> None:
        """Cancels it, at once or as soon as its id is known."""
        element: Element | None = entry.place
        if element is None or element.done or element.stopping:
            return
        element.stopping = True
        self._canceller.let_go_in_time(element)
        if element in self._state.queue:
            self._state.queue.remove(element)
            self._loop.call_soon(self._state.finish_unstarted, element)
        else:
            self._state.cancel(element)

    def check_stop(self, entry: Entry) -> None:
        """Any can be stopped."""

    def leave(self) -> None:
        """All is to end; a link that is down isn't waited for any longer than for an answer."""
        self._canceller.is_leaving = True

    async def aclose(self) -> None:
        """Removes the spool and lets go of the link."""
        if self._main is not None:
            self._main.cancel()
            await asyncio.wait([self._main])
        cancelled = False
        with anyio.CancelScope(shield=True):
            cancelled = await self._cancel_run()
            with (
                anyio.move_on_after(PATIENCE),
                contextlib.suppress(HypertunityError, TimeoutError),
            ):
                if self._main is not None:
                    await self._clean_up()
            await self._cluster.aclose()
        if not cancelled:
            where = f" on {self._cluster.host}" if self._cluster.host else ""
            warnings.warn(
                f"Slurm{where} did not answer when this scheduler ended, and may have jobs of it that "
                f"run or wait: cancel them by `{text.cancel_run_command(self._cluster.run)}`",
                ResourceWarning,
                stacklevel=2,
            )

    async def _cancel_run(self) -> bool:
        """Cancel whatever Slurm may have of this run; return False if it cannot be told to in time.

        Also when all have ended: a slurmctld that was down meanwhile comes back with an older state,
        and queues jobs again of which nobody knows any more.
        """
        if not self._submitter.has_submitted:
            return True
        # A link that is down is not waited for; one that dropped a channel is tried again.
        until = self._loop.time() + _LINK_WITHIN
        with anyio.move_on_after(_CONTACT_WITHIN):
            while True:
                try:
                    if await self._cluster.cancel_run():
                        return True
                except LinkLost:
                    if self._loop.time() > until:
                        return False
                await asyncio.sleep(_CONTACT_PAUSE)
        return False

    async def _clean_up(self) -> None:
        directory = self._cluster.directory
        if not directory:
            # It may have been cancelled in the middle of being made.
            workdir = self._cluster.workdir()
            await self._cluster.shell(
                f"cd {workdir} 2>/dev/null && rm -rf {self._cluster.run} || :"
            )
            return
        for submission in self._state.submissions.values():
            submission.fenced = False
        if any(submission.kept for submission in self._state.submissions.values()):
            await self._reader.flush_garbage()
            # Without a lease, what is kept is nobody's to sweep.
            own = shlex.quote(directory)
            await self._cluster.shell(f"rm -rf {own}/node {own}/lease")
        else:
            await self._cluster.shell(shell.remove_tree(directory))

    async def _live(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                for part in self._parts:
                    group.start_soon(self._run, part)
        except* TransportError as errors:
            # The host doesn't let us in any more, say. The next job may try it again.
            self._fail_all(_first(errors))
        except* Exception as errors:
            # A fault of ours must not leave anybody waiting.
            _LOG.exception("the Slurm executor has failed")
            for element in self._state.unfinished:
                self._state.let_go(element, report.fault(element.entry.job, _first(errors)))
            self._state.queue.clear()

    async def _run(self, part: _Part) -> None:
        """Run a part, and again after a fault that concerns no job; not after the same one twice.

        What it works on is in the state, so nothing is lost with the loop that failed.
        """
        known: set[tuple[str, int]] = set()
        while True:
            try:
                await part.run()
            except* (SubmitError, TransportError):
                raise
            except* Exception as errors:
                place = _place(_first(errors))
                if place in known:
                    raise
                known.add(place)
                _LOG.exception("a part of the Slurm executor has failed, and begins anew")
                self._state.wake()
            else:
                return  # the sweeper has swept

    def _fail_all(self, error: TransportError) -> None:
        for element in self._state.unfinished:
            self._state.let_go(element, report.refused(error))
        self._state.queue.clear()

    def _say(self, why: str | None) -> None:
        """Those that wait, wait for the link."""
        waiting = [e for e in self._state.unfinished if not e.claims]
        self._state.say_pending(waiting, why)


def _place(error: Exception) -> tuple[str, int]:
    """Return the file and line in which an exception was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename, last.lineno or 0


def _first(errors: ExceptionGroup[E]) -> E:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
