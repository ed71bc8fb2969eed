"""The transport of this machine."""

from __future__ import annotations

import subprocess
import sys

CANCELLED = """
import anyio, asyncio
from aiohypertunity._transports.local import LocalShell

async def main():
    with anyio.move_on_after(0.1):
        await LocalShell().run("sleep 60", timeout=90)

asyncio.run(main())
"""


def test_a_command_whose_scope_is_cancelled_is_waited_for() -> None:
    """A scope cancels again and again: the command is gone all the same before the loop may end."""
    argv = [sys.executable, "-W", "always", "-c", CANCELLED]
    said = [subprocess.run(argv, capture_output=True, text=True, check=True) for _ in range(4)]
    assert [done.stderr for done in said] == [""] * 4
