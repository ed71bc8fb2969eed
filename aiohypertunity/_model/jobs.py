"""Descriptions of what to run: `Job` and `SlurmJob`, frozen and checked when they are made.

A task is one of three things, which are told apart here only:

* a callable;
* `"path/script.py:function"` or `"package.module:function"` (`::` works too): a `FunctionRef`;
* the path of a script or program: a `ScriptRef`.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import math
import os
import re
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    from .results import Result

T = TypeVar("T")

Args: TypeAlias = "tuple[Any, ...] | dict[str, Any]"

SLURM_ONLY = ("memory", "time")
"""Resources of Slurm jobs; a local job can ask only for those that its scheduler has."""

_REMOTE = "remote:"
_FUNCTION = re.compile(r"(?P<where>.+?)::?(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\Z")
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*\Z")


@dataclass(frozen=True, slots=True)
class FunctionRef:
    """A function by name: in a file, or in an importable module.

    Attributes:
        name: The name of the function, dotted if it is an attribute of another object.
        path: The absolute path of the script that defines it; or None.
        module: The name of the module that defines it; or None.
    """

    name: str
    path: str | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True)
class ScriptRef:
    """A script or program.

    Attributes:
        path: Its absolute path (on the cluster if `remote`).
        binary: The interpreter and its options; empty if the script is executable.
        remote: True if it is on the cluster and is used there in place.
    """

    path: str
    binary: tuple[str, ...] = ()
    remote: bool = False


# Who has an id or a result's file to himself: a job from when it's made until it's finished or gone.
_ids: weakref.WeakValueDictionary[int | str, Job[Any]] = weakref.WeakValueDictionary()
_outputs: weakref.WeakValueDictionary[str, Job[Any]] = weakref.WeakValueDictionary()
_registry = threading.RLock()
_counter = itertools.count()


def _next_id() -> int:
    number = next(_counter)
    while number in _ids:
        number = next(_counter)
    return number


def claim(jobs: Sequence[Job[Any]]) -> None:
    """Record that jobs are dispatched: each keeps its id until `release` was called as many times.

    Raises:
        ValueError: A job has finished before, and another one has its id now. Nothing is recorded.
    """
    with _registry:
        taken = []
        try:
            for job in jobs:
                if _ids.get(job.id) is not job:
                    _take_names(job)
                    taken.append(job)
        except ValueError as error:
            for job in taken:
                _free_names(job)
            raise ValueError(f"{error}: job.replace() makes another one like it") from None
        for job in jobs:
            job.__dict__["_n_dispatches"] = job.__dict__.get("_n_dispatches", 0) + 1


def release(job: Job[Any], n_dispatches: int = 1) -> None:
    """Record that a job has finished `n_dispatches` times; its id is free after the last time."""
    with _registry:
        left = max(job.__dict__.get("_n_dispatches", 0) - n_dispatches, 0)
        job.__dict__["_n_dispatches"] = left
        if not left:
            _free_names(job)


def _take_names(job: Job[Any]) -> None:
    """Reserve the id of a job, and the file that it names for its result.

    Raises:
        ValueError: Another unfinished job has one of them. Nothing is reserved.
    """
    output = job.__dict__.get("_output")
    if output is not None and (holder := _outputs.get(output, job)) is not job:
        raise ValueError(
            f"output file {output} is in use by job {holder.id!r}, which isn't finished: "
            "two can't share one"
        )
    if _ids.setdefault(job.id, job) is not job:
        raise ValueError(f"id={job.id!r} is in use by a job that isn't finished")
    if output is not None:
        _outputs[output] = job


def _free_names(job: Job[Any]) -> None:
    if _ids.get(job.id) is job:
        del _ids[job.id]
    output = job.__dict__.get("_output")
    if output is not None and _outputs.get(output) is job:
        del _outputs[output]


@dataclass(frozen=True, eq=False)
class Job(Generic[T]):
    """A task and its arguments. Frozen, compared by identity, and checked when it is made.

    Args:
        task: A callable; `"path/script.py:function"` or `"package.module:function"` (`::` too);
            or the path of a script or program. A relative path is relative to the directory in
            which the job is made, not to `cwd`.
        args: A tuple for positional arguments, a dict for named ones. A script gets a non-empty
            tuple as `a b c OUTPUT`, a non-empty dict as `--key value ... --output_file OUTPUT` (a
            key that starts with a dash is passed as it is), and nothing if there are no arguments.
            Each value is passed as `str(value)`: True as `True`, None as `None`, a list as
            `[1, 2]`. To pass a flag without a value, use a tuple.
        id: A number or a string; by default the next unused number. No two unfinished jobs can have
            the same id. It is in use until the job has run (each time it was dispatched) or has
            been garbage-collected.
        meta: A dict with no other keys than these. `"binary"`: the interpreter of a script.
            `"output": "env"`: append no output path to the arguments of a script (it is always in
            `AIOHYPERTUNITY_OUTPUT_FILE`). `"resources"`: the CPUs, and the resources of
            `Scheduler(resources=...)`, that the job occupies, such as `{"cpu": 2, "gpu": 1}`.
        timeout: Seconds that one attempt may run; None for the default of the scheduler.
        retries: The number of further attempts after a failure, a crash or a timeout; None for the
            default of the scheduler.
        env: Environment variables, in addition to the present ones.
        cwd: The directory in which to run; the present one if None.

    Raises:
        TypeError: An argument is of the wrong type, or does not fit the signature of the task.
        ValueError: An argument has an impossible value, or names something that does not exist.
    """

    task: Callable[..., T] | str | os.PathLike[str]
    args: Args = ()
    id: int | str = field(default_factory=_next_id)
    meta: Mapping[str, Any] | None = None
    timeout: float | None = field(default=None, kw_only=True)
    retries: int | None = field(default=None, kw_only=True)
    env: Mapping[str, str] | None = field(default=None, kw_only=True)
    cwd: str | os.PathLike[str] | None = field(default=None, kw_only=True)

    target: Callable[..., T] | FunctionRef | ScriptRef = field(init=False, repr=False)
    """The resolved task, with absolute paths."""

    def __post_init__(self) -> None:
        _check_args(self.args)
        if self.meta is not None:
            self._check_meta(self.meta)
            object.__setattr__(self, "meta", copy.deepcopy(dict(self.meta)))
        check_seconds("timeout", self.timeout)
        if self.retries is not None:
            check_retries(self.retries)
        if self.env is not None:
            _check_env(self.env)
            object.__setattr__(self, "env", dict(self.env))
        if self.cwd is not None:
            object.__setattr__(self, "cwd", self._directory(self.cwd))
        object.__setattr__(self, "target", self._target())
        self._register()

    def replace(self, **changes: Any) -> Job[T]:
        """Return another job like this one, with a new id.

        Args:
            **changes: The arguments that differ, by name.
        """
        changes.setdefault("id", _next_id())
        return dataclasses.replace(self, **changes)

    def __call__(self) -> Result[T]:
        """Run the job without a scheduler, and return its result.

        A callable runs in the present process and thread, as is useful in a debugger; its `timeout`
        is not enforced. A script runs as it would under a scheduler.
        """
        from .._inline import run_inline

        result = run_inline(self)
        release(self, 0)
        return result

    def __reduce__(self) -> tuple[object, ...]:
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _restore, (type(self), _Portable(state))

    def __deepcopy__(self, memo: dict[int, object]) -> Job[T]:
        # A job is frozen and its id is its own: a copy would be a second job of the same id.
        return self

    __copy__ = replace

    def _target(self) -> Callable[..., T] | FunctionRef | ScriptRef:
        meta = self.meta or {}
        if callable(self.task):
            _check_signature(self.task, self.args)
        target = resolve(self.task, meta.get("binary"), self.cwd)
        if isinstance(target, ScriptRef):
            _check_words(self.args)
        else:
            for key in ("binary", "output"):
                if key in meta and not self._keys_for_callables() >= {key}:
                    raise ValueError(f"meta[{key!r}] is for scripts; {self.task!r} is a function")
        return target

    def _keys_for_callables(self) -> frozenset[str]:
        return frozenset({"resources"})

    def _directory(self, path: str | os.PathLike[str]) -> str:
        return _existing_directory(path)

    def _check_meta(self, meta: Mapping[str, Any]) -> None:
        _check_keys("meta", meta, ("binary", "output", "resources"))
        if meta.get("output", "env") != "env":
            raise ValueError(f"meta['output']={meta['output']!r}: can only be 'env'")
        program = _binary(meta.get("binary"))[:1]
        if program and shutil.which(program[0]) is None:
            raise ValueError(
                f"meta['binary']={meta['binary']!r}: there is no program {program[0]!r}"
            )
        _check_local_resources(meta.get("resources", {}))

    def _register(self) -> None:
        if isinstance(self.id, bool) or not isinstance(self.id, int | str):
            raise TypeError(f"id={self.id!r}: must be a whole number or a string")
        path = self._named_output()
        if path is not None:
            self.__dict__["_output"] = path
        with _registry:
            try:
                _take_names(self)
            except ValueError as error:
                raise ValueError(
                    f"{error}: wait for it, let go of it if it's never to run, or take another"
                ) from None

    def _named_output(self) -> str | None:
        """Return the absolute output path among the arguments of a script, or None."""
        if isinstance(self.target, ScriptRef) and isinstance(self.args, dict):
            for key, value in self.args.items():
                if key.lstrip("-") == "output_file":
                    return os.path.abspath(os.path.join(self.cwd or "", os.fspath(value)))
        return None

    @property
    def output_path(self) -> str | None:
        """The absolute path that the user named for a script's result; None for a temporary one."""
        return self._named_output()


