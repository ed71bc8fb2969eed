"""What any login shell understands, and what is told from the noise that it makes.

What the login shell is and what its rc files print can't be known. So a command goes to /bin/sh, in letters
that mean the same to every shell, and what it says stands between marks. Without the second mark
nobody knows what became of it, whatever the channel's exit status says.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

PIECE = 1 << 20
"""Bytes that are moved at a time; more of them are worth a thread."""

# Neither tcsh nor fish does anything to these between single quotes. The rest becomes octal numbers.
_HARMLESS = re.compile(rb"[^ -&(-\[\]-~]|!")


def for_any_shell(script: str) -> str:
    """A line with which any login shell runs a script for /bin/sh."""
    coded = _HARMLESS.sub(lambda found: b"\\0%03o" % ord(found[0]), os.fsencode(script))
    return f"""exec /bin/sh -c 'eval "$(printf %b "$1")"' sh '{coded.decode()}'"""


def marked(command: str, mark: str, *, with_stdin: bool = False) -> str:
    """A script that says what a command says between marks, the second with its exit status."""
    begin = f"printf '\\n{mark}\\n'"
    # No stdin needs no end, which would be a message.
    stdin = "" if with_stdin else " </dev/null"
    return f"{begin}; {begin} >&2\n(\n{command}\n){stdin}\nprintf '\\n{mark} %s\\n' $?"


def in_one_piece(command: str, mark: str, *, with_stdin: bool = False) -> str:
    """The same for text, with its stderr and status behind it, said at once: each piece would be a message."""
    stdin = "" if with_stdin else " </dev/null"
    return f"""\
printf '\\n{mark}\\n'
said=$({{
err=$( (
{command}
) 2>&1 >&3 3>&-{stdin})
status=$?
printf '\\n{mark} stderr\\n%s\\n%s' "$err" "$status"
}} 3>&1)
printf '%s\\n{mark} 0\\n' "$said"
"""


class Said(NamedTuple):
    """What a command said, between its marks.

    Attributes:
        status: Its exit code; negative if the second mark is missing.
    """

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def words(self) -> str:
        """The end of its stderr, on one line."""
        lines = self.stderr.decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines[-5:]) or f"exit code {self.status}"


def between(out: bytes, err: bytes, mark: str) -> Said | None:
    """What was said between the marks; None if not even the first is there."""
    begin, end = f"\n{mark}\n".encode(), f"\n{mark} ".encode()
    began, ended = out.find(begin), out.rfind(end)
    if began < 0:
        return None
    status = out[ended + len(end) :] if ended >= began else b""
    number = int(status) if status.endswith(b"\n") else -1
    return Said(number, out[began + len(begin) : ended], err.partition(begin)[2])
