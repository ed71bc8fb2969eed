"""Submits: what came at about the same time as one array, and that exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
from typing import TYPE_CHECKING, Any

import anyio

from ..._model.errors import SubmitError, TransportError
from ..._model.jobs import ScriptRef
from ..._model.sbatch_options import sbatch_options
from ..._transports.protocol import LinkLost
from . import report, shell, text
from .elements import Submission

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..._model.jobs import SlurmJob
    from ..._model.slurm import Slurm
    from .cluster import Cluster
    from .elements import Element
    from .packing import Packer
    from .state import State

_LOG = logging.getLogger("aiohypertunity.slurm")

_SETTLE = 0.02
"""Jobs that are dispatched within so many seconds go together."""

_SETTLE_AT_MOST = 0.5
"""But a stream of them that doesn't end is cut."""

_AT_MOST = 1000
"""Elements of an array, and so files of one kind in a directory."""

_TRIES = 5
_LONGEST_PAUSE = 30.0
"""Seconds between two tries, at most."""

_SLOW = 1.0
"""Seconds after which sbatch is worth a word."""

_LIMITED_FOR = 300.0
"""Seconds after which it's tried again whether Slurm takes more jobs than it did."""


class Submitter:
    """Turns the queue into arrays.

    Args:
        slurm: How to use the cluster.
        cluster: The cluster.
        state: Where the queue is.
        packer: Puts the files there.
    """

    def __init__(self, slurm: Slurm, cluster: Cluster, state: State, packer: Packer) -> None:
        self._slurm = slurm
        self._cluster = cluster
        self._state = state
        self._packer = packer
        self._loop = asyncio.get_running_loop()
        self._plain_options = sbatch_options(slurm.options or {}, {}, {})
        self._limit = slurm.max_in_flight
        self._longest_array: int | None = None
        self._n_submissions = 0

    @property
    def has_submitted(self) -> bool:
        """True if Slurm may have been given a job."""
        return self._n_submissions > 0

    async def run(self) -> None:
        """Submits what is queued, for ever."""
        async with anyio.create_task_group() as self._retries:
            while True:
                await self._state.queued.wait()
                self._state.queued.clear()
                await self._settle()
                try:
                    await self._cluster.prepare()
                except (SubmitError, TransportError) as error:
                    # The disk, or the shell; the link's own trouble is waited out.
                    self._refuse([*self._state.queue], error)
                    self._state.queue.clear()
                while group := self._next_group():
                    await self._submit(group)

    async def _settle(self) -> None:
        latest = self._loop.time() + _SETTLE_AT_MOST
        n_queued = -1
        while n_queued != len(self._state.queue) and self._loop.time() < latest:
            n_queued = len(self._state.queue)
            await asyncio.sleep(_SETTLE)

    def _next_group(self) -> list[Element]:
        """Those next in the queue that can be one array, as far as there is room for them."""
        waiting = len(self._state.queue)
        room = waiting
        if self._limit is not None:
            room = self._limit - self._state.n_in_flight
            # In chunks: one for one would be a submission for each job that ends.
            if room < min(waiting, max(1, self._limit // 4)):
                return []
        if not waiting or room <= 0:
            return []
        longest = self._longest_array or self._cluster.site.max_array
        return self._state.queue.take(min(room, _AT_MOST, longest))

    def group_of(self, job: SlurmJob[Any] | Any) -> tuple[bool, tuple[str, ...]]:
        """What jobs of one array have in common: whether they are scripts, and their options."""
        meta = job.meta or {}
        asked = meta.get("options", {}), meta.get("resources", {})
        options = self._plain_options
        if any(asked):
            options = sbatch_options(self._slurm.options or {}, *asked)
        return isinstance(job.target, ScriptRef), options

    async def _submit(self, group: list[Element]) -> None:
        try:
            await self._put_and_try(group)
        except (SubmitError, TransportError):
            raise
        except Exception as error:  # a fault of ours is this array's alone
            self._state.fault(group, error)

    async def _put_and_try(self, group: list[Element]) -> None:
        self._n_submissions += 1
        submission = Submission(
            self._n_submissions, self._cluster.run, self._cluster.directory, group
        )
        submission.boot = self._cluster.controller.boot
        self._state.submissions[submission.name] = submission
        try:
            await self._packer.put(submission)
        except (SubmitError, TransportError) as error:
            self._refuse(group, error)
            # What is there of it may be what fills the disk.
            with contextlib.suppress(TransportError, TimeoutError):
                await self._cluster.shell(shell.remove_tree(submission.directory))
            return
        # From here on it is watched: a job may run before sbatch has said that there is one.
        self._state.active.set()
        await self._try(submission, 1)

    async def _try(self, submission: Submission, n_tries: int) -> None:
        """Submits, exactly once; what comes of it, is reported.

        Whatever sbatch says when it doesn't give an id, the jobs may be queued: so they are looked
        for by their token before anything is submitted again.
        """
        while True:
            slow = self._loop.call_later(
                _SLOW, self._say, submission, "sbatch has not answered yet"
            )
            array, words, refusal = await self._sbatch(submission)
            slow.cancel()
            if array is None:
                self._say(submission, words)
                array = await self._look_up(submission, wait=refusal in {"busy", "again"})
            if array is not None:
                self._state.submitted(submission, array)
            if submission.array is not None:
                return
            over = refusal == "never" or (n_tries >= _TRIES and self._is_hopeless(refusal))
            if over:
                self._refuse(submission.elements, SubmitError(f"sbatch refused it: {words}"))
                return
            if all(e.stopping or e.done for e in submission.elements):
                self._abandon(submission)
                return
            _LOG.warning("sbatch failed and will be tried again: %s", words)
            if refusal == "limit" and self._make_smaller(submission):
                return
            pause = min(2.0**n_tries, _LONGEST_PAUSE)
            n_tries += 1
            if refusal != "busy":  # then the next need not wait for this one
                self._retries.start_soon(self._try_later, submission, n_tries, pause)
                return
            await asyncio.sleep(pause)

    def _say(self, submission: Submission, why: str) -> None:
        self._state.say_pending([e for e in submission.elements if not e.done], why)

    async def _try_later(self, submission: Submission, n_tries: int, pause: float) -> None:
        await asyncio.sleep(pause)
        try:
            await self._try(submission, n_tries)
        except (SubmitError, TransportError):
            raise
        except Exception as error:  # a fault of ours is this array's alone
            self._state.fault(submission.elements, error)

    def _is_hopeless(self, refusal: str) -> bool:
        """Whether it's no use to wait. Slurm says that it has enough of our jobs also of a job that can never be."""
        return refusal == "again" or (refusal == "limit" and self._state.n_in_flight == 1)

    async def _sbatch(self, submission: Submission) -> tuple[str | None, str, str]:
        """The array's id if sbatch gave one; else its words, and what is to be made of them."""
        command = text.submit_command(
            submission.elements[0].group[1],
            directory=submission.directory,
            run=self._cluster.run,
            submission=submission.token,
            n_elements=len(submission.elements),
        )
        # From a file: a link that is cut in the middle of it would submit half a script.
        command += f" <{shlex.quote(f'{submission.directory}/script')}"
        self._cluster.budget.spend(1, self._cluster.now())
        patience = 2 * self._cluster.site.message_timeout + 5
        try:
            done = await self._cluster.command(command, timeout=patience)
        except TimeoutError:
            return None, f"sbatch gave no answer within {patience:g} s", "busy"
        except LinkLost as error:
            return None, str(error), "busy"
        words = text.last_words(done.stderr or done.stdout)
        if done.exit_status == 0:
            return text.parse_submitted(done.stdout), words, "again"
        return None, words, text.refusal(done.stderr or done.stdout)

    async def _look_up(self, submission: Submission, *, wait: bool) -> str | None:
        """The id of an array that may have been queued; it may take a message's time to appear."""
        for pause in (0.0, self._cluster.site.message_timeout) if wait else (0.0,):
            await asyncio.sleep(pause)
            found = None
            while found is None:
                if submission.array is not None:  # its jobs have spoken in the spool
                    return None
                found = await self._cluster.look()
                if found is None:
                    await asyncio.sleep(1)
            for (array, _), seen in found.items():
                if seen.submission == submission.token:
                    return array
        return None

    def _make_smaller(self, submission: Submission) -> bool:
        """Slurm holds as many of our jobs as it will: finds out how many, and puts these back.

        Halves the arrays until one fits; when not even a single job does, what is there is the limit.
        """
        others = self._state.n_in_flight - submission.n_left
        if len(submission.elements) > 1:
            self._longest_array = len(submission.elements) // 2
        elif others > 0:
            self._limit = others
            self._longest_array = None
        else:
            return False
        self._loop.call_later(_LIMITED_FOR, self._lift_limits)
        self._abandon(submission)
        return True

    def _lift_limits(self) -> None:
        self._limit, self._longest_array = self._slurm.max_in_flight, None
        self._state.queued.set()

    def _abandon(self, submission: Submission) -> None:
        """The array wasn't submitted and won't be; its elements are over, or wait again."""
        self._state.forget(submission)
        live = [e for e in submission.elements if not e.done]
        for element in submission.elements:
            element.submission, element.disowned = None, False
        for element in live:
            if element.stopping:
                self._state.finish_unstarted(element)
        again = [e for e in live if not e.done]
        if again:
            self._state.queue.put_back(again)
            self._state.queued.set()

    def _refuse(self, elements: Iterable[Element], error: SubmitError | TransportError) -> None:
        for element in elements:
            element.disowned = False
            if element.done:
                continue
            if element.submission is not None:
                self._state.forget(element.submission)
                element.submission = None
            if element.stopping:
                self._state.finish_unstarted(element)
            else:
                self._state.finish(element, report.refused(error))
