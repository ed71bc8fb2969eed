"""The `Transport` of a cluster that this machine isn't part of."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._host.threads import in_thread
from ..._model.address import Address
from ..._model.errors import TransportError
from ..local import not_ours
from ..protocol import Done, LinkLost
from .archive import tar
from .channels import Channels, only
from .lines import Lines
from .link import Link
from .parts import Parts
from .wanted import NOT_OURS, get_command, sort_out

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from ..._model.events import Event
    from ..protocol import Content, Wanted
    from .wanted import Found

_NOT_FOUND = 127
"""What a shell says of a program that isn't there."""


class SSH:
    """A host across SSH.

    Args:
        host: `user@host:port`, or an alias of `~/.ssh/config`.
        connect: Options of `asyncssh.connect`, which are for jump hosts too, except the password. And `prompt`:
            what answers when a server asks for a password or a code: a function, sync or async, from
            its words to the answer. A jump host's words begin with its name.
        emit: Takes `LinkDown` and `LinkUp`.
        directory: Where large files from there go; if None, one that's made when it's needed.
    """

    def __init__(
        self,
        host: str,
        connect: Mapping[str, Any] | None,
        emit: Callable[[Event], None],
        directory: str | None = None,
    ) -> None:
        self._link = Link(Address.parse(host), dict(connect or {}), emit)
        self._channels = Channels(self._link)
        self._parts = Parts(self._channels, directory)

    @property
    def host(self) -> str:
        """As `Transport.host`."""
        return self._link.host

    async def run(self, command: str, *, stdin: str = "", timeout: float) -> Done:
        """As `Transport.run`. What it takes to have a channel doesn't count for `timeout`."""
        feed = (lambda: only(os.fsencode(stdin))) if stdin else None
        said = await self._channels.exchange(command, feed, timeout, once=True)
        begin = f"\n{self._channels.mark} stderr\n".encode()
        stdout, ended, words = said.stdout.rpartition(begin)
        if not ended:
            # Its shell had no process to be had.
            raise LinkLost(f"{self.host} can't run commands now: {said.words}")
        stderr, _, status = words.rpartition(b"\n")
        return Done(int(status), stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    async def put(self, files: Mapping[str, Content]) -> None:
        """As `Transport.put`."""
        # No owner, no times: they would be this machine's.
        said = await self._channels.exchange("umask 077; cd / && tar -xmof -", lambda: tar(files))
        if said.status != 0:
            # All that tar says of a full disk is how little it could write.
            hint = ": the disk is full, or a quota" if "Wrote only" in said.words else ""
            raise TransportError(f"can't write files on {self.host}{hint}: {said.words}")

    async def get(
        self, files: Sequence[Wanted], *, guard: str | None = None
    ) -> list[bytes | TransportError | None]:
        """As `Transport.get`."""
        contents: dict[str, bytes | TransportError | None] = {}
        last = {wanted.path: wanted.last for wanted in files if wanted.path}
        while last:
            found = await self._get_some(last, guard)
            for path in found.long:
                contents[path] = await self._get_long(path)
            contents |= found.contents
            last = {path: last[path] for path in found.left}
        return [contents.get(wanted.path) for wanted in files]

    async def _get_some(self, last: Mapping[str, int | None], guard: str | None) -> Found:
        """As many files as fit into one archive."""
        said = await self._channels.exchange(get_command(last, self._channels.mark, guard))
        if guard is not None and said.stdout == NOT_OURS:
            raise not_ours(guard)
        found = await in_thread(sort_out, last, said, self._channels.mark)
        if found is None and said.status == _NOT_FOUND:
            raise TransportError(f"can't read files on {self.host}: {said.words}")
        if found is None:
            # So it ended in the middle: there was no process to be had, or no memory.
            raise LinkLost(f"{self.host} can't read files now: {said.words}")
        return found

    async def _get_long(self, path: str) -> bytes | TransportError:
        try:
            here = await self.fetch(path)
            try:
                return await in_thread(Path(here).read_bytes)
            finally:
                await in_thread(os.unlink, here)
        except OSError as error:
            return TransportError(f"can't read what came of {path}: {error.strerror}")
        except LinkLost:
            raise
        except TransportError as error:
            return error

    async def fetch(self, path: str) -> str:
        """As `Transport.fetch`."""
        return await self._parts.fetch(path)

    @asynccontextmanager
    async def watch(self, command: str) -> AsyncIterator[Lines]:
        """As `Transport.watch`."""
        script = f"exec 2>/dev/null\nprintf '\\n{self._channels.mark}\\n'\n{command}"
        lines = Lines(self._channels, script)
        try:
            await lines.open()
            yield lines
        finally:
            await lines.close()

    async def aclose(self) -> None:
        """As `Transport.aclose`."""
        await self._link.aclose()
        await self._channels.aclose()
        await self._parts.aclose()
