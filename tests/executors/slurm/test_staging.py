"""Scripts and what they need beside them, on their way to a cluster that doesn't see this disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from helpers import script

import aiohypertunity as ht
from aiohypertunity._executors.slurm.staging import Staging

if TYPE_CHECKING:
    from pathlib import Path


def placed(staging: Staging, path: Path) -> dict[str, bytes]:
    """What is put beside a script, by its names there."""
    pinned = staging.pin(ht.SlurmJob(path))
    assert pinned is not None
    where, files = staging.place(pinned, "/root")
    directory = os.path.dirname(where)
    return {
        os.path.relpath(name, directory): held if isinstance(held, bytes) else held.read_bytes()
        for name, held in files.items()
    }


def test_directories_and_links(tmp_path: Path) -> None:
    """A directory comes with all that is in it, by links too; a link to where it lies leads nowhere."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    script(tmp_path / "elsewhere" / "deep" / "data", "far")
    script(tmp_path / "lib" / "helper", "near")
    (tmp_path / "lib" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "lib" / "again").symlink_to(tmp_path / "lib")
    path = script(tmp_path / "job.sh", "echo")
    assert placed(Staging([tmp_path / "lib"]), path) == {
        "job.sh": path.read_bytes(),
        "lib/helper": b"near",
        "lib/linked/deep/data": b"far",
    }


def test_two_files_of_one_name(tmp_path: Path) -> None:
    """Files that would lie in one place are refused early."""
    with pytest.raises(ValueError, match="one file beside"):
        Staging([tmp_path / "a" / "data", tmp_path / "b" / "data"])
    Staging([tmp_path / "a" / "data", tmp_path / "a" / "data"])


def test_file_of_a_script_s_name(tmp_path: Path) -> None:
    """A file doesn't take the place of the script; the script itself may be among the files."""
    path = script(tmp_path / "job.sh", "echo mine")
    (tmp_path / "lib").mkdir()
    other = script(tmp_path / "lib" / "job.sh", "echo other")
    with pytest.raises(FileExistsError, match="is taken by"):
        Staging([other]).pin(ht.SlurmJob(path))
    staging = Staging([path])
    pinned = staging.pin(ht.SlurmJob(path))
    path.write_text("echo changed")
    assert pinned is not None
    assert list(staging.place(pinned, "/root")[1].values()) == [pinned.content]


def test_pipe_among_files(tmp_path: Path) -> None:
    """What isn't a file is refused, and not waited for."""
    os.mkfifo(tmp_path / "pipe")
    path = script(tmp_path / "job.sh", "echo")
    with pytest.raises(OSError, match="regular file"):
        placed(Staging([tmp_path / "pipe"]), path)
