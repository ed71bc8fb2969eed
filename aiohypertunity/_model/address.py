"""Where to log in: `user@host:port`."""

from __future__ import annotations

import re
from typing import NamedTuple


class Address(NamedTuple):
    """Where to log in."""

    host: str
    port: int | None = None
    user: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """From `user@host:port`, of which the host alone is needed; it may be an alias.

        Raises:
            ValueError: It isn't one.
        """
        match = _ADDRESS.match(text)
        if match is None:
            raise ValueError(f"host={text!r}: must be 'host', 'user@host' or 'user@host:port'")
        port = match["port"]
        return cls(match["v6"] or match["host"], int(port) if port else None, match["user"])


_ADDRESS = re.compile(
    r"(?:(?P<user>[^@\s]+)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^@\s:\[\]]+))(?::(?P<port>\d{1,5}))?\Z"
)
