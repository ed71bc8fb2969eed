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
from typing import TYPE_CHECKING, TypeVar

import anyio

from .._errors import HypertunityError, TransportError
from . import report, shell
from .accounting import Accounting
from .arbiter import Arbiter
from .canceller import Canceller
from .cluster import PATIENCE, Cluster
from .elements import Element
from .lease import Sweeper
from .looker import Looker
from .packing import Packer
from .reader import Reader
from .state import State
from .submitter import Submitter
from .watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._events import Event
    from .._ledger import Entry, Owner
    from . import Slurm

E = TypeVar("E", bound=Exception)

_LOG = logging.getLogger("aiohypertunity.slurm")


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
        self._state = state = State(cluster, owner)
        self._packer = Packer(slurm, cluster)
        self._submitter = Submitter(slurm, cluster, state, self._packer)
        self._canceller = Canceller(cluster, state)
        accounting = Accounting(cluster)
        self._arbiter = Arbiter(cluster, state, accounting)
        watcher = Watcher(cluster, state)
        self._reader = Reader(slurm, cluster, state, accounting, watcher)
        self._parts = (
            self._submitter,
            watcher,
            Looker(cluster, state, accounting),
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
        limit: float | None = getattr(entry.job, "queue_timeout", None)
        if limit is not None:
            self._arbiter.limit_turn(element, limit)
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
        with anyio.CancelScope(shield=True):
            with (
                anyio.move_on_after(PATIENCE),
                contextlib.suppress(HypertunityError, TimeoutError),
            ):
                if self._main is not None:
                    await self._clean_up()
            await self._cluster.aclose()

    async def _clean_up(self) -> None:
        directory = self._cluster.directory
        if not directory:
            # It may have been cancelled in the middle of being made.
            workdir = self._cluster.workdir()
            await self._cluster.shell(
                f"cd {workdir} 2>/dev/null && rm -rf {self._cluster.run} || :"
            )
            return
        if self._state.has_strays:
            with contextlib.suppress(TimeoutError, TransportError):
                await self._cluster.cancel_run()
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
                    group.start_soon(part.run)
        except* TransportError as errors:
            # The host doesn't let us in any more, say. The next job may try it again.
            self._fail_all(_first(errors))
        except* Exception as errors:
            # A fault of ours must not leave anybody waiting.
            _LOG.exception("the Slurm executor has failed")
            self._fail_all(TransportError(f"the Slurm executor has failed: {_first(errors)!r}"))

    def _fail_all(self, error: TransportError) -> None:
        for element in self._state.unfinished:
            self._state.let_go(element, report.refused(error))
        self._state.queue.clear()

    def _say(self, why: str | None) -> None:
        """Those that wait, wait for the link."""
        waiting = [e for e in self._state.unfinished if not e.claims]
        self._state.say_pending(waiting, why)


def _first(errors: ExceptionGroup[E]) -> E:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
