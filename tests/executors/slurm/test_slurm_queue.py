"""Who waits to be submitted: first come, first served, those alike together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aiohypertunity._executors.slurm.queue import Queue


class Waiting(SimpleNamespace):
    """An element as far as the queue knows it."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def waiting(queue: Queue, groups: str) -> list[Any]:
    elements: list[Any] = [Waiting(group=group, number=-1) for group in groups]
    for element in elements:
        queue.add(element)
    return elements


def test_the_first_and_those_like_it() -> None:
    """Those of the first one's group go together; then the group of the first that's left."""
    queue = Queue()
    a0, b0, a1, c0, b1 = waiting(queue, "abacb")
    assert len(queue) == 5
    assert queue.take(10) == [a0, a1]
    assert queue.take(10) == [b0, b1]
    assert queue.take(10) == [c0]
    assert not len(queue)


def test_no_more_than_there_is_room_for() -> None:
    """What is left of a group keeps its turn."""
    queue = Queue()
    a0, a1, b0, a2 = waiting(queue, "aaba")
    assert queue.take(1) == [a0]
    assert queue.take(1) == [a1]
    assert queue.take(2) == [b0]
    assert queue.take(2) == [a2]


def test_put_back() -> None:
    """Those that come back go first again."""
    queue = Queue()
    a0, b0, a1, a2 = waiting(queue, "abaa")
    taken = queue.take(2)
    queue.put_back(taken)
    assert list(queue) == [b0, a0, a1, a2] or list(queue) == [a0, a1, a2, b0]
    assert queue.take(3) == [a0, a1, a2]
    queue.put_back([a0])
    assert queue.take(3) == [a0]
    assert queue.take(3) == [b0]


def test_remove() -> None:
    """Who is cancelled while it waits is no more there; and who was taken isn't either."""
    queue = Queue()
    a0, a1 = waiting(queue, "aa")
    assert a0 in queue
    queue.remove(a0)
    assert a0 not in queue
    assert queue.take(5) == [a1]
    assert a1 not in queue
    queue.add(a0)
    queue.clear()
    assert not list(queue)
