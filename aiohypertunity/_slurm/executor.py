"""Submits, watches, cancels: the one place where Slurm is met.

Jobs wait in a queue of ours until those that came at about the same time can go as one array. From
then on each is an `_Element`, which gathers evidence: names that its batch shell leaves in the spool, what
squeue says, what the accounting says. The rules in `verdict` say what it means.

Five loops share that state, all on the event loop's thread: one submits, one reads names, one looks at
the cluster, one cancels, one judges. A sixth reads what ended elements left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shlex
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from .. import _failures
from .._errors import HypertunityError, SubmitError, TransportError
from .._jobs import FunctionRef, ScriptRef
from .._results import Outcome, Status
from .._scripts import parse_result
from .._threads import in_thread
from .._transports import Done, Lines, LinkLost, Transport, Wanted, transport_to
from . import report, spool, text
from .nodecode import node_code
from .staging import Pinned, Staging
from .verdict import Facts, Fate, judge, needs_word
from .watcher import Budget, Mood, next_look

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from .._calls import Call, ScriptCall
    from .._events import Event
    from .._jobs import SlurmJob
    from .._ledger import Entry, Owner
    from .._transports import Content
    from . import Slurm

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

_LOG = logging.getLogger("aiohypertunity.slurm")

_SETTLE = 0.02
"""Jobs that are dispatched within so many seconds go together."""

_SETTLE_AT_MOST = 0.5
"""But a stream of them that doesn't end is cut."""

_AT_MOST = 1000
"""Elements of an array, and so files of one kind in a directory."""

_TAIL = 65_536
_BREATH = 0.1
"""Seconds before what the link broke is begun anew."""

_PATIENCE = 30.0
"""Seconds that squeue, sacct and scancel may take."""

_LEASE = 15.0
"""Seconds between signs of life to the watcher, which leaves after a minute without."""


class _Element:
    """One attempt at an entry, and the evidence on it."""

    __slots__ = (
        "account",
        "account_asked",
        "array",
        "attempts_before",
        "bad_result",
        "bad_tries",
        "cancelled_at",
        "claimed_at",
        "claims",
        "done",
        "end",
        "end_at",
        "entry",
        "expired",
        "group",
        "host",
        "index",
        "missing_since",
        "n_missing",
        "pinned",
        "queued_at",
        "reading",
        "reason",
        "result",
        "seen",
        "seen_at",
        "siblings",
        "started_at",
        "starts",
        "state_since",
        "stopping",
        "submission",
    )  # fmt: skip

    def __init__(self, entry: Entry, group: tuple[bool, tuple[str, ...]], now: float) -> None:
        self.entry = entry
        self.group = group
        self.attempts_before = entry.attempt
        self.queued_at = now
        self.submission: _Submission | None = None
        self.index = -1
        self.pinned: Pinned | None = None
        # The one that claimed it, should it have been submitted twice.
        self.array: str | None = None
        self.claims: set[int] = set()
        self.starts: set[int] = set()
        self.claimed_at = -1.0
        self.started_at: float | None = None
        self.end: text.Sign | None = None
        self.end_at = 0.0
        self.result: int | None = None
        self.bad_result: str | None = None
        self.bad_tries = 0
        self.seen: text.Seen | None = None
        self.seen_at = -1.0
        self.state_since = -1.0
        self.missing_since: float | None = None
        self.n_missing = 0
        self.siblings = False
        self.account: text.Accounted | None = None
        self.account_asked = False
        self.cancelled_at: float | None = None
        self.stopping = False
        self.expired = False
        self.reading = False
        self.done = False
        self.reason = ""
        self.host = ""

    @property
    def is_script(self) -> bool:
        return isinstance(self.entry.job.target, ScriptRef)

    @property
    def key(self) -> tuple[str, int] | None:
        """The array and the index under which Slurm knows it; None before it does."""
        if self.submission is None or self.submission.array is None:
            return None
        return self.array or self.submission.array, self.index

    @property
    def slurm_id(self) -> str | None:
        key = self.key
        return None if key is None else text.element_id(*key)

    def facts(self, *, accounting: bool) -> Facts:
        """The evidence, less what belongs to a start before the last."""
        last = max(self.claims, default=-1)
        end = self.end if self.end is not None and self.end.restart >= last else None
        fresh = self.seen is not None and self.seen_at > self.claimed_at
        return Facts(
            is_script=self.is_script,
            result=self.result is not None,
            bad_result=self.bad_result,
            n_claims=len(self.claims),
            end=end,
            end_at=self.end_at,
            state=self.seen.state if self.seen is not None and fresh else "",
            state_at=self.seen_at if fresh else -1.0,
            state_since=self.state_since,
            missing_since=self.missing_since,
            n_missing=self.n_missing,
            siblings=self.siblings,
            account=self.account,
            account_open=accounting and not self.account_asked,
            cancelled_at=self.cancelled_at,
        )

    def saw(self, seen: text.Seen, at: float) -> None:
        """A squeue that began at `at` lists it."""
        if self.seen is None or self.seen.state != seen.state or self.seen_at <= self.claimed_at:
            self.state_since = at
        self.seen, self.seen_at = seen, at
        self.missing_since, self.n_missing = None, 0
        self.host = seen.node or self.host

    def missed(self, at: float, *, siblings: bool) -> None:
        """A squeue that began at `at` doesn't list it."""
        if self.missing_since is None:
            self.missing_since = at
        self.n_missing += 1
        self.siblings = siblings


class _Submission:
    """An array: its directory, its elements, its id once it has one."""

    def __init__(self, number: int, run: str, directory: str, elements: list[_Element]) -> None:
        self.name = f"s{number}"
        self.token = f"{run}.{number}"
        self.directory = f"{directory}/{self.name}"
        self.elements = elements
        self.n_left = len(elements)
        self.array: str | None = None
        self.submitted_at = 0.0
        self.epoch = 0.0
        self.names: frozenset[str] = frozenset()
        self.garbage: list[str] = []
        self.kept = False
        for index, element in enumerate(elements):
            element.submission = self
            element.index = index