class _Portable:
    """The fields of a job in a pickle, by cloudpickle: a task may be a lambda."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        import pickle

        import cloudpickle

        return pickle.loads, (cloudpickle.dumps(self.state),)


def _restore(kind: type[Job[Any]], state: dict[str, Any]) -> Job[Any]:
    job = kind.__new__(kind)
    job.__dict__.update(state)
    return job


@dataclass(frozen=True, eq=False)
class SlurmJob(Job[T]):
    """A job for a Slurm cluster. The arguments of `Job` apply; these differ or are new.

    Args:
        meta: `"binary"`; `"resources"`: `{"cpu": 4, "gpu": "a100:1", "memory": "8G",
            "time": "1:00:00"}` (CPUs per task, GPUs, memory per node, time limit); `"options"`: any
            other `sbatch` option, by its long name without dashes.
        output_file: The path to which a script writes its result, and where the file stays; by
            default a temporary file in the work directory.
        queue_timeout: Seconds that the job may wait for its turn; None for no limit.
    """

    output_file: str | os.PathLike[str] | None = field(default=None, kw_only=True)
    queue_timeout: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_seconds("queue_timeout", self.queue_timeout)
        super().__post_init__()

    def _check_meta(self, meta: Mapping[str, Any]) -> None:
        from .sbatch_options import check_options, check_resources

        _check_keys("meta", meta, ("binary", "output", "resources", "options"))
        check_resources(meta.get("resources", {}))
        check_options(meta.get("options", {}))

    def _keys_for_callables(self) -> frozenset[str]:
        return frozenset({"resources", "binary"})

    def _directory(self, path: str | os.PathLike[str]) -> str:
        # It's the nodes that must have it, and this may be another machine.
        return os.fspath(path) if os.path.isabs(path) else _existing_directory(path)

    def _named_output(self) -> str | None:
        if self.output_file is not None:
            return os.path.abspath(os.path.join(self.cwd or "", os.fspath(self.output_file)))
        return super()._named_output()


def _check_args(args: object) -> None:
    if type(args) is dict:
        for key in args:
            if not isinstance(key, str):
                raise TypeError(f"args has the key {key!r}: names of arguments must be strings")
    elif not isinstance(args, tuple):
        raise TypeError(
            f"args={args!r}: must be a tuple (positional) or a dict (named); "
            f"for one argument write args=({args!r},)"
        )


def _check_keys(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}={given!r}: must be a dict")
    for key in given:
        if key not in known:
            raise ValueError(f"{what} has the unknown key {key!r}; it knows {', '.join(known)}")


def _check_local_resources(resources: Mapping[str, Any]) -> None:
    if not isinstance(resources, Mapping):
        raise TypeError(f"meta['resources']={resources!r}: must be a dict")
    for name, amount in resources.items():
        least = 1 if name == "cpu" else 0
        if not isinstance(amount, int) or isinstance(amount, bool) or amount < least:
            raise ValueError(
                f"meta['resources'][{name!r}]={amount!r}: "
                + (
                    f"{name} is for a SlurmJob"
                    if name in SLURM_ONLY
                    else f"must be a whole number from {least}"
                )
            )


def check_seconds(name: str, value: object) -> None:
    """Raise unless `value` is None or a number of seconds above 0."""
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a number of seconds or None")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name}={value!r}: must be more than 0 seconds")


def check_retries(value: object) -> None:
    """Raise unless `value` is a whole number, 0 or more."""
    if type(value) is not int or value < 0:
        raise ValueError(f"retries={value!r}: must be a whole number, 0 or more")


def _check_env(env: Mapping[str, str]) -> None:
    if not isinstance(env, Mapping):
        raise TypeError(f"env={env!r}: must be a dict of strings")
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"env[{name!r}]={value!r}: names and values must be strings")
        if not name or "=" in name or not _can_be_passed(name + value):
            raise ValueError(f"env[{name!r}]={value!r}: no environment can hold that")


def _can_be_passed(text: str) -> bool:
    """Return True if a process can be given this word."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _check_words(args: Args) -> None:
    """Raise if an argument of a script cannot become a word of a command line."""
    for key, value in args.items() if isinstance(args, dict) else enumerate(args):
        word = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
        if not _can_be_passed(f"{key}{word}"):
            raise ValueError(f"args[{key!r}]={value!r}: no command line can hold that")


