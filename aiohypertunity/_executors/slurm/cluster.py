"""The cluster as all loops see it: commands over a link that may fail, a clock that knows, a budget."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
from typing import TYPE_CHECKING, TypeVar

from ..._host.threads import in_thread
from ..._model.errors import SubmitError, TransportError
from ..._transports.connect import transport_to
from ..._transports.protocol import Distrusted, LinkLost, Transport
from . import lease, shell, text, trust
from .nodecode import node_code
from .pace import LOOK, Budget

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from ..._model.events import Event
    from ..._model.slurm import Slurm
    from ..._transports.protocol import Content, Done, Lines, Wanted

T = TypeVar("T")

_LOG = logging.getLogger("aiohypertunity.slurm")

BREATH = 0.1
"""Seconds before what the link broke is begun anew."""

PATIENCE = 30.0
"""Seconds that a command may take."""

_SPOOL_MARK = "aiohypertunity-spool:"
_PREPARE = f"""\
umask 077
mkdir -p {{workdir}} && cd {{workdir}} && mkdir -p -m 700 {{run}} || exit 1
printf '%s\\n' {{lease}} >{{run}}/lease || exit 1
{{others}}
echo "{_SPOOL_MARK}$PWD/{{run}}"
{{directories}}
{{site}}
"""


class Cluster:
    """A cluster, and the directory of a run on it.

    Args:
        slurm: The cluster, and how to use it.
        emit: Takes events of the link.
        give_up: Called when the link was down for too long.
        say: Called with why nothing goes on while the link is down, and with None when it's up again.
        directory: Where large files from there go on this machine.

    Attributes:
        host: Its name; None for this machine.
        run: The name of the run: of its jobs, and of its directory.
        directory: Where its files are there; empty before `prepare`.
        prepared: Set after `prepare`.
        has_others: Whether other runs had leases in the work directory then.
        site: What the cluster is like.
        controller: The last that was heard of slurmctld's memory.
        budget: What RPCs may be spent.
    """

    def __init__(
        self,
        slurm: Slurm,
        emit: Callable[[Event], None],
        give_up: Callable[[TransportError], None],
        say: Callable[[str | None], None],
        directory: str | None = None,
    ) -> None:
        self._slurm = slurm
        self._give_up = give_up
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._link_lost_at: float | None = None
        self._is_distrusted = False
        self._paused = 0.0
        self._transport: Transport = transport_to(slurm, emit, directory)
        self.host = self._transport.host
        self.run = f"ht-{secrets.token_hex(6)}"
        self.directory = ""
        self.prepared = asyncio.Event()
        self.has_others = False
        self._driver: lease.Driver | None = None
        self.site = text.Site()
        self.controller = text.Controller()
        self.budget = Budget()

    async def aclose(self) -> None:
        """Lets go of the link."""
        await self._transport.aclose()

    def now(self) -> float:
        """A clock that stands still while the link is down: no job is blamed for that time."""
        stands = self._link_lost_at
        return (self._loop.time() if stands is None else stands) - self._paused

    async def through(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Does what may be done twice, as often as the link fails under it."""
        while True:
            try:
                return await operation()
            except LinkLost:
                # How long to wait for a link is for the transport to know.
                await asyncio.sleep(BREATH)
            except TimeoutError as error:
                _LOG.warning("%s is slow, and is asked again: %s", self.host, error)

    def link_down(self, error: LinkLost) -> None:
        """Stops the clock."""
        is_distrusted = isinstance(error, Distrusted)
        if self._link_lost_at is None or (is_distrusted and not self._is_distrusted):
            self._say(str(error))
        if self._link_lost_at is None:
            self._link_lost_at = self._loop.time()
        self._is_distrusted = is_distrusted
        limit = self._slurm.give_up_after
        if limit is not None and self._loop.time() - self._link_lost_at > limit:
            words = f"the link to {self.host} was down for more than {limit:g} s: {error}"
            self._give_up(TransportError(words))

    def link_up(self) -> None:
        """Lets the clock go on."""
        if self._link_lost_at is not None:
            self._paused += self._loop.time() - self._link_lost_at
            self._link_lost_at = None
            self._say(None)

    async def _noted(self, operation: Awaitable[T]) -> T:
        """Does something across the link, and draws from it whether that is up."""
        try:
            result = await operation
        except LinkLost as error:
            self.link_down(error)
            raise
        self.link_up()
        return result

    async def shell(self, command: str) -> Done:
        """Runs a command line of the shell's own."""
        return await self._noted(self._transport.run(command, timeout=PATIENCE))

    async def put(self, files: Mapping[str, Content]) -> None:
        """Writes files."""
        await self._noted(self._transport.put(files))

    async def get(self, files: Sequence[Wanted]) -> list[bytes | TransportError | None]:
        """Reads files; says in its place why one can't be read."""
        return await self._noted(self._transport.get(files, guard=self.directory))

    async def fetch(self, path: str) -> str:
        """Brings a large file here."""
        return await self._noted(self._transport.fetch(path))

    def watch(self, command: str) -> AbstractAsyncContextManager[Lines]:
        """Runs a command for as long as the `with` lasts. It's for the caller to note what it says of the link."""
        return self._transport.watch(command)

    async def command(self, command: str, *, timeout: float = PATIENCE) -> Done:
        """Runs a command of Slurm's, after the lines that make it available."""
        if self._slurm.setup:
            lines = ("{", *self._slurm.setup, "} >/dev/null", command)
            command = shlex.join(("bash", "-c", "\n".join(lines)))
        return await self._noted(self._transport.run(command, timeout=timeout))

    async def cancel_run(self) -> bool:
        """Cancel by name: also jobs whose id was never known, or that were requeued after their end.

        Returns:
            True if Slurm has accepted it.

        Raises:
            LinkLost: The link is down.
        """
        try:
            done = await self.command(text.cancel_run_command(self.run))
        except LinkLost:
            raise
        except (TimeoutError, TransportError):
            return False
        return done.exit_status == 0

    async def ask_controller(self) -> bool:
        """Ask slurmctld about its memory; return False if it does not answer."""
        self.budget.spend(1, self.now())
        try:
            done = await self.command(text.CONTROLLER_COMMAND)
        except (TimeoutError, TransportError):
            return False
        if done.exit_status != 0:
            return False
        self.controller = text.parse_controller(done.stdout)
        return True

    async def prepare(self) -> None:
        """Makes the directory of the run and learns about the site, once."""
        if self.directory:
            return
        self._driver = await in_thread(lease.this_driver)
        command = _PREPARE.format(
            workdir=self.workdir(),
            run=self.run,
            lease=shlex.quote(self.lease()),
            others=lease.OTHERS_COMMAND,
            directories=trust.DIRECTORIES_COMMAND,
            site=text.SITE_COMMAND,
        )
        done = await self.through(lambda: self.command(command))
        found = done.stdout.partition(_SPOOL_MARK)[2].partition("\n")[0]
        if not found:
            raise self._unusable(text.last_words(done.stderr))
        unsafe = trust.unsafe(done.stdout)
        hopeless = text.hopeless(done.stdout)
        if unsafe is not None or hopeless is not None:
            with contextlib.suppress(TransportError):
                await self.shell(shell.remove_tree(found))
        if hopeless is not None:
            raise SubmitError(
                f"Slurm can't be used here: {hopeless}; `python -m aiohypertunity doctor` looks closer"
            )
        if unsafe is not None:
            raise self._unusable(unsafe)
        self.site = text.parse_site(done.stdout)
        self.controller = text.parse_controller(done.stdout)
        files = await in_thread(node_code)
        placed = {f"{found}/node/{name}": content for name, content in files.items()}
        await self.through(lambda: self.put(placed))
        self.directory = found
        self.has_others = lease.OTHERS in done.stdout
        self.prepared.set()

    def lease(self) -> str:
        """The run's lease, as of now; after `prepare` has begun."""
        assert self._driver is not None
        return lease.format_lease(self.run, self._driver, keep=self._slurm.keep is not None)

    def _unusable(self, why: str) -> TransportError:
        return TransportError(
            f"the work directory {self._slurm.workdir or '~/.aiohypertunity'} can't be used: {why}; "
            "or name another by Slurm(workdir=...) that the nodes see too"
        )

    def workdir(self) -> str:
        """The work directory, as a word for the shell there."""
        path = (
            "~/.aiohypertunity" if self._slurm.workdir is None else os.fspath(self._slurm.workdir)
        )
        if self.host is None:
            path = os.path.abspath(os.path.expanduser(path))
        home, _, rest = path.partition("/")
        return f'"$HOME"/{shlex.quote(rest)}' if home == "~" else shlex.quote(path)

    async def look(self) -> dict[tuple[str, int], text.Seen] | None:
        """What squeue says of this run's jobs; None if it says nothing, for whatever reason."""
        self.budget.spend(LOOK, self.now())
        try:
            done = await self.command(text.look_command(self.run))
        except (TimeoutError, TransportError):
            return None
        if done.exit_status != 0:
            return None
        return await in_thread(text.parse_look, done.stdout)
