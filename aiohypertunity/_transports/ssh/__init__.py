"""A login node across SSH: one connection carries everything, in channels.

What is said and sent:
framing     a command that any login shell runs, and what it said, between marks
archive     files as a tar stream, out and in
wanted      many files at once: the command that reads them, what came of each

The connection:
hosts       whose key is trusted; what to say of one that isn't: unknown, or changed
prompts     the server's questions, for somebody who may take their time
login       options, OpenSSH's configuration and our defaults as one way to log in
patience    how long to wait before the next attempt
link        the connection, through jump hosts, made again whenever it was lost; its events

What goes through it:
slots       how many channels there may be; who gives way
channels    a command in a channel of its own
lines       what the watcher reads, in a channel that gives way
parts       a large file, from where the last attempt left off
transport   all of them together: a `Transport`

A module imports only from those above it.
"""

from __future__ import annotations

from .transport import SSH

__all__ = ["SSH"]
