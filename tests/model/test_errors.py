"""One root, and errors that survive a journey."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import tasks

import aiohypertunity
from aiohypertunity import (
    CollectTimeout,
    HypertunityError,
    Job,
    JobCrashed,
    JobError,
    JobFailed,
    JobTimeout,
    NodeFailed,
    NotEnoughJobs,
    OutOfMemory,
    PayloadError,
    RemoteTraceback,
)
from aiohypertunity._model import errors as _errors

OURS = [
    kind
    for kind in vars(_errors).values()
    if inspect.isclass(kind) and issubclass(kind, HypertunityError)
]


def test_the_tree() -> None:
    """It is what the module's docstring draws."""
    assert issubclass(OutOfMemory, JobCrashed)
    assert issubclass(NodeFailed, JobCrashed)
    assert issubclass(JobTimeout, TimeoutError)
    assert issubclass(CollectTimeout, TimeoutError)
    assert not issubclass(CollectTimeout, JobError)
    assert not issubclass(NotEnoughJobs, JobError)
    for kind in OURS:
        assert kind.__name__ in (_errors.__doc__ or "") or kind is HypertunityError


@pytest.mark.parametrize("kind", OURS)
def test_each_is_public_and_says_what_it_is(kind: type[HypertunityError]) -> None:
    """Exported under its own name, with a docstring."""
    assert getattr(aiohypertunity, kind.__name__) is kind
    assert kind.__name__ in aiohypertunity.__all__
    assert kind.__doc__


@pytest.mark.parametrize(
    "reproduce", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
@pytest.mark.parametrize("kind", OURS)
def test_each_survives_a_journey(kind: type[HypertunityError], reproduce) -> None:  # type: ignore[no-untyped-def]
    """Message, attributes and cause are there on the other side."""
    error = kind("what happened")
    error.__cause__ = ValueError("why")
    if isinstance(error, JobError):
        error.job = Job(tasks.pid)
    other = reproduce(error)
    assert type(other) is kind
    assert str(other) == "what happened"
    assert repr(other.__cause__) == "ValueError('why')"
    assert vars(other).keys() == vars(error).keys()
    if isinstance(other, JobError):
        assert other.job is not None


def test_attributes() -> None:
    """What an error knows is to be had without parsing its message."""
    assert JobFailed("", exit_code=3).exit_code == 3
    crash = pickle.loads(pickle.dumps(JobCrashed("", signal=9)))
    assert (crash.signal, crash.exit_code) == (9, None)
    assert pickle.loads(pickle.dumps(PayloadError("", part="argument[2]"))).part == "argument[2]"
    assert CollectTimeout("", n_collected=2).pending == ()


def test_a_remote_traceback_prints_as_it_was() -> None:
    """The text of the other side, set off by an empty line."""
    assert str(RemoteTraceback("Traceback: here")) == "\n\nTraceback: here"


def test_the_public_names_are_all_there() -> None:
    """Each name in `__all__` can be had, `dir` shows it, and any other is an AttributeError."""
    for name in aiohypertunity.__all__:
        assert getattr(aiohypertunity, name) is not None
        assert name in dir(aiohypertunity)
    with pytest.raises(AttributeError, match="no attribute 'Shceduler'"):
        _ = aiohypertunity.Shceduler