def _existing_directory(path: str | os.PathLike[str]) -> str:
    absolute = os.path.abspath(path)
    if not os.path.isdir(absolute):
        raise ValueError(f"cwd={os.fspath(path)!r}: there is no such directory")
    return absolute


def _check_signature(function: Callable[..., Any], args: Args) -> None:
    signature = _signature(function)
    if signature is None:
        return
    try:
        if isinstance(args, dict):
            signature.full.bind(**args)
        elif not signature.least <= len(args) <= signature.most:
            signature.full.bind(*args)
    except TypeError as error:
        reason = _misnamed(signature.full, args) or str(error)
        raise TypeError(f"args={args!r} don't fit {function!r}{signature.full}: {reason}") from None


def _misnamed(signature: inspect.Signature, args: Args) -> str:
    """Name the arguments that a signature does not have, and those that may be meant."""
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if not isinstance(args, dict) or inspect.Parameter.VAR_KEYWORD in kinds:
        return ""
    named = {p.name for p in signature.parameters.values() if p.kind in _NAMED}
    return "; ".join(
        f"there is no argument {name!r}{did_you_mean(name, named - args.keys())}"
        for name in args
        if name not in named
    )


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of a message: the name that `word` may be meant to be; empty if there is none."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f": did you mean {close[0]!r}?" if close else ""


