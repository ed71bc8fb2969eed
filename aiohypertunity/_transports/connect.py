"""The choice of a transport for a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .local import LocalShell

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._model.events import Event
    from .._model.slurm import Slurm
    from .protocol import Transport


def transport_to(
    slurm: Slurm, emit: Callable[[Event], None], directory: str | None = None
) -> Transport:
    """The way to a cluster.

    Args:
        slurm: The cluster.
        emit: Takes `LinkDown` and `LinkUp`.
        directory: Where large files from there go; if None, one that's made when it's needed.
    """
    if slurm.host is not None:
        # Takes a tenth of a second, and most schedulers don't need it.
        from .ssh.transport import SSH

        return SSH(slurm.host, slurm.connect, emit, directory)
    return LocalShell()
