"""The connection: one for everything.

A host that never answered may be a slip of the pen: after some tries that is said. One that has answered is waited
for, whatever it does: refuses us, or is gone.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import anyio
import asyncssh

from ..._host.threads import in_thread
from ..._model.address import Address
from ..._model.errors import TransportError
from ..._model.events import LinkDown, LinkUp
from ..protocol import Distrusted, LinkLost
from .hosts import Facts
from .login import for_hop, resolve
from .patience import LONGEST_PAUSE, Patience
from .prompts import Questions

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..._model.events import Event
    from .login import Way

    Process = asyncssh.SSHClientProcess[bytes]

_LOG = logging.getLogger("aiohypertunity.ssh")

_FIRST = 30.0
"""Seconds for which a host that never answered is tried: it may be down, but it may be a slip as well."""

TROUBLE = (OSError, asyncssh.Error)
"""What a channel raises when its connection fails."""


class Link:
    """The connection, made when it's first needed and again whenever it was lost.

    Args:
        address: The host.
        options: As of `SSH`; they become the link's.
        emit: Takes `LinkDown` and `LinkUp`.

    Attributes:
        host: The host's name.
    """

    def __init__(
        self, address: Address, options: dict[str, Any], emit: Callable[[Event], None]
    ) -> None:
        self.host = address.host
        self._address = address
        prompt = options.pop("prompt", None)
        self._questions = None if prompt is None else Questions(prompt)
        self._make_client = options.pop("client_factory", None)
        self._options = options
        self._emit = emit
        self._connection: asyncssh.SSHClientConnection | None = None
        self._attempt: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._patience = Patience()
        self._first_tried: float | None = None
        self._is_reported_down = False
        self._is_distrusted = False
        self._was_up = False
        self._is_closing = False
        self._slow = False
        self._secret_given = "password" in options

    @property
    def current(self) -> asyncssh.SSHClientConnection | None:
        """The connection, if it stands."""
        if self._connection is not None and self._connection.is_closed():
            self.connection_lost(self._connection, None)
        return self._connection

    @property
    def is_down(self) -> bool:
        """Whether there is none."""
        return self.current is None

    async def connection(self) -> asyncssh.SSHClientConnection:
        """The connection; made, if there's none, by one attempt for all who ask meanwhile.

        Raises:
            LinkLost: It can't be made now.
            TransportError: It can't be made, and trying again wouldn't help.
        """
        connection = self.current
        if connection is not None:
            return connection
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.get_running_loop().create_task(self._connect())
            self._attempt.add_done_callback(_look_at)
        return await asyncio.shield(self._attempt)

    def lost_in(self, process: Process) -> LinkLost:
        """What to say when a channel ended too early."""
        if self.is_down:
            return LinkLost(f"the link to {self.host} failed")
        return LinkLost(f"{self.host} dropped a channel (exit status {process.exit_status})")

    def answered(self) -> None:
        """It does what it's there for: only then the next trouble is a new one."""
        self._patience.succeeded()

    async def aclose(self) -> None:
        """Ends the connection, or the attempt to have one."""
        self._is_closing = True
        if self._questions is not None:
            self._questions.close()
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.wait([self._attempt])
        if self._connection is not None:
            self._connection.close()
            with anyio.move_on_after(2, shield=True):
                await self._connection.wait_closed()

    async def _connect(self) -> asyncssh.SSHClientConnection:
        if self._first_tried is None:
            self._first_tried = time.monotonic()
        pause = self._patience.pause()
        await asyncio.sleep(max(pause, LONGEST_PAUSE) if pause and self._slow else pause)
        if self._questions is not None:
            await self._questions.answered()
        connection = await self._dial(self._address, self._options)
        if connection.is_closed():
            raise self._lose(f"{self.host} closed the connection after the log-in")
        self._connection = connection
        self._was_up, self._slow, self._is_distrusted = True, False, False
        if self._is_reported_down:
            self._is_reported_down = False
            _LOG.info("the link to %s stands again", self.host)
            self._emit(LinkUp(self.host, time.time()))
        return connection

    async def _dial(
        self,
        address: Address,
        options: dict[str, Any],
        via: asyncssh.SSHClientConnection | None = None,
        through: frozenset[str] = frozenset(),
    ) -> asyncssh.SSHClientConnection:
        """Logs in to a host, and before that to those on the way to it.

        Args:
            address: The host.
            options: For `asyncssh.connect`.
            via: The last host on the way, if it's known already.
            through: Those for which this one is on the way.
        """
        facts = Facts(address.host, address.port or 22)
        try:
            way = await in_thread(resolve, address, options, self._questions is not None)
            facts = Facts(address.host, way.port, way.known_hosts)
            hop = via
            if hop is None and isinstance(way.tunnel, str) and address.host not in through:
                for name in way.tunnel.split(","):
                    hop = await self._dial(
                        Address.parse(name), for_hop(options), hop, through | {address.host}
                    )
            try:
                connection = await self._log_in(way, facts, hop, is_hop=bool(through))
            except BaseException:
                if hop is not None:
                    hop.close()
                raise
        except TransportError:
            raise
        except Exception as error:
            raise self._judge(error, facts) from error
        if hop is not None:
            connection.set_tunnel(hop)  # which ends with it
        return connection

    async def _log_in(
        self, way: Way, facts: Facts, hop: asyncssh.SSHClientConnection | None, *, is_hop: bool
    ) -> asyncssh.SSHClientConnection:
        tunnel = hop if hop is not None or isinstance(way.tunnel, str) else way.tunnel
        async with asyncio.timeout(way.patience) as deadline:
            return await asyncssh.connect(
                tunnel=tunnel,
                client_factory=lambda: self._client(facts, deadline, is_hop=is_hop),
                **way.options,
            )

    def _judge(self, error: Exception, facts: Facts) -> TransportError:
        """What a log-in that failed means: to try again, or not."""
        where = facts.host
        words = str(error) or ("no answer" if isinstance(error, TimeoutError) else repr(error))
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            if self._was_up:
                return self._lose_trust(facts.distrust(words))
            return TransportError(facts.distrust(words))
        if isinstance(error, asyncssh.PermissionDenied):
            if self._was_up and not self._secret_given:
                # It knew us: it may still be booting. What somebody typed isn't tried again, though.
                self._slow = True
                return self._lose(f"{where} doesn't let us in at present: {error}")
            return TransportError(f"{where} doesn't let us in: {error}")
        if isinstance(error, asyncssh.KeyExchangeFailed | asyncssh.ProtocolNotSupported):
            return TransportError(f"can't talk with {where}: {error}")
        if not isinstance(error, OSError | asyncssh.Error):
            # A key that can't be read, an option that makes no sense.
            return TransportError(f"can't log in to {where}: {error}")
        if self._questions is not None and self._questions.is_open:
            self._first_tried = None
            return self._lose(f"{where} waits for somebody to answer: {words}")
        if self._was_up:
            return self._lose(f"can't reach {where}: {words}")
        if isinstance(error, socket.gaierror):
            return TransportError(f"there is no host {where!r}: {error.strerror}")
        if isinstance(error, OSError) and (error.filename or isinstance(error, _WRONG_FILE)):
            return TransportError(f"can't log in to {where}: {error}")
        if self._first_tried is None or time.monotonic() - self._first_tried < _FIRST:
            return self._lose(f"can't reach {where}, port {facts.port}: {words}")
        self._first_tried = None
        return TransportError(f"can't reach {where}, port {facts.port}, in {_FIRST:g} s: {words}")

    def _client(
        self, facts: Facts, deadline: asyncio.Timeout, *, is_hop: bool
    ) -> asyncssh.SSHClient:
        if self._make_client is not None and not is_hop:
            inner = self._make_client()
        elif self._questions is not None:
            self._questions.prefix = f"{facts.host}: " if is_hop else ""
            inner = self._questions.client(self._gave_secret)
        else:
            inner = asyncssh.SSHClient()
        return _Client(inner, self, facts, deadline)  # type: ignore[return-value]  # it has all its methods

    def _gave_secret(self) -> None:
        self._secret_given = True

    def connection_lost(
        self, connection: asyncssh.SSHClientConnection | None, error: Exception | None
    ) -> None:
        """A connection is gone; it may be one that never stood, or another one."""
        if connection is None or connection is not self._connection or self._is_closing:
            return
        self._connection = None
        self._lose(str(error) if error is not None else "the host closed it")

    def _lose(self, reason: str) -> LinkLost:
        self._patience.failed()
        if not self._is_reported_down:
            self._is_reported_down = True
            _LOG.warning("the link to %s is down: %s", self.host, reason)
            self._emit(LinkDown(self.host, time.time(), reason))
        return LinkLost(reason)

    def _lose_trust(self, reason: str) -> Distrusted:
        """Return the error of a host that shows another key than before; report that once.

        A login node that was installed anew does this, and so does a machine in its place. Jobs run on
        either way, and no attempt sends a secret before the key is checked.
        """
        if not self._is_distrusted:
            self._is_distrusted = True
            if self._is_reported_down:
                _LOG.warning("the link to %s stays down: %s", self.host, reason)
                self._emit(LinkDown(self.host, time.time(), reason))
        self._lose(reason)
        return Distrusted(reason)


_WRONG_FILE = (FileNotFoundError, PermissionError)


def _look_at(attempt: asyncio.Task[Any]) -> None:
    # Whoever asked for it may be gone.
    if not attempt.cancelled():
        attempt.exception()


class _Client:
    """What asyncssh asks and tells, on its way to whom the user named."""

    def __init__(
        self, inner: asyncssh.SSHClient, link: Link, facts: Facts, deadline: asyncio.Timeout
    ) -> None:
        self._inner = inner
        self._link = link
        self._facts = facts
        self._deadline = deadline
        self._connection: asyncssh.SSHClientConnection | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connection_made(self, connection: asyncssh.SSHClientConnection) -> None:
        self._connection = connection
        if not self._deadline.expired():
            self._deadline.reschedule(None)
        self._inner.connection_made(connection)

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self._facts.show(host, addr, port, key)
        return self._inner.validate_host_public_key(host, addr, port, key)

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        self._link.connection_lost(self._connection, error)
