"""Elements that wait to be submitted, those that can be one array together."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .elements import Element


class Queue:
    """First come, first served: the one that came first, with those like it."""

    def __init__(self) -> None:
        self._groups: dict[object, dict[Element, None]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[Element]:
        for group in self._groups.values():
            yield from group

    def __contains__(self, element: Element) -> bool:
        return element in self._groups.get(element.group, ())

    def add(self, element: Element) -> None:
        """Puts it at the end."""
        element.number = next(self._numbers)
        self._groups.setdefault(element.group, {})[element] = None

    def put_back(self, elements: Iterable[Element]) -> None:
        """Puts elements of one group, which were taken, before all others of it."""
        again = dict.fromkeys(elements)
        for element in again:
            self._groups[element.group] = again | self._groups.get(element.group, {})
            break

    def remove(self, element: Element) -> None:
        """It doesn't wait any more."""
        group = self._groups[element.group]
        del group[element]
        if not group:
            del self._groups[element.group]

    def take(self, most: int) -> list[Element]:
        """Takes out those next in turn that can be one array."""
        group = min(self._groups.values(), key=lambda group: next(iter(group)).number)
        taken = [element for element, _ in zip(group, range(most), strict=False)]
        for element in taken:
            self.remove(element)
        return taken

    def clear(self) -> None:
        """Nobody waits any more."""
        self._groups.clear()
