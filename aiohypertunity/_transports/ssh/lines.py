"""What the watcher reads, in a channel that it keeps while no others need it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import anyio

from ..protocol import LinkLost
from .link import TROUBLE

if TYPE_CHECKING:
    from .channels import Channels
    from .link import Process


class Lines:
    """The lines of a command, in spite of a channel that gives way to others.

    Args:
        channels: Where it has its own.
        script: Says the mark before its first line.
    """

    def __init__(self, channels: Channels, script: str) -> None:
        self._channels = channels
        self._link = channels.link
        self._script = script
        self._stack = contextlib.AsyncExitStack()
        self._process: Process | None = None
        self._began = False
        self._asked = False
        self._leaving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begins, or begins anew."""
        self._leaving, self._asked, self._began = None, False, False
        channel = self._channels.channel(self._script, self._give_way)
        self._process = await self._stack.enter_async_context(channel)
        if self._asked:
            self._give_way()

    async def close(self) -> None:
        """Ends the command, if it still runs."""
        with anyio.CancelScope(shield=True):
            if self._leaving is not None:
                await asyncio.wait([self._leaving])
            await self._stack.aclose()
        self._process = None

    def _give_way(self) -> None:
        self._asked = True
        # Else it is about to open, and gives way as soon as it has.
        if self._leaving is None and self._process is not None:
            self._leaving = asyncio.get_running_loop().create_task(self._stack.aclose())

    def send(self, line: str) -> None:
        """As `Lines.send`."""
        process = self._process
        if process is not None and not process.stdin.is_closing():
            with contextlib.suppress(*TROUBLE):
                process.stdin.write(os.fsencode(f"{line}\n"))

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> str:
        while True:
            line = await self._read()
            if line == self._channels.mark:
                self._began = True
            elif line is not None and self._began:
                return line
            elif line is None and self._leaving is not None:
                await self.close()
                await self.open()
            elif line is None:
                raise StopAsyncIteration

    async def _read(self) -> str | None:
        """A line; None when there are no more."""
        process = self._process
        assert process is not None
        try:
            line = await process.stdout.readline()
        except TROUBLE as error:
            if self._leaving is not None:
                return None
            raise LinkLost(f"the link to {self._link.host} failed: {error}") from error
        if line.endswith(b"\n"):
            return line[:-1].decode(errors="replace")
        if self._leaving is None and self._link.is_down:
            raise self._link.lost_in(process)
        return None
