"""Watches the spool: what batch shells leave there says that jobs start and end."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import anyio

from ..._transports.protocol import Lines, LinkLost
from . import shell
from .cluster import BREATH

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .cluster import Cluster
    from .elements import Element, Submission
    from .state import State

_LEASE = 15.0
"""Seconds between signs of life to the watcher there, which leaves after a minute without; they renew the
run's lease, too."""

_ORDER = {"run": 0, "on": 1, "end": 2, "result": 3}


class Watcher:
    """Reads names in the spool, as evidence.

    Args:
        cluster: Where the spool is.
        state: Whose elements leave names.
    """

    def __init__(self, cluster: Cluster, state: State) -> None:
        self._cluster = cluster
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._watching = anyio.CancelScope()

    async def run(self) -> None:
        """Watches while anything is active, for ever."""
        pause = BREATH
        while True:
            await self._state.active.wait()
            began = self._loop.time()
            with anyio.CancelScope() as self._watching:
                try:
                    await self._watch()
                    self._cluster.link_up()
                except LinkLost as error:
                    self._cluster.link_down(error)
                    began = -1e9
            pause = BREATH if self._loop.time() - began > 5 else min(2 * pause, 10)
            await asyncio.sleep(pause)

    def rest(self) -> None:
        """There's nothing to watch until there is something active again."""
        self._state.active.clear()
        self._watching.cancel()

    async def _watch(self) -> None:
        # A watcher that is new lists everything, so nothing is lost with one that died.
        async with self._cluster.watch(shell.watcher(self._cluster.directory)) as lines:
            lease = self._loop.create_task(self._renew(lines))
            try:
                async for line in lines:
                    self._cluster.link_up()
                    name, _, names = line.partition(" ")
                    submission = self._state.submissions.get(name)
                    if submission is not None:
                        self.take_names(submission, names)
            finally:
                lease.cancel()

    async def _renew(self, lines: Lines) -> None:
        while True:
            lines.send(self._cluster.lease())
            await asyncio.sleep(_LEASE)

    async def list_now(self, elements: Iterable[Element]) -> None:
        """List the directories of elements: the watcher there may be stuck."""
        for submission in {e.submission for e in elements if e.submission is not None}:
            done = await self._cluster.shell(shell.listing(submission.directory))
            if done.exit_status == 0:
                self.take_names(submission, done.stdout.strip())

    def take_names(self, submission: Submission, line: str) -> None:
        """These names are in the directory of a submission."""
        names = frozenset(line.split())
        signs = [sign for name in names - submission.names if (sign := shell.parse_sign(name))]
        submission.names = names
        for sign in sorted(signs, key=lambda sign: _ORDER[sign.kind]):
            if sign.element < len(submission.elements):  # else it's somebody else's file
                element = submission.elements[sign.element]
                try:
                    if not element.done:
                        self._take_sign(element, sign)
                except Exception as error:  # a fault of ours is this element's alone
                    self._state.fault([element], error)

    def _take_sign(self, element: Element, sign: shell.Sign) -> None:
        now = self._cluster.now()
        self._state.changed()
        if sign.array:
            element.array = sign.array
            assert element.submission is not None
            self._state.submitted(element.submission, sign.array)
        element.host = sign.node or element.host
        if sign.restart not in element.claims:
            self._claimed(element, sign.restart, now)
        if sign.kind != "run" and sign.restart not in element.starts:
            self._started(element, sign)
        if sign.kind == "result":
            if element.result is None:
                element.result = sign.restart
        elif sign.kind == "end" and (element.end is None or element.end.restart <= sign.restart):
            element.end, element.end_at = sign, now
        if sign.kind in {"result", "end"}:
            self._state.suspect(element)

    def _claimed(self, element: Element, restart: int, now: float) -> None:
        if restart > max(element.claims, default=-1):
            element.claimed_at = now
            element.missing_since, element.n_missing = None, 0
            element.started_at = time.time()
            element.reason = None
            element.waiting_since, element.expired = None, False
            element.n_launches_failed = 0
            if not element.stopping:  # it has begun to run before its turn was withdrawn
                element.cancelled_at = None
        element.claims.add(restart)

    def _started(self, element: Element, sign: shell.Sign) -> None:
        element.starts.add(sign.restart)
        # Counted by starts, not by Slurm's number: it may count one that never got as far as the shell.
        self._state.owner.started(
            element.entry,
            element.started_at or time.time(),
            slurm_id=element.slurm_id,
            node=element.host or None,
            attempt=element.attempts_before + len(element.starts),
        )
