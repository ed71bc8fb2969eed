"""How to log in to a host: options, OpenSSH's configuration, our defaults; what holds for a jump host, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import asyncssh

from ..._model.errors import TransportError
from .hosts import known_hosts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..._model.address import Address

_KEEPALIVE, _KEEPALIVES = 15.0, 3
"""Seconds between signs of life when nothing else comes, and how many may be missing."""

_CONNECT, _LOGIN, _TYPING = 10.0, 30.0, 120.0
"""Seconds that a connection, a log-in, and a log-in for which somebody types may take."""


class Way(NamedTuple):
    """How to log in to a host, by options, OpenSSH's configuration and our defaults, in this order.

    Attributes:
        port: Its port.
        tunnel: The hosts on the way, as ProxyJump has them; or a connection of the user's.
        known_hosts: Where its key is to be found.
        patience: Seconds for the connection; a log-in has its own.
        options: Of `asyncssh.connect`, less the tunnel.
    """

    port: int
    tunnel: object
    known_hosts: Any
    patience: float | None
    options: dict[str, Any]


def resolve(address: Address, options: dict[str, Any], typing: bool) -> Way:
    """Looks into the configuration. Blocks."""
    if "options" in options:
        raise TransportError(
            "connect: 'options' is one object for many options: give them one by one"
        )
    # No configuration means the user's, in asyncssh.connect though not in its options.
    options = {"config": (), **options, "host": address.host}
    if address.port is not None:
        options.setdefault("port", address.port)
    if address.user is not None:
        options.setdefault("username", address.user)
    asked = ("host", "port", "username", "config", "tunnel", "known_hosts", "connect_timeout")
    found = asyncssh.SSHClientConnectionOptions(
        client_keys=None, **{name: options[name] for name in asked if name in options}
    )
    defaults = {name: ours for name, word, ours in _DEFAULTS if found.config.get(word) is None}
    defaults["login_timeout"] = _TYPING if typing else _LOGIN
    known_hosts = known_hosts_of(address.host, found.known_hosts, is_ours="known_hosts" in options)
    # asyncssh's own deadline for the connection would count the log-in, too.
    options |= {"known_hosts": known_hosts, "connect_timeout": None}
    options.pop("tunnel", None)
    return Way(
        found.port, found.tunnel, known_hosts, found.connect_timeout or _CONNECT, defaults | options
    )


# What we say unless the user does, and the configuration's word for it.
_DEFAULTS: tuple[tuple[str, str, Any], ...] = (
    ("keepalive_interval", "ServerAliveInterval", _KEEPALIVE),
    ("keepalive_count_max", "ServerAliveCountMax", _KEEPALIVES),
    # Quicker by half than asyncssh's first choice.
    ("encryption_algs", "Ciphers", "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"),
)


_OF_ONE_HOST = {"host", "port", "username", "password", "tunnel", "proxy_command", "sock"}
_OF_ONE_HOST |= {"host_key_alias", "local_addr", "family"}


def for_hop(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are good for the hosts on the way, too; a password isn't."""
    return {name: value for name, value in options.items() if name not in _OF_ONE_HOST}