class SlurmExecutor:
    """Runs entries as Slurm jobs.

    Args:
        slurm: The cluster, and how to use it.
        owner: To whom to report.
        emit: Takes events of the link.
    """

    def __init__(self, slurm: Slurm, owner: Owner, *, emit: Callable[[Event], None]) -> None:
        self._slurm = slurm
        self._owner = owner
        self._transport: Transport = transport_to(slurm, emit)
        # What lies here doesn't lie there.
        self._staging = Staging(slurm.files) if slurm.host is not None else None
        self._loop = asyncio.get_running_loop()
        self._link_lost_at: float | None = None
        self._paused = 0.0
        self._run = f"ht-{secrets.token_hex(6)}"
        self._directory = ""
        self._site = text.Site()
        self._limit = slurm.max_in_flight
        self._longest_array = self._site.max_array
        self._main: asyncio.Task[None] | None = None
        self._queue: list[_Element] = []
        self._plain_options = text.sbatch_options(slurm.options or {}, {}, {})
        self._submitting: list[_Element] = []
        self._submissions: dict[str, _Submission] = {}
        self._n_submissions = 0
        self._n_in_flight = 0
        self._suspects: set[_Element] = set()
        self._endings: list[tuple[_Element, Fate]] = []
        self._cancels: dict[_Element, None] = {}
        self._twins: set[tuple[str, int]] = set()
        self._queued = asyncio.Event()
        self._active = asyncio.Event()
        self._suspected = asyncio.Event()
        self._ended = asyncio.Event()
        self._cancelling = asyncio.Event()
        self._look_now = asyncio.Event()
        self._budget = Budget()
        self._mood = Mood(None, self._now())
        self._accounting_from = 0.0
        self._watching: anyio.CancelScope | None = None

    def start(self, entry: Entry) -> None:
        """Queues it, to be submitted with those that come at about the same time."""
        element = _Element(entry, self._group_of(entry.job), self._now())
        entry.place = element
        try:
            element.pinned = self._staging.pin(entry.job) if self._staging is not None else None
        except OSError as error:
            words = f"can't read {error.filename}: {error.strerror}"
            self._loop.call_soon(self._finish, element, report.refused(TransportError(words)))
            return
        self._queue.append(element)
        self._queued.set()
        if entry.job.queue_timeout is not None:  # type: ignore[attr-defined]  # it's a SlurmJob
            self._suspect(element)
        if self._main is None or self._main.done():
            self._main = self._loop.create_task(self._live())

    def stop(self, entry: Entry) -> None:
        """Cancels it, at once or as soon as its id is known."""
        element: _Element | None = entry.place
        if element is None or element.done or element.stopping:
            return
        element.stopping = True
        self._loop.call_later(_GONE_WITHIN + self._site.kill_wait, self._let_go_of, element)
        if element.submission is None and element in self._queue:
            self._queue.remove(element)
            self._loop.call_soon(self._finish_unstarted, element)
        else:
            self._cancel(element)

    def check_stop(self, entry: Entry) -> None:
        """Any can be stopped."""

    async def aclose(self) -> None:
        """Removes the spool and lets go of the link."""
        if self._main is not None:
            self._main.cancel()
            await asyncio.wait([self._main])
        with anyio.CancelScope(shield=True):
            with (
                anyio.move_on_after(_PATIENCE),
                contextlib.suppress(HypertunityError, TimeoutError),
            ):
                if self._main is not None:
                    await self._clean_up()
            await self._transport.aclose()

    async def _clean_up(self) -> None:
        left = [e for s in self._submissions.values() for e in s.elements if not e.done]
        keys = {key for e in left if (key := e.key) is not None} | self._twins
        if keys:
            await self._command(text.cancel_command(keys))
        if not self._directory:
            # It may have been cancelled in the middle of being made.
            command = f"cd {self._workdir()} 2>/dev/null && rm -rf {self._run} || :"
            await self._transport.run(command, timeout=_PATIENCE)
            return
        kept = [s for s in self._submissions.values() if s.kept]
        if kept:
            await self._flush_garbage()
            command = f"rm -rf {shlex.quote(self._directory)}/node"
        else:
            command = _remove_tree(self._directory)
        await self._transport.run(command, timeout=_PATIENCE)

    # The life of the loops.

    async def _live(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                for loop in (
                    self._submit_forever,
                    self._watch_forever,
                    self._look_forever,
                    self._cancel_forever,
                    self._judge_forever,
                    self._read_forever,
                ):
                    group.start_soon(loop)
        except* TransportError as errors:
            # The host doesn't let us in any more, say. The next job may try it again.
            self._fail_all(_first(errors))
        except* Exception as errors:
            # A fault of ours must not leave anybody waiting.
            _LOG.exception("the Slurm executor has failed")
            self._fail_all(TransportError(f"the Slurm executor has failed: {_first(errors)!r}"))

    def _fail_all(self, error: TransportError) -> None:
        everywhere = [e for s in self._submissions.values() for e in s.elements]
        for element in {*self._queue, *self._submitting, *everywhere}:
            if not element.done:
                self._finish(element, report.refused(error))
        self._queue.clear()

    def _now(self) -> float:
        """A clock that stands still while the link is down: no job is blamed for that time."""
        stands = self._link_lost_at
        return (self._loop.time() if stands is None else stands) - self._paused

    async def _through(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Does what may be done twice, as often as the link fails under it."""
        while True:
            try:
                result = await operation()
            except LinkLost as error:
                self._link_down(error)
                # How long to wait for a link is for the transport to know.
                await asyncio.sleep(_BREATH)
            except TimeoutError as error:
                _LOG.warning("%s is slow, and is asked again: %s", self._transport.host, error)
            else:
                self._link_up()
                return result

    def _link_down(self, error: LinkLost) -> None:
        if self._link_lost_at is None:
            self._link_lost_at = self._loop.time()
        limit = self._slurm.give_up_after
        if limit is not None and self._loop.time() - self._link_lost_at > limit:
            words = (
                f"the link to {self._transport.host} was down for more than {limit:g} s: {error}"
            )
            self._fail_all(TransportError(words))

    def _link_up(self) -> None:
        if self._link_lost_at is not None:
            self._paused += self._loop.time() - self._link_lost_at
            self._link_lost_at = None

    async def _command(self, command: str, *, stdin: str = "", timeout: float = _PATIENCE) -> Done:
        """Runs a command of Slurm's, after the lines that make it available."""
        if self._slurm.setup:
            lines = ("{", *self._slurm.setup, "} >/dev/null", command)
            command = shlex.join(("bash", "-c", "\n".join(lines)))
        return await self._transport.run(command, stdin=stdin, timeout=timeout)

    # Submitting.

    async def _submit_forever(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            await self._settle()
            try:
                await self._prepare()
                while group := self._next_group():
                    await self._submit(group)
                    self._submitting = []
            except (SubmitError, TransportError) as error:
                # The disk, or the shell; the link's own trouble is waited out.
                self._refuse([*self._submitting, *self._queue], error)
                self._queue.clear()

    async def _settle(self) -> None:
        latest = self._loop.time() + _SETTLE_AT_MOST
        n_queued = -1
        while n_queued != len(self._queue) and self._loop.time() < latest:
            n_queued = len(self._queue)
            await asyncio.sleep(_SETTLE)

    def _next_group(self) -> list[_Element]:
        """Those next in the queue that can be one array, as far as there is room for them."""
        room = len(self._queue)
        limit = self._limit
        if limit is not None:
            room = limit - self._n_in_flight
            # In chunks: one for one would be a submission for each job that ends.
            if room < min(len(self._queue), max(1, limit // 4)):
                return []
        if not self._queue or room <= 0:
            return []
        key = self._queue[0].group
        group: list[_Element] = []
        rest: list[_Element] = []
        most = min(room, _AT_MOST, self._longest_array)
        for element in self._queue:
            fits = len(group) < most and element.group == key
            (group if fits else rest).append(element)
        self._queue = rest
        self._submitting = group
        return group

    def _group_of(self, job: SlurmJob[Any] | Any) -> tuple[bool, tuple[str, ...]]:
        """What jobs of one array have in common: whether they are scripts, and their options."""
        meta = job.meta or {}
        asked = meta.get("options", {}), meta.get("resources", {})
        options = self._plain_options
        if any(asked):
            options = text.sbatch_options(self._slurm.options or {}, *asked)
        return isinstance(job.target, ScriptRef), options

    async def _prepare(self) -> None:
        """Makes the directory of the run and learns about the site, once."""
        if self._directory:
            return
        command = _PREPARE.format(workdir=self._workdir(), run=self._run, site=text.SITE_COMMAND)
        done = await self._through(lambda: self._command(command))
        found = done.stdout.partition(_SPOOL_MARK)[2].partition("\n")[0]
        if not found:
            words = text.last_words(done.stderr)
            raise TransportError(
                f"the work directory {self._slurm.workdir or '~/.aiohypertunity'} can't be used: {words}; "
                "name another by Slurm(workdir=...) that the nodes see too"
            )
        hopeless = text.hopeless(done.stderr)
        if hopeless is not None:
            with contextlib.suppress(TransportError):
                await self._transport.run(_remove_tree(found), timeout=_PATIENCE)
            raise SubmitError(f"Slurm can't be used here: {hopeless}")
        self._site = text.parse_site(done.stdout)
        self._longest_array = self._site.max_array
        files = await in_thread(node_code)
        placed = {f"{found}/node/{name}": content for name, content in files.items()}
        await self._through(lambda: self._transport.put(placed))
        self._directory = found

    def _workdir(self) -> str:
        """The work directory, as a word for the shell there."""
        path = (
            "~/.aiohypertunity" if self._slurm.workdir is None else os.fspath(self._slurm.workdir)
        )
        if self._transport.host is None:
            path = os.path.abspath(os.path.expanduser(path))
        home, _, rest = path.partition("/")
        return f'"$HOME"/{shlex.quote(rest)}' if home == "~" else shlex.quote(path)

    async def _submit(self, group: list[_Element]) -> None:
        self._n_submissions += 1
        submission = _Submission(self._n_submissions, self._run, self._directory, group)
        self._n_in_flight += len(group)
        self._submissions[submission.name] = submission
        try:
            script = await self._put(submission)
        except TransportError:
            self._forget(submission)
            # What is there of it may be what fills the disk.
            with contextlib.suppress(TransportError, TimeoutError):
                command = _remove_tree(submission.directory)
                await self._transport.run(command, timeout=_PATIENCE)
            raise
        # From here on it is watched: a job may run before sbatch has said that there is one.
        self._active.set()
        array = await self._sbatch(submission, script)
        if array is not None:
            self._submitted(submission, array)

    async def _put(self, submission: _Submission) -> str:
        """Puts there what an array needs; gives its script."""
        try:
            script, files = await in_thread(self._pack, submission)
        except OSError as error:
            raise TransportError(f"can't read {error.filename}: {error.strerror}") from error
        await self._through(lambda: self._transport.put(files))
        await self._let_run(submission, files)
        return script

    async def _let_run(self, submission: _Submission, files: dict[str, Content]) -> None:
        """The files are there: marks programs among the scripts as such."""
        if self._staging is None:
            return
        names = {
            os.path.basename(e.pinned.path)
            for e in submission.elements
            if e.pinned and e.pinned.runs
        }
        root = f"{self._directory}/{_SCRIPTS}"
        paths = [p for p in files if p.startswith(f"{root}/") and os.path.basename(p) in names]
        if paths:
            command = f"chmod 700 {shlex.join(paths)}"
            await self._through(lambda: self._transport.run(command, timeout=_PATIENCE))
        self._staging.placed(files, root)

    def _place(self, submission: _Submission, files: dict[str, Content]) -> dict[_Element, str]:
        """Where the elements' scripts lie there; adds to `files` those that have to be put there."""
        places: dict[Pinned, str] = {}
        for element in submission.elements:
            if self._staging is not None and element.pinned and element.pinned not in places:
                root = f"{self._directory}/{_SCRIPTS}"
                places[element.pinned], needed = self._staging.place(element.pinned, root)
                files |= needed
        return {e: places[e.pinned] for e in submission.elements if e.pinned is not None}

    def _pack(self, submission: _Submission) -> tuple[str, dict[str, Content]]:
        """The script of an array, and the files it needs. Runs in a thread."""
        directory = submission.directory
        files: dict[str, Content] = {}
        scripts = self._place(submission, files)
        elements = [self._text_element(e, scripts.get(e)) for e in submission.elements]
        script, table = text.batch_script(directory, self._slurm.setup, elements)
        # Nobody reads it there; but sbatch's own copy is hard to come by when one wants to see it.
        files[f"{directory}/script"] = script.encode()
        if table is not None:
            files[f"{directory}/{text.TABLE}"] = table.encode()
        callables = [element for element in submission.elements if not element.is_script]
        if callables:
            names: dict[str, str] = {}
            packed = [_packed(self._function(e, scripts), e.entry.call, names) for e in callables]
            files[f"{directory}/{spool.CALLS}"] = spool.pack(packed, self._surroundings())
            files.update((f"{directory}/{name}", Path(path)) for path, name in names.items())
        return script, files

    def _function(self, element: _Element, scripts: dict[_Element, str]) -> bytes:
        call: Call = element.entry.call
        if self._staging is None or element not in scripts:
            return call.function
        target = element.entry.job.target
        assert isinstance(target, FunctionRef)
        return self._staging.named(target, scripts[element])

    def _surroundings(self) -> dict[str, Any]:
        here = self._transport.host is None
        path = [os.path.abspath(entry) for entry in sys.path] if here else []
        return {"python": list(sys.version_info[:2]), "sys_path": path}

    def _text_element(self, element: _Element, script: str | None = None) -> text.Element:
        entry = element.entry
        job = entry.job
        if element.is_script:
            call: ScriptCall = entry.call
            words = call.words if script is None else self._staged_words(job, call, script)
            command: text.Callable | text.Script = text.Script(
                words, call.output_words, call.output
            )
        else:
            command = text.Callable(self._python(job), f"{self._directory}/node")
        cwd = os.fspath(job.cwd) if job.cwd is not None else None
        if cwd is None and self._transport.host is None:
            cwd = os.getcwd()
        env = tuple((job.env or {}).items())
        return text.Element(command, cwd, job.cwd is not None, env, entry.timeout)

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
            return (sys.executable if self._transport.host is None else "python3",)
        return (named,) if isinstance(named, str) else tuple(map(os.fspath, named))

    async def _sbatch(self, submission: _Submission, script: str) -> str | None:
        """Submits, exactly once; None if nothing came of it, and that has been reported.

        Whatever sbatch says when it doesn't give an id, the jobs may be queued: so they are looked
        for by their token before anything is submitted again.
        """
        command = text.submit_command(
            submission.elements[0].group[1],
            directory=submission.directory,
            run=self._run,
            submission=submission.token,
            n_elements=len(submission.elements),
        )
        for n_tries in range(1, sys.maxsize):
            array, words, refusal = await self._sbatch_once(command, script)
            if array is None:
                array = await self._look_up(submission, wait=refusal in {"busy", "again"})
            if array is not None or submission.array is not None:
                return array
            if refusal == "never" or (refusal == "again" and n_tries >= _TRIES):
                self._refuse(submission.elements, SubmitError(f"sbatch refused it: {words}"))
                return None
            live = [e for e in submission.elements if not e.stopping and not e.done]
            if not live:
                self._abandon(submission)
                return None
            _LOG.warning("sbatch failed and will be tried again: %s", words)
            self._say_pending(live, words)
            if refusal == "limit" and self._make_smaller(submission):
                return None
            await asyncio.sleep(min(2.0**n_tries, 30))
        return None

    async def _sbatch_once(self, command: str, script: str) -> tuple[str | None, str, str]:
        """The array's id if sbatch gave one; else its words, and what is to be made of them."""
        self._budget.spend(1, self._now())
        patience = 2 * self._site.message_timeout + 5
        try:
            done = await self._command(command, stdin=script, timeout=patience)
        except TimeoutError:
            return None, f"it gave no answer within {patience:g} s", "busy"
        except LinkLost as error:
            self._link_down(error)
            return None, str(error), "busy"
        words = text.last_words(done.stderr or done.stdout)
        if done.exit_status == 0:
            return text.parse_submitted(done.stdout), words, "again"
        return None, words, text.refusal(words)

    async def _look_up(self, submission: _Submission, *, wait: bool) -> str | None:
        """The id of an array that may have been queued; it may take a message's time to appear."""
        for pause in (0.0, self._site.message_timeout) if wait else (0.0,):
            await asyncio.sleep(pause)
            found = None
            while found is None:
                if submission.array is not None:  # its jobs have spoken in the spool
                    return None
                found = await self._squeue()
                if found is None:
                    await asyncio.sleep(1)
            for (array, _), seen in found.items():
                if seen.submission == submission.token:
                    return array
        return None

    def _make_smaller(self, submission: _Submission) -> bool:
        """Slurm holds as many of our jobs as it will: finds out how many, and puts these back.

        Halves the arrays until one fits; when not even a single job does, what is there is the limit.
        """
        others = self._n_in_flight - len(submission.elements)
        if len(submission.elements) > 1:
            self._longest_array = len(submission.elements) // 2
        elif others > 0:
            self._limit = others
            self._longest_array = self._site.max_array
        else:
            return False
        self._abandon(submission, requeue=True)
        return True

    def _abandon(self, submission: _Submission, *, requeue: bool = False) -> None:
        """The array wasn't submitted and won't be; its elements are over, or wait again."""
        self._n_in_flight -= len(submission.elements)
        self._forget(submission)
        again = []
        for element in submission.elements:
            element.submission = None
            if not element.done and element.stopping:
                self._finish_unstarted(element)
            elif not element.done:
                again.append(element)
        if requeue:
            self._queue[:0] = again
            self._queued.set()

    def _forget(self, submission: _Submission) -> None:
        """Nothing will come of it; its directory goes with the run's."""
        self._submissions.pop(submission.name, None)

    def _refuse(self, elements: Iterable[_Element], error: SubmitError | TransportError) -> None:
        for element in list(elements):
            if element.done:
                continue
            if element.submission is not None:
                self._forget(element.submission)
                self._n_in_flight -= 1
                element.submission = None
            if element.stopping:
                self._finish_unstarted(element)
            else:
                self._finish(element, report.refused(error))

    def _finish_unstarted(self, element: _Element) -> None:
        if not element.done:
            error = _failures.cancelled(element.entry.job, started=False)
            self._finish(element, Outcome(Status.CANCELLED, error=error))

    def _say_pending(self, elements: Iterable[_Element], reason: str) -> None:
        for element in elements:
            if element.reason != reason:
                element.reason = reason
                self._owner.pending(element.entry, reason, slurm_id=element.slurm_id)

    def _submitted(self, submission: _Submission, array: str) -> None:
        if submission.array is not None:
            return
        submission.array = array
        submission.submitted_at = self._now()
        submission.epoch = time.time()
        self._changed()
        self._look_now.set()
        for element in submission.elements:
            element.reason = ""
            if not element.done:
                self._owner.pending(element.entry, None, slurm_id=element.slurm_id)
            if element.stopping or element.expired:
                self._cancel(element)

    # Names in the spool.

    async def _watch_forever(self) -> None:
        pause = _BREATH
        while True:
            await self._active.wait()
            began = self._loop.time()
            with anyio.CancelScope() as self._watching:
                try:
                    await self._watch()
                    self._link_up()
                except LinkLost as error:
                    self._link_down(error)
                    began = -1e9
            pause = _BREATH if self._loop.time() - began > 5 else min(2 * pause, 10)
            await asyncio.sleep(pause)

    async def _watch(self) -> None:
        # A watcher that is new lists everything, so nothing is lost with one that died.
        async with self._transport.watch(text.watcher(self._directory)) as lines:
            lease = self._loop.create_task(_renew(lines))
            try:
                async for line in lines:
                    self._link_up()
                    name, _, names = line.partition(" ")
                    submission = self._submissions.get(name)
                    if submission is not None:
                        self._take_names(submission, names)
            finally:
                lease.cancel()

    def _take_names(self, submission: _Submission, line: str) -> None:
        names = frozenset(line.split())
        signs = [sign for name in names - submission.names if (sign := text.parse_sign(name))]
        submission.names = names
        for sign in sorted(signs, key=lambda sign: _ORDER[sign.kind]):
            if sign.element < len(submission.elements):  # else it's somebody else's file
                element = submission.elements[sign.element]
                if not element.done:
                    self._take_sign(element, sign)

    def _take_sign(self, element: _Element, sign: text.Sign) -> None:
        now = self._now()
        self._changed()
        if sign.array:
            element.array = sign.array
            assert element.submission is not None
            self._submitted(element.submission, sign.array)
        element.host = sign.node or element.host
        if sign.restart not in element.claims:
            self._claimed(element, sign.restart, now)
        if sign.kind != "run" and sign.restart not in element.starts:
            self._started(element, sign)
        if sign.kind == "result":
            if element.result is None:
                element.result = sign.restart
        elif sign.kind == "end" and (element.end is None or element.end.restart <= sign.restart):
            element.end, element.end_at = sign, now
        if sign.kind in {"result", "end"}:
            self._suspect(element)

    def _claimed(self, element: _Element, restart: int, now: float) -> None:
        if restart > max(element.claims, default=-1):
            element.claimed_at = now
            element.missing_since, element.n_missing = None, 0
            element.started_at = time.time()
            element.reason = ""
        element.claims.add(restart)

    def _started(self, element: _Element, sign: text.Sign) -> None:
        element.starts.add(sign.restart)
        # Counted by starts, not by Slurm's number: it may count one that never got as far as the shell.
        self._owner.started(
            element.entry,
            element.started_at or time.time(),
            slurm_id=element.slurm_id,
            node=element.host or None,
            attempt=element.attempts_before + len(element.starts),
        )

    # Looks at the cluster.

    async def _look_forever(self) -> None:
        last = -1e9
        durations: deque[float] = deque(maxlen=5)
        while True:
            await self._active.wait()
            await self._until_look(last)
            last = self._now()
            began = self._loop.time()
            found = await self._squeue()
            # The quickest of the last ones: what else slows one down is no load on Slurm.
            durations.append(self._loop.time() - began)
            self._mood = self._mood._replace(duration=min(durations))
            if found is None:
                self._mood = self._mood._replace(n_failed=self._mood.n_failed + 1)
                continue
            self._mood = self._mood._replace(n_failed=0)
            await self._take_look(found, last)
            await self._ask_accounts()

    async def _until_look(self, last: float) -> None:
        while True:
            now = self._now()
            at = next_look(self._mood, last, now)
            if self._transport.host is not None and self._mood.urgent_since is None:
                at += at - last  # across a link each look is nine messages
            at = max(at, self._budget.ready(2, now))
            if at <= now:
                return
            self._look_now.clear()
            with anyio.move_on_after(at - now):
                await self._look_now.wait()

    async def _squeue(self) -> dict[tuple[str, int], text.Seen] | None:
        """What squeue says of our jobs; None if it says nothing, for whatever reason."""
        self._budget.spend(2, self._now())
        try:
            done = await self._command(text.look_command(self._run))
        except LinkLost as error:
            self._link_down(error)
            return None
        except (TimeoutError, TransportError):
            return None
        self._link_up()
        if done.exit_status != 0:
            return None
        return await in_thread(text.parse_look, done.stdout)

    async def _take_look(self, found: dict[tuple[str, int], text.Seen], began: float) -> None:
        listed = {array for array, _ in found}
        for submission in tuple(self._submissions.values()):
            if submission.array is None or submission.submitted_at >= began:
                continue
            for element in submission.elements:
                key = element.key
                seen = None if key is None else found.get(key)
                if seen is not None and seen.submission == submission.token:
                    self._take_seen(element, seen, began)
                elif not element.done:
                    element.missed(began, siblings=key is not None and key[0] in listed)
                    self._suspect(element)
            await asyncio.sleep(0)  # thousands of elements are looked through in steps

    def _take_seen(self, element: _Element, seen: text.Seen, began: float) -> None:
        waits = seen.state in text.WAITING
        if element.done:
            element.saw(seen, began)
            self._cancel_twin(element)
            return
        if element.seen is None or element.seen.state != seen.state:
            self._changed()
        element.saw(seen, began)
        if waits and began > element.claimed_at:
            self._say_pending([element], seen.reason or seen.state)
        if seen.state in text.ENDED:
            self._suspect(element)

    def _cancel_twin(self, element: _Element) -> None:
        """Its result is here, and Slurm would run it again."""
        seen, key = element.seen, element.key
        requeued = seen is not None and seen.state in text.WAITING and bool(element.claims)
        if requeued and element.seen_at > element.claimed_at and key is not None:
            self._twins.add(key)
            self._cancelling.set()

    async def _ask_accounts(self) -> None:
        """Asks the accounting about elements that squeue no longer knows."""
        if not self._has_accounting():
            return
        lost = [e for e in self._suspects if e.missing_since is not None and not e.account_asked]
        lost = [e for e in lost if e.submission is not None and e.submission.array is not None]
        if lost:
            await self._account(lost)
            now = self._now()
            for element in lost:
                known = element.account is not None and element.account.state in text.ENDED
                # It may lag, so it is asked again for a while.
                element.account_asked = known or now > (element.missing_since or now) + _ACCOUNT_LAG

    def _has_accounting(self) -> bool:
        return self._site.accounting and self._loop.time() >= self._accounting_from

    async def _account(self, elements: Sequence[_Element]) -> None:
        submissions = [e.submission for e in elements if e.submission is not None]
        keys = {e: key for e in elements if (key := e.key) is not None}
        arrays = sorted({array for array, _ in keys.values()})
        age = int(time.time() - min(s.epoch for s in submissions)) + 60
        found: dict[tuple[str, int], text.Accounted] | None = None
        with contextlib.suppress(TimeoutError, TransportError):
            command = text.account_command(arrays, f"now-{age}seconds")
            done = await self._command(command, timeout=_ACCOUNT_PATIENCE)
            if done.exit_status == 0:
                found = await in_thread(text.parse_accounts, done.stdout, self._run)
        if found is None:
            self._accounting_from = self._loop.time() + 60
            return
        for element, key in keys.items():
            element.account = found.get(key, element.account)

    def _changed(self) -> None:
        self._mood = self._mood._replace(changed_at=self._now())

    # Judging.

    def _suspect(self, element: _Element) -> None:
        self._suspects.add(element)
        self._suspected.set()

    async def _judge_forever(self) -> None:
        while True:
            await self._suspected.wait()
            self._suspected.clear()
            urgent = False
            for element in tuple(self._suspects):
                urgent = self._judge(element) or urgent
            self._be_urgent(urgent)
            if self._suspects:
                with anyio.move_on_after(0.1):
                    await self._suspected.wait()
                self._suspected.set()

    def _be_urgent(self, urgent: bool) -> None:
        if not urgent:
            self._mood = self._mood._replace(urgent_since=None)
        elif self._mood.urgent_since is None:
            self._mood = self._mood._replace(urgent_since=self._now())
            self._look_now.set()

    def _judge(self, element: _Element) -> bool:
        """Acts on an element's evidence; says whether Slurm's word is needed."""
        if element.done or element.reading:
            self._suspects.discard(element)
            return False
        now = self._now()
        waits = self._check_turn(element, now)
        if element.submission is None or element.submission.array is None:
            if not waits:
                self._suspects.discard(element)
            return False
        facts = element.facts(accounting=self._has_accounting())
        fate = judge(facts, now)
        if fate is not Fate.WAIT:
            element.reading = True
            self._endings.append((element, fate))
            self._ended.set()
        elif not waits and not needs_word(facts):
            self._suspects.discard(element)
        return fate is Fate.WAIT and needs_word(facts)

    def _check_turn(self, element: _Element, now: float) -> bool:
        """Whether it waits for its turn, and has a limit to it. Over the limit it is cancelled."""
        limit: float | None = getattr(element.entry.job, "queue_timeout", None)
        if limit is None or element.claims or element.stopping:
            return False
        if now < element.queued_at + limit:
            return True
        if element.submission is None and element in self._queue:
            self._queue.remove(element)
            self._finish(element, report.waited_too_long(element.entry.job, element.reason, None))
        elif not element.expired:
            element.expired = True
            self._cancel(element)
        return True

    # Cancelling.

    def _cancel(self, element: _Element) -> None:
        self._cancels[element] = None
        self._cancelling.set()

    async def _cancel_forever(self) -> None:
        while True:
            await self._cancelling.wait()
            await asyncio.sleep(_SETTLE)
            self._cancelling.clear()
            ready = [e for e in self._cancels if e.slurm_id is not None and not e.done]
            self._cancels = {e: None for e in self._cancels if e.slurm_id is None and not e.done}
            twins = set(self._twins)
            late = [e for e in ready if e.expired and not e.stopping]
            now = [e for e in ready if not e.expired or e.stopping]
            if now or twins:
                await self._scancel(now, text.cancel_command(*self._whole(now, twins)))
                # Not before: whoever leaves in the middle of it must know of them.
                self._twins -= twins
            if late:
                # One that has just begun to run had its turn.
                command = text.cancel_command(_keys(late))
                await self._scancel(late, f"{command} --state=PENDING")

    def _whole(
        self, elements: Sequence[_Element], twins: set[tuple[str, int]]
    ) -> tuple[set[tuple[str, int]], set[str]]:
        """The same as single elements and whole arrays, as few words as possible."""
        keys = _keys(elements) | twins
        whole = set()
        for submission in {e.submission for e in elements if e.submission is not None}:
            own = [e.key for e in submission.elements]
            arrays = {key[0] for key in own if key is not None}
            if all(e.done or e.key in keys for e in submission.elements):
                whole |= arrays
        return {key for key in keys if key[0] not in whole}, whole

    async def _scancel(self, elements: Sequence[_Element], command: str) -> None:
        self._budget.spend(1, self._now())
        try:
            done = await self._command(command)
        except (TimeoutError, TransportError):
            accepted = False
        else:
            # It also fails for jobs that are gone, which is as good.
            accepted = done.exit_status == 0 or text.refusal(done.stderr) == "never"
        for element in elements:
            if accepted:
                element.cancelled_at = self._now()
            self._suspect(element)
        # Once more, if they are still there when they should long be gone.
        pause = self._site.kill_wait + 10 if accepted else 2.0
        self._loop.call_later(pause, self._cancel_again, list(elements))

    def _cancel_again(self, elements: list[_Element]) -> None:
        for element in elements:
            if not element.done and (element.stopping or not element.claims):
                self._cancel(element)

    def _let_go_of(self, element: _Element) -> None:
        """Slurm hasn't said that it's gone, and nobody is to wait for ever."""
        if not element.done:
            _LOG.warning("nothing says that Slurm job %s is gone; it was told to", element.slurm_id)
            fate = report.report(element.entry.job, Fate.CANCELLED, _ending(element, None, None))
            self._finish(element, fate)

    # Endings.

    async def _read_forever(self) -> None:
        while True:
            await self._ended.wait()
            self._ended.clear()
            while self._endings:
                batch, self._endings = self._endings[:_BATCH], self._endings[_BATCH:]
                try:
                    await self._read(batch)
                except LinkLost as error:
                    self._link_down(error)
                    self._endings[:0] = [pair for pair in batch if not pair[0].done]
                    await asyncio.sleep(_BREATH)
                except TimeoutError:
                    self._endings += [pair for pair in batch if not pair[0].done]
                await self._flush_garbage()

    async def _read(self, batch: Sequence[tuple[_Element, Fate]]) -> None:
        batch = await self._confirm(batch)
        failed = [e for e, fate in batch if fate not in {Fate.READ, Fate.CANCELLED}]
        if failed and self._has_accounting():
            await self._account(
                [e for e in failed if e.account is None or e.account.max_rss is None]
            )
        wanted = [files for element, fate in batch for files in _wanted(element, fate)]
        contents = iter(await self._transport.get(wanted))
        for element, fate in batch:
            log, end, result = next(contents), next(contents), next(contents)
            await self._conclude(element, fate, log, end, result)

    def _lose(self, elements: Iterable[_Element], why: str) -> None:
        """They are over, and what they left can't be read."""
        for element in elements:
            if not element.done and element.reading:
                ending = _with_loss(_ending(element, None, None), why)
                self._finish(element, report.report(element.entry.job, Fate.LOST, ending))

    async def _confirm(self, batch: Sequence[tuple[_Element, Fate]]) -> list[tuple[_Element, Fate]]:
        """Looks into the spool once more for those whose shell has left no word: the watcher may be stuck."""
        silent = [e for e, fate in batch if fate is not Fate.READ and e.end is None]
        for submission in {e.submission for e in silent if e.submission is not None}:
            command = text.listing(submission.directory)
            done = await self._transport.run(command, timeout=_PATIENCE)
            if done.exit_status == 0:
                self._take_names(submission, done.stdout.strip())
        changed = {e for e in silent if e.result is not None or e.end is not None}
        for element in changed:
            element.reading = False
            self._suspect(element)
        return [(e, fate) for e, fate in batch if e not in changed]

    async def _conclude(
        self,
        element: _Element,
        fate: Fate,
        log: bytes | None,
        end: bytes | None,
        result: bytes | None,
    ) -> None:
        ending = _ending(element, log, end)
        if fate is not Fate.READ:
            if element.expired and fate is Fate.CANCELLED and not element.claims:
                outcome = report.waited_too_long(
                    element.entry.job, element.reason, element.slurm_id
                )
            else:
                outcome = report.report(element.entry.job, fate, ending)
        elif element.is_script:
            outcome = await in_thread(_script_outcome, element, result, ending)
        else:
            try:
                outcome = await self._callable_outcome(element, result)
            except spool.BadFile as error:
                self._distrust(element, str(error))
                return
        outcome.slurm_id = element.slurm_id
        outcome.stdout = ending.log
        if outcome.started_at is None:
            outcome.started_at = element.started_at
        outcome.host = outcome.host or ending.node or None
        self._conclude_files(element, outcome)
        self._finish(element, outcome)

    async def _callable_outcome(self, element: _Element, content: bytes | None) -> Outcome:
        if content is None:
            raise spool.BadFile("it is gone")
        reply = await in_thread(spool.parse_result, content)
        assert element.submission is not None
        files = []
        for name, size in reply.files:
            path = await self._fetch(f"{element.submission.directory}/{name}")
            if not os.path.exists(path) or os.path.getsize(path) != size:
                raise spool.BadFile(f"its part {name} isn't whole")
            files.append(path)
        outcome = await in_thread(
            _failures.from_reply, element.entry.job, reply.kind, reply.blob, files
        )
        facts = reply.facts
        outcome.host, outcome.pid = facts["host"], facts["pid"]
        outcome.started_at, outcome.finished_at = facts["started"], facts["finished"]
        outcome.max_rss = facts["max_rss"]
        outcome.exit_code = 0 if outcome.status is Status.SUCCEEDED else 1
        return outcome

    async def _fetch(self, path: str) -> str:
        try:
            return await self._transport.fetch(path)
        except LinkLost:
            raise
        except TransportError as error:
            raise spool.BadFile(str(error)) from error

    def _distrust(self, element: _Element, why: str) -> None:
        """Its result isn't whole: reads it again, and takes it for lost if that doesn't help."""
        element.reading = False
        element.bad_tries += 1
        if element.bad_tries >= _TRIES:
            element.bad_result, element.result = why, None
        self._suspect(element)

    def _conclude_files(self, element: _Element, outcome: Outcome) -> None:
        submission = element.submission
        assert submission is not None
        if self._slurm.keep == "failed" and outcome.status in _KEPT:
            submission.kept = True
            outcome.log_path = Path(f"{submission.directory}/log.{element.index}")
        else:
            submission.garbage += _names_of(element)

    async def _flush_garbage(self) -> None:
        """Removes what has been read: with its whole directory, where that is over."""
        commands = []
        over = []
        swept: list[tuple[_Submission, int]] = []
        for submission in self._submissions.values():
            directory = shlex.quote(submission.directory)
            if submission.n_left == 0 and not submission.kept:
                commands.append(_remove_tree(submission.directory))
                over.append(submission)
            elif len(submission.garbage) >= _GARBAGE or (
                submission.n_left == 0 and submission.garbage
            ):
                commands.append(f"cd {directory} && rm -f {' '.join(submission.garbage)}")
                swept.append((submission, len(submission.garbage)))
        if commands:
            try:
                await self._transport.run("\n".join(commands), timeout=_PATIENCE)
            except (LinkLost, TimeoutError):
                return  # done with the next, or in the end with the run's directory
        # Not before: whoever is cancelled here leaves it to the next.
        for submission in over:
            self._forget(submission)
        for submission, n_names in swept:
            del submission.garbage[:n_names]
        if all(s.n_left == 0 for s in self._submissions.values()):
            self._active.clear()
            if self._watching is not None:
                self._watching.cancel()

    def _finish(self, element: _Element, outcome: Outcome) -> None:
        element.done = True
        element.entry.place = None
        self._suspects.discard(element)
        submission = element.submission
        if submission is not None:
            self._cancel_twin(element)
            submission.n_left -= 1
            self._n_in_flight -= 1
            if self._queue:
                self._queued.set()
        self._owner.finished(element.entry, outcome)


_ORDER = {"run": 0, "on": 1, "end": 2, "result": 3}
_GONE_WITHIN = 60.0
_KEPT = {Status.FAILED, Status.CRASHED, Status.TIMED_OUT}
_TRIES = 5
_BATCH = 64
_GARBAGE = 256
_ACCOUNT_PATIENCE, _ACCOUNT_LAG = 10.0, 8.0

_SCRIPTS = "scripts"
_SPOOL_MARK = "aiohypertunity-spool:"
_PREPARE = f"""\
umask 077
mkdir -p {{workdir}} && cd {{workdir}} && mkdir -p {{run}} || exit 1
echo "{_SPOOL_MARK}$PWD/{{run}}"
{{site}}
"""


def _first(errors: ExceptionGroup[E]) -> E:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _keys(elements: Iterable[_Element]) -> set[tuple[str, int]]:
    return {key for element in elements if (key := element.key) is not None}


def _remove_tree(path: str) -> str:
    """The command that removes a directory, into which a job that was ended may still write a last word."""
    # On NFS a file that is still open leaves a name behind: that goes with the run's directory.
    return f"for nap in 0.2 0.5 1 0; do rm -rf {shlex.quote(path)} 2>/dev/null && break; sleep $nap; done"


async def _renew(lines: Lines) -> None:
    while True:
        lines.send("")
        await asyncio.sleep(_LEASE)


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


def _output_path(element: _Element) -> str:
    """Where a script's last start was to leave its result."""
    assert element.submission is not None
    call: ScriptCall = element.entry.call
    restart = max(element.claims, default=0)
    return call.output or f"{element.submission.directory}/out.{element.index}.{restart}.pkl"


def _wanted(element: _Element, fate: Fate) -> list[Wanted]:
    """The log, the shell's last word, and the result of an element: just three."""
    assert element.submission is not None
    directory = element.submission.directory
    log = Wanted(f"{directory}/log.{element.index}", last=_TAIL)
    end = Wanted("")
    if element.end is not None:
        sign = element.end
        end = Wanted(
            f"{directory}/{sign.element}.{sign.restart}.end.{sign.array}.{sign.code}.{sign.why}"
        )
    result = Wanted("")
    if fate is Fate.READ and element.is_script:
        result = Wanted(_output_path(element))
    elif fate is Fate.READ:
        result = Wanted(f"{directory}/{element.index}.{element.result}.result")
    return [log, end, result]


def _ending(element: _Element, log: bytes | None, end: bytes | None) -> report.Ending:
    words = (end or b"").decode(errors="replace").split()
    elapsed = None
    if len(words) == 3:
        with contextlib.suppress(ValueError):
            elapsed = float(words[2]) - float(words[1])
    node = words[0] if words and words[0] != "-" else element.host
    return report.Ending(
        slurm_id=element.slurm_id,
        node=node or (element.account.node if element.account else ""),
        state=element.seen.state if element.seen is not None else "",
        reason=element.seen.reason if element.seen is not None else "",
        end=element.end,
        elapsed=elapsed,
        account=element.account,
        log=(log or b"").decode(errors="replace"),
        timeout=element.entry.timeout,
        lost=element.bad_result or "none was found",
        started=bool(element.claims),
        is_script=element.is_script,
    )


def _script_outcome(element: _Element, content: bytes | None, ending: report.Ending) -> Outcome:
    """What a script that exited with code 0 left."""
    try:
        data = None if content is None else parse_result(content, _output_path(element))
    except Exception as error:
        reason = f"{_output_path(element)} can't be read: {type(error).__name__}: {error}"
        return report.report(element.entry.job, Fate.LOST, _with_loss(ending, reason))
    return Outcome(Status.SUCCEEDED, data, exit_code=0)


def _with_loss(ending: report.Ending, reason: str) -> report.Ending:
    import dataclasses

    return dataclasses.replace(ending, lost=reason)


def _names_of(element: _Element) -> list[str]:
    """What may be removed of an element: all but its claims, which keep a twin from running."""
    index = element.index
    keys = [f"{index}.{restart}" for restart in element.claims]
    own = [f"log.{index}", *(f"{key}.result" for key in keys), *(f"out.{key}.pkl" for key in keys)]
    return own + [f"buffer.{key}.*" for key in keys]