class _Signature(NamedTuple):
    """A signature, and the numbers of positional arguments that certainly fit it."""

    full: inspect.Signature
    least: int
    most: float

    @classmethod
    def of(cls, function: Callable[..., Any]) -> _Signature:
        # A wrapper may well bring arguments of its own to what it wraps.
        full = inspect.signature(function, follow_wrapped=False)
        kinds = [(p.kind, p.default is p.empty) for p in full.parameters.values()]
        needed = [is_needed for kind, is_needed in kinds if kind in _POSITIONAL]
        most: float = len(needed)
        if (inspect.Parameter.VAR_POSITIONAL, True) in kinds:
            most = math.inf
        if (inspect.Parameter.KEYWORD_ONLY, True) in kinds:
            most = -1
        return cls(full, sum(needed), most)


_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
_NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
_signatures: weakref.WeakKeyDictionary[Callable[..., Any], _Signature | None] = (
    weakref.WeakKeyDictionary()
)


def _signature(function: Callable[..., Any]) -> _Signature | None:
    """Return the signature of a callable, or None if it cannot be determined."""
    try:
        return _signatures[function]
    except (TypeError, KeyError):
        pass
    try:
        signature = _Signature.of(function)
    except (TypeError, ValueError):  # many builtins tell nothing
        signature = None
    with contextlib.suppress(TypeError):
        _signatures[function] = signature
    return signature


def resolve(
    task: Callable[..., T] | str | os.PathLike[str],
    binary: object = None,
    cwd: str | os.PathLike[str] | None = None,
) -> Callable[..., T] | FunctionRef | ScriptRef:
    """Return a task as a callable, a `FunctionRef` or a `ScriptRef`.

    Args:
        task: The task of a `Job`.
        binary: The interpreter that was named for it.
        cwd: The directory in which it will run. Scripts are not looked up there, but the error
            mentions one that is there.

    Raises:
        TypeError: The task is none of the three.
        ValueError: The task names something that does not exist.
    """
    if callable(task):
        return task
    if not isinstance(task, str | os.PathLike):
        raise TypeError(
            f"task={task!r}: must be a callable, 'script.py:function', 'package.module:function' or "
            "the path of a script"
        )
    return _resolve(os.fspath(task), binary, cwd)


