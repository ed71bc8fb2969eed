"""Whose keys are trusted, and what to say of one that isn't: it's unknown, or it has changed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import asyncssh

from ..._model.errors import TransportError


def known_hosts_of(host: str, known_hosts: Any, *, is_ours: bool) -> Any:
    """Where to find a host's key: never nowhere, which asyncssh would take for a host that needs none."""
    if known_hosts is None:
        raise TransportError(
            f"known_hosts of {host} is none, in connect or as UserKnownHostsFile in ~/.ssh/config: "
            "anybody could take its place; name a file of keys"
        )
    if is_ours:
        return known_hosts
    files = [os.path.expanduser(name) for name in known_hosts or ["~/.ssh/known_hosts"]]
    return [name for name in files if os.access(name, os.R_OK)] or b""


class Facts:
    """What there is to say of a host whose key isn't trusted.

    Args:
        host: Its name.
        port: Its port.
        known_hosts: Where its key is to be found.
    """

    def __init__(self, host: str, port: int, known_hosts: Any = b"") -> None:
        self.host = host
        self.port = port
        self._known_hosts = known_hosts
        self._shown: tuple[str, str, int, asyncssh.SSHKey] | None = None

    def show(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> None:
        """Takes the key that it showed."""
        self._shown = host, addr, port, key

    def distrust(self, words: str) -> str:
        """Why it isn't trusted, and what to do."""
        if self._shown is None:
            return f"{self.host}: {words}: known_hosts must have its key, as for ssh itself"
        host, addr, port, key = self._shown
        name = host if port == 22 else f"[{host}]:{port}"
        fingerprint = f"fingerprint {key.get_fingerprint()}"
        if _keys_of(self._known_hosts, host, addr, port):
            where = " and ".join(self._lines(host, addr, port)) or "known_hosts"
            return (
                f"the key of {name} has CHANGED: it isn't the one in {where}. Somebody may be listening in, or "
                f"the host was installed anew: ask its owners whether {fingerprint} is right, "
                "and only then remove the old key"
            )
        return (
            f"the key of {name} isn't in known_hosts, so it may be anybody's. If its {fingerprint} "
            f"is the one that its owners give, add this line to "
            f"~/.ssh/known_hosts (ssh-keyscan -p {port} {host} prints it, too):\n"
            f"{name} {key.export_public_key().decode().strip()}"
        )

    def _lines(self, host: str, addr: str, port: int) -> list[str]:
        """The lines that have another key for it."""
        known = self._known_hosts
        files = [known] if isinstance(known, str) else known if isinstance(known, list) else []
        found = []
        for file in files:
            with contextlib.suppress(OSError, ValueError, TypeError):
                lines = Path(file).expanduser().read_text(errors="replace").splitlines()
                for number, line in enumerate(lines, 1):
                    if _keys_of(line.encode(), host, addr, port):
                        found.append(f"{file}, line {number}")
        return found


def _keys_of(known_hosts: Any, host: str, addr: str, port: int) -> bool:
    found = asyncssh.match_known_hosts(known_hosts, host, addr, None if port == 22 else port)
    return bool(found[0])
