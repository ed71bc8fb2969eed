"""SIGTERM while jobs are on a cluster: leave first, then die of it.

What a driver has on its own machine goes with it however it dies. Jobs on a cluster don't, so while a
scheduler has any, SIGTERM makes it leave as Ctrl-C would; when the last one has left, the process dies of
SIGTERM as it would have at once. A second SIGTERM meanwhile changes nothing: some programs send two.

That is only for processes in which SIGTERM has its default action. A handler of the user's, `signal.signal` or
`loop.add_signal_handler`, before or after, has the last word. And it is only for the main thread, the one
place from which a handler can be set.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


class _Leaver(NamedTuple):
    leave: Callable[[], bool]
    is_on_main: bool


_open: dict[Hashable, _Leaver] = {}
_process = {"pid": 0, "is_dying": 0}
"""The process that `_open` belongs to, and whether SIGTERM has come."""


def guard(scheduler: Hashable, leave: Callable[[], bool]) -> None:
    """Have a scheduler leave when SIGTERM arrives. On the thread of its loop.

    Args:
        scheduler: Which one; `release` names it when it has left.
        leave: Begins to leave, from the signal's handler; returns False if its loop doesn't run any more.
    """
    if _process["pid"] != os.getpid():  # what a parent has open isn't ours to close
        _open.clear()
        _process.update(pid=os.getpid(), is_dying=False)
    _open[scheduler] = _Leaver(leave, _is_on_main())
    install()


def install() -> None:
    """Take SIGTERM over, where this is the main thread and the user has not."""
    if _open and _is_on_main() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def release(scheduler: Hashable) -> None:
    """Note that a scheduler has left, from any thread; after the last one a SIGTERM that came does its work."""
    if _open.pop(scheduler, None) is not None and not _open and _process["is_dying"]:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        restore()


def restore() -> None:
    """Give SIGTERM its default action again if no scheduler is open, where this is the main thread."""
    if _open or not _is_on_main() or signal.getsignal(signal.SIGTERM) is not _on_sigterm:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _process[
        "is_dying"
    ]:  # another thread has sent it, and the handler is taken away before it saw that
        os.kill(os.getpid(), signal.SIGTERM)


def _on_sigterm(*_: object) -> None:
    if _process["pid"] == os.getpid():
        if _process["is_dying"] and _open:
            return
        _process["is_dying"] = True
        for scheduler, leaver in tuple(_open.items()):
            if not leaver.leave():
                del _open[scheduler]
        if _open:
            if not _runs_loop() and not all(leaver.is_on_main for leaver in _open.values()):
                raise KeyboardInterrupt  # whoever waits for the twin
            return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_on_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _runs_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