def _resolve(
    task: str, binary: object, cwd: str | os.PathLike[str] | None
) -> FunctionRef | ScriptRef:
    if not task:
        raise ValueError("task='': names no script")
    if task.startswith(_REMOTE):
        return _resolve_remote(task, binary)
    match = _FUNCTION.match(task)
    if match and not os.path.exists(task):
        return _resolve_function(task, match["where"], match["name"], cwd)
    return _resolve_script(task, binary, cwd)


def _resolve_remote(task: str, binary: object) -> FunctionRef | ScriptRef:
    path = task.removeprefix(_REMOTE)
    if not path.startswith("/"):
        raise ValueError(f"task={task!r}: a path on the cluster must be absolute")
    return ScriptRef(path, _binary(binary) or (("python3",) if path.endswith(".py") else ()), True)


def _no_script(task: str, where: str, cwd: str | os.PathLike[str] | None) -> ValueError:
    """Return the error for a task that names a script `where` that does not exist."""
    message = f"task={task!r}: there is no script {os.path.abspath(where)}"
    there = os.path.join(cwd or "", where)
    if os.path.isfile(there):
        message += (
            f"; there is {there}, but a script's path is relative to the directory the job is made in, not "
            "to its cwd"
        )
    return ValueError(message)


def _resolve_function(
    task: str, where: str, name: str, cwd: str | os.PathLike[str] | None
) -> FunctionRef:
    if not where.endswith(".py") and _MODULE.match(where):
        return _resolve_in_module(task, where, name)
    path = os.path.abspath(where)
    if not os.path.isfile(path):
        raise _no_script(task, where, cwd)
    if not path.endswith(".py"):
        raise ValueError(f"task={task!r}: a function can only be taken out of a .py file")
    stat = os.stat(path)
    names = _names_in(path, stat.st_mtime_ns, stat.st_size)
    if names is not None and name.partition(".")[0] not in names:
        raise ValueError(
            f"task={task!r}: {path} defines no {name!r}; it has {', '.join(sorted(names)) or 'no names'}"
        )
    return FunctionRef(name, path=path)


def _resolve_in_module(task: str, module: str, name: str) -> FunctionRef:
    top = module.partition(".")[0]
    try:
        found = top in sys.modules or importlib.util.find_spec(top) is not None
    except ValueError:
        found = False
    if not found:
        raise ValueError(
            f"task={task!r}: there is no module {top!r} on sys.path; for a script write its path "
            "with the ending .py"
        )
    return FunctionRef(name, module=module)


@functools.lru_cache(maxsize=64)
def _names_in(path: str, mtime_ns: int, size: int) -> frozenset[str] | None:  # noqa: ARG001 - cache key
    """Return the names that a script defines, or None if only running it would tell.

    Raises:
        ValueError: The script is not valid Python.
    """
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} isn't valid Python: {error}") from error
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.alias(name="*") | ast.Name(id="globals" | "exec" | "setattr" | "vars"):
                return None
            case ast.alias(name=name, asname=asname):
                names.add(asname or name.partition(".")[0])
    return None if "__getattr__" in names else frozenset(names)


def _resolve_script(task: str, binary: object, cwd: str | os.PathLike[str] | None) -> ScriptRef:
    path = os.path.abspath(task)
    if not os.path.exists(path) and os.sep not in task:
        path = shutil.which(task) or path
    if not os.path.isfile(path):
        raise _no_script(task, task, cwd)
    given = _binary(binary)
    if given:
        return ScriptRef(path, given)
    if path.endswith(".py"):
        return ScriptRef(path, (sys.executable,))
    if path.endswith(".sh"):
        return ScriptRef(path, ("bash",))
    if os.access(path, os.X_OK):
        return ScriptRef(path)
    raise ValueError(
        f"task={task!r}: {path} isn't executable, and its ending names no interpreter: "
        "chmod +x it, or name one in meta={'binary': ...}"
    )


def _binary(binary: object) -> tuple[str, ...]:
    """Return the interpreter that the user named as the first words of a command line."""
    if binary is None:
        return ()
    words = (binary,) if isinstance(binary, str | os.PathLike) else binary
    if not isinstance(words, list | tuple) or not words:
        raise TypeError(
            f"meta['binary']={binary!r}: must be a program, or a list of it and its options"
        )
    return tuple(os.fspath(word) for word in words)
