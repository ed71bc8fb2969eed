"""An array as files: its script, its calls, and the users' own scripts that it runs."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._host.threads import in_thread
from ..._model.errors import SubmitError, TransportError
from ..._model.jobs import FunctionRef, ScriptRef
from ..._wire import spool
from . import shell
from .staging import Pinned, Staging

if TYPE_CHECKING:
    from ..._model.jobs import SlurmJob
    from ..._model.slurm import Slurm
    from ..._transports.protocol import Content
    from ..calls import Call, ScriptCall
    from .cluster import Cluster
    from .elements import Element, Submission

_SCRIPTS = "scripts"


class Packer:
    """Puts what arrays need where their nodes find it.

    Args:
        slurm: How to use the cluster.
        cluster: The cluster.
    """

    def __init__(self, slurm: Slurm, cluster: Cluster) -> None:
        self._slurm = slurm
        self._cluster = cluster
        # What lies here doesn't lie there.
        self._staging = Staging(slurm.files) if slurm.host is not None else None

    def pin(self, job: SlurmJob[Any] | Any) -> Pinned | None:
        """Fixes what a job's script holds, if it will have to be put there.

        Raises:
            OSError: It can't be read.
        """
        return self._staging.pin(job) if self._staging is not None else None

    async def put(self, submission: Submission) -> None:
        """Puts there what an array needs.

        Raises:
            SubmitError: It can't be made into files.
            TransportError: The files can't be read here, or written there.
        """
        try:
            files = await in_thread(self._pack, submission)
        except OSError as error:
            raise TransportError(f"can't read {error.filename}: {error.strerror}") from error
        except (TypeError, ValueError) as error:
            raise SubmitError(f"can't be made into files: {error}") from error
        await self._cluster.through(lambda: self._cluster.put(files))
        await self._let_run(submission, files)

    async def _let_run(self, submission: Submission, files: dict[str, Content]) -> None:
        """The files are there: marks programs among the scripts as such."""
        if self._staging is None:
            return
        names = {
            os.path.basename(e.pinned.path)
            for e in submission.elements
            if e.pinned and e.pinned.runs
        }
        root = f"{self._cluster.directory}/{_SCRIPTS}"
        paths = [p for p in files if p.startswith(f"{root}/") and os.path.basename(p) in names]
        if paths:
            command = f"chmod 700 {shlex.join(paths)}"
            await self._cluster.through(lambda: self._cluster.shell(command))
        self._staging.placed(files, root)

    def _place(self, submission: Submission, files: dict[str, Content]) -> dict[Element, str]:
        """Where the elements' scripts lie there; adds to `files` those that have to be put there."""
        places: dict[Pinned, str] = {}
        for element in submission.elements:
            if self._staging is not None and element.pinned and element.pinned not in places:
                root = f"{self._cluster.directory}/{_SCRIPTS}"
                places[element.pinned], needed = self._staging.place(element.pinned, root)
                files |= needed
        return {e: places[e.pinned] for e in submission.elements if e.pinned is not None}

    def _pack(self, submission: Submission) -> dict[str, Content]:
        """What an array needs. Runs in a thread."""
        directory = submission.directory
        files: dict[str, Content] = {}
        scripts = self._place(submission, files)
        elements = [self._text_element(e, scripts.get(e)) for e in submission.elements]
        script, table = shell.batch_script(directory, self._slurm.setup, elements)
        files[f"{directory}/script"] = os.fsencode(script)
        if table is not None:
            files[f"{directory}/{shell.TABLE}"] = os.fsencode(table)
        callables = [element for element in submission.elements if not element.is_script]
        if callables:
            names: dict[str, str] = {}
            packed = [_packed(self._function(e, scripts), e.entry.call, names) for e in callables]
            files[f"{directory}/{spool.CALLS}"] = spool.pack(
                packed, self._surroundings(callables[0].entry.call.cwd)
            )
            files.update((f"{directory}/{name}", Path(path)) for path, name in names.items())
        return files

    def _function(self, element: Element, scripts: dict[Element, str]) -> bytes:
        call: Call = element.entry.call
        if self._staging is None or element not in scripts:
            return call.function
        target = element.entry.job.target
        assert isinstance(target, FunctionRef)
        return self._staging.named(target, scripts[element])

    def _surroundings(self, cwd: str | None) -> dict[str, Any]:
        here = self._cluster.host is None
        path = [os.path.normpath(os.path.join(cwd or "/", entry)) for entry in sys.path if here]
        return {"python": list(sys.version_info[:2]), "sys_path": path}

    def _text_element(self, element: Element, script: str | None = None) -> shell.Element:
        entry = element.entry
        job = entry.job
        if element.is_script:
            call: ScriptCall = entry.call
            words = call.words if script is None else self._staged_words(job, call, script)
            command: shell.Callable | shell.Script = shell.Script(
                words, call.output_words, call.output
            )
        else:
            command = shell.Callable(self._python(job), f"{self._cluster.directory}/node")
        cwd = os.fspath(job.cwd) if job.cwd is not None else None
        if cwd is None and self._cluster.host is None:
            cwd = entry.call.cwd
        env = tuple((job.env or {}).items())
        return shell.Element(command, cwd, job.cwd is not None, env, entry.timeout)

    def _staged_words(
        self, job: SlurmJob[Any] | Any, call: ScriptCall, script: str
    ) -> tuple[str, ...]:
        """A script's command line, with the place that it was put to, and a Python of the cluster."""
        assert isinstance(job.target, ScriptRef)
        binary = job.target.binary
        rest = call.words[len(binary) + 1 :]
        if script.endswith(".py") and "binary" not in (job.meta or {}):
            binary = self._python(job)
        return (*binary, script, *rest)

    def _python(self, job: SlurmJob[Any] | Any) -> tuple[str, ...]:
        named = (job.meta or {}).get("binary") or self._slurm.python
        if named is None:
            return (sys.executable if self._cluster.host is None else "python3",)
        return (named,) if isinstance(named, str) else tuple(map(os.fspath, named))


def _packed(function: bytes, call: Call, names: dict[str, str]) -> spool.Packed:
    """A call with its files under names in the submission's directory, each file once."""

    def name(path: str) -> str:
        return names.setdefault(path, f"part.{len(names)}")

    payload = call.payload
    return spool.Packed(
        function,
        payload if isinstance(payload, bytes) else name(payload.path),
        tuple(map(name, call.function_files)),
        tuple(map(name, call.files)),
    )
