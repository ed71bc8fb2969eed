"""The rules: from tables, and for any order of events."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiohypertunity import NotEnoughJobs, Status
from aiohypertunity._ledger import Demand, Entry, Ledger, Needs, Pool

if TYPE_CHECKING:
    from collections.abc import Mapping

NOBODY: Any = None


def entry(seq: int, pool: Pool | None = None, needs: Needs | None = None) -> Entry:
    made = Entry(NOBODY, NOBODY, NOBODY, needs or Needs(), pool or Pool())
    made.seq = seq
    return made


def queue(ledger: Ledger, *wanted: Mapping[str, int]) -> list[Entry]:
    entries = [entry(seq, needs=ledger.needs(needs)) for seq, needs in enumerate(wanted)]
    for each in entries:
        ledger.wait(each)
    return entries


def start_all(ledger: Ledger) -> list[int]:
    started = []
    while (next_one := ledger.start()) is not None:
        started.append(next_one.seq)
    return started


CPU, GPU, TWO = {"cpu": 1}, {"gpu": 1}, {"cpu": 2}


@pytest.mark.parametrize(
    ("wanted", "started"),
    [
        ([], []),
        ([{}, {}, {}, {}], [0, 1, 2]),
        ([TWO, TWO, CPU], [0]),  # the second reserves what it lacks
        ([TWO, CPU, TWO], [0, 1]),
        ([{"cpu": 3}, {}], [0]),
        ([GPU, GPU, GPU, CPU], [0, 1, 3]),  # a CPU job passes one that lacks a GPU
        ([{"gpu": 2}, GPU, {}], [0, 2]),
        ([GPU, {"gpu": 2}, GPU, {}], [0, 3]),  # and a GPU job doesn't pass one that wants two
        ([{"gpu": 1, "disk": 1}, {"disk": 1}, GPU], [0, 2]),
        ([{"gpu": 0}, {"gpu": 0}], [0, 1]),
    ],
)
def test_what_may_start(wanted: list[dict[str, int]], started: list[int]) -> None:
    """On three CPUs, two GPUs and one disk."""
    ledger = Ledger(3, {"gpu": [0, 1], "disk": ["a"]})
    queue(ledger, *wanted)
    assert start_all(ledger) == started


@pytest.mark.parametrize("wanted", [{"cpu": 4}, {"gpu": 3}, {"fpga": 1}, {"cpu": 1, "gpu": 9}])
def test_what_can_never_start_is_refused(wanted: dict[str, int]) -> None:
    """With how much there is."""
    with pytest.raises(ValueError, match="this scheduler has"):
        Ledger(3, {"gpu": [0, 1]}).needs(wanted)


def test_indices_come_back_in_their_order() -> None:
    """The lowest free ones are handed out."""
    ledger = Ledger(9, {"gpu": [4, 5, 6]})
    queue(ledger, GPU, GPU, GPU, {"gpu": 2})
    first, second, third = (ledger.start() for _ in range(3))
    assert ledger.start() is None
    assert first and second and third
    for each in (third, first):
        ledger.release(each)
    last = ledger.start()
    assert last and last.grant and last.grant.others == (("gpu", (4, 6)),)


def test_releasing_twice_gives_nothing_twice() -> None:
    """What an entry holds comes back once."""
    ledger = Ledger(1, {})
    queue(ledger, {})
    started = ledger.start()
    assert started
    ledger.release(started)
    ledger.release(started)
    assert ledger.free_cpus == 1


def test_ahead_is_the_oldest_or_nobody() -> None:
    """Getting ahead passes nobody, whatever he needs."""
    ledger = Ledger(2, {})
    entries = queue(ledger, {}, TWO, {})
    assert ledger.ahead(Needs(), lambda _: False) is None
    assert ledger.ahead(Needs(), lambda _: True) is entries[0]
    assert ledger.ahead(Needs(), lambda _: True) is None


class Machine(RuleBasedStateMachine):
    """Any order of jobs that come, start, end, are put back and are cancelled while they wait."""

    CPUS, GPUS = 3, (0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.CPUS, {"gpu": self.GPUS})
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.n = 0

    @rule(cpus=st.integers(1, CPUS), gpus=st.integers(0, 2))
    def come(self, cpus: int, gpus: int) -> None:
        made = entry(self.n, needs=self.ledger.needs({"cpu": cpus, "gpu": gpus}))
        self.n += 1
        self.ledger.wait(made)
        self.waiting.append(made)

    @rule()
    def begin(self) -> None:
        oldest = min(self.waiting, key=lambda e: e.seq, default=None)
        held = {cpu_or_gpu: self._free()[cpu_or_gpu] for cpu_or_gpu in (0, 1)}
        started = self.ledger.start()
        if started is not None:
            self.waiting.remove(started)
            self.running.append(started)
        if oldest is not None and self._fits(oldest, held):
            assert started is oldest, "the oldest one could have started"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        done = data.draw(st.sampled_from(self.running))
        self.running.remove(done)
        self.ledger.release(done)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(self.running))
        self.running.remove(again)
        self.ledger.release(again)
        self.ledger.wait_again([again])
        self.waiting.append(again)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        gone.status = Status.CANCELLED
        self.waiting.remove(gone)

    def _free(self) -> tuple[int, int]:
        gpus = sum(len(i) for e in self.running if e.grant for _, i in e.grant.others)
        return self.CPUS - sum(e.needs.cpus for e in self.running if e.needs), len(self.GPUS) - gpus

    @staticmethod
    def _fits(oldest: Entry, free: dict[int, int]) -> bool:
        assert oldest.needs
        return oldest.needs.cpus <= free[0] and sum(n for _, n in oldest.needs.others) <= free[1]

    @invariant()
    def nothing_is_handed_out_twice(self) -> None:
        gpus = [i for e in self.running if e.grant for _, found in e.grant.others for i in found]
        assert len(gpus) == len(set(gpus))
        assert self.ledger.free_cpus == self._free()[0] >= 0

    def teardown(self) -> None:
        """Nobody starves: with all the room there is, everyone who waits gets his turn."""
        while self.running:
            self.ledger.release(self.running.pop())
        while (started := self.ledger.start()) is not None:
            self.waiting.remove(started)
            self.ledger.release(started)
        assert not self.waiting


TestLedger = Machine.TestCase


@given(st.permutations(range(8)), st.integers(0, 8))
def test_a_pool_gives_results_as_they_come_or_in_order(done: list[int], n_done: int) -> None:
    """Finished ones in the order they finished; `ordered`, up to the first that is missing."""
    for ordered in (False, True):
        pool = Pool()
        entries = [entry(seq, pool) for seq in range(8)]
        for each in entries:
            pool.add(each)
        for seq in done[:n_done]:
            finish(pool, entries[seq])
        taken = []
        while (each := pool.take(ordered=ordered)) is not None:
            taken.append(each.seq)
        in_order = [s for s in range(8) if set(range(s + 1)) <= set(done[:n_done])]
        assert taken == (in_order if ordered else done[:n_done])
        assert len(pool) == 8 - len(taken)


def finish(pool: Pool, each: Entry) -> None:
    each.result = object()  # type: ignore[assignment]
    if each.pool is not None:
        each.pool.ready(each)


def test_claiming_moves_what_nobody_has_taken() -> None:
    """And wakes those who waited for it in vain."""
    shared, own, woken = Pool(), Pool(), []
    entries = [entry(seq, shared) for seq in range(3)]
    for each in entries:
        shared.add(each)
    finish(shared, entries[0])
    assert shared.take() is entries[0]
    shared.waiters.append(lambda: woken.append(1))
    own.claim(entries)
    assert (len(shared), len(own), woken) == (0, 2, [1])
    finish(own, entries[2])
    assert shared.take() is None
    assert own.take() is entries[2]


@pytest.mark.parametrize(
    ("n_results", "n_ready", "n_left", "closed", "taken", "verdict"),
    [
        (None, 2, 0, False, 2, True),
        (None, 2, 1, False, 2, False),
        (0, 2, 5, False, 2, True),
        (-1, 0, 5, False, 0, True),
        (2, 3, 1, False, 2, True),
        (3, 2, 1, False, 2, False),
        (3, 2, 0, False, 2, NotEnoughJobs),
        (3, 2, 0, True, 2, NotEnoughJobs),
        (math.inf, 2, 0, False, 2, False),
        (math.inf, 2, 0, True, 2, True),
        (math.inf, 2, 1, True, 2, False),
    ],
)
def test_when_a_collector_has_had_enough(
    n_results: float | None, n_ready: int, n_left: int, closed: bool, taken: int, verdict: Any
) -> None:
    """What it takes of what is ready, and whether it is done then, waits, or can't be served."""
    pool = Pool()
    for seq in range(n_ready + n_left):
        each = entry(seq, pool)
        pool.add(each)
        if seq < n_ready:
            finish(pool, each)
    demand = Demand(n_results, ordered=False)
    n_taken = 0
    while demand.take(pool) is not None:
        n_taken += 1
    assert n_taken == taken
    if verdict is NotEnoughJobs:
        with pytest.raises(NotEnoughJobs) as caught:
            demand.is_met(pool, closed=closed)
        assert caught.value.n_collected == taken
    else:
        assert demand.is_met(pool, closed=closed) is verdict


@given(st.lists(st.sampled_from(["add", "finish", "take", "claim"]), max_size=60), st.data())
def test_each_result_is_given_once(what: list[str], data: st.DataObject) -> None:
    """Two pools, any order of events: no result is lost, none comes twice."""
    pools = Pool(), Pool()
    entries: list[Entry] = []
    taken: list[int] = []
    for action in what:
        pool = data.draw(st.sampled_from(pools))
        if action == "add":
            entries.append(entry(len(entries), pool))
            pool.add(entries[-1])
        elif action == "take" and (each := pool.take(ordered=data.draw(st.booleans()))):
            taken.append(each.seq)
        elif entries and action == "claim":
            pool.claim(data.draw(st.lists(st.sampled_from(entries), unique=True)))
        elif action == "finish" and (open_ones := [e for e in entries if e.result is None]):
            finish(pool, data.draw(st.sampled_from(open_ones)))
    for each in entries:
        if each.result is None:
            finish(pools[0], each)
    for pool in pools:
        while (each_left := pool.take()) is not None:
            taken.append(each_left.seq)
    assert sorted(taken) == list(range(len(entries)))
