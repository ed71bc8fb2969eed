"""The rules: from tables, and for any order of events."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiohypertunity import NotEnoughJobs
from aiohypertunity._rules.ledger import Demand, Entry, Ledger, Needs, Pool, Waiter, Wants

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
        self.ledger.wait(again)
        self.waiting.append(again)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.ledger.discard([gone])
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
    shared.wait(Waiter(lambda: woken.append(1), Wants.ANY))
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


class Collectors(RuleBasedStateMachine):
    """Any order of results and of collectors that come, look late, are cancelled or have others take before them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.n = 0
        self.open: list[Entry] = []
        self.asleep: list[Waiter] = []
        self.awake: list[Waiter] = []
        self.taken: list[Entry] = []

    @rule(n=st.integers(1, 60))
    def come(self, n: int) -> None:
        """Jobs are dispatched."""
        for _ in range(n):
            self.open.append(entry(self.n, self.pool))
            self.pool.add(self.open[-1])
            self.n += 1

    @rule(wants=st.sampled_from(list(Wants)), n=st.integers(1, 60))
    def wait(self, wants: Wants, n: int) -> None:
        """Collectors find nothing, and wait."""
        for _ in range(n):
            if wants is not Wants.CHANGE and self.pool.take(ordered=wants is Wants.NEXT):
                continue  # it needed not wait
            waiter = Waiter(lambda: None, wants)
            waiter.wake = lambda waiter=waiter: self._wake(waiter)  # type: ignore[misc]
            self.asleep.append(waiter)
            self.pool.wait(waiter)

    def _wake(self, waiter: Waiter) -> None:
        self.asleep.remove(waiter)
        self.awake.append(waiter)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Some jobs are over."""
        for each in data.draw(st.lists(st.sampled_from(self.open), unique=True)):
            self.open.remove(each)
            finish(self.pool, each)

    @precondition(lambda self: self.awake)
    @rule(data=st.data(), is_cancelled=st.booleans())
    def look(self, data: st.DataObject, is_cancelled: bool) -> None:
        """One that was woken takes what it can, unless it has been cancelled."""
        self._look(data.draw(st.sampled_from(self.awake)), is_cancelled=is_cancelled)

    def _look(self, waiter: Waiter, *, is_cancelled: bool = False) -> None:
        self.awake.remove(waiter)
        if not is_cancelled and waiter.wants is not Wants.CHANGE:
            each = self.pool.take(ordered=waiter.wants is Wants.NEXT)
            self.taken += [each] if each else []
        self.pool.leave(waiter)

    @precondition(lambda self: self.asleep)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """One that waits is cancelled."""
        waiter = data.draw(st.sampled_from(self.asleep))
        self.asleep.remove(waiter)
        self.pool.leave(waiter)

    @rule(ordered=st.booleans())
    def pass_by(self, ordered: bool) -> None:
        """Somebody takes a result without having waited."""
        self.pool.take(ordered=ordered)

    @precondition(lambda self: self.taken)
    @rule()
    def give_back(self) -> None:
        """Results that were taken and not delivered come back."""
        self.pool.restore(self.taken)
        self.taken = []

    @rule()
    def close(self) -> None:
        """All are to look."""
        everybody = [*self.asleep, *self.awake]
        self.pool.wake_all()
        while self.awake:
            self._look(self.awake[0])
        assert not set(everybody) & set(self.asleep)

    @invariant()
    def few_are_awake(self) -> None:
        """What they do is done in one turn of the loop."""
        assert len(self.awake) <= 32

    def teardown(self) -> None:
        """Once all that are awake have looked, no result lies there for one that sleeps."""
        while self.awake:
            self._look(self.awake[0])
        wants = {waiter.wants for waiter in self.asleep}
        assert Wants.ANY not in wants or not self.pool.n_ready
        assert Wants.NEXT not in wants or self.pool.take(ordered=True) is None


TestCollectors = Collectors.TestCase


def test_a_result_wakes_one_collector() -> None:
    """And ten wake ten, whatever the order in which those then look."""
    pool, woken = Pool(), []
    entries = [entry(seq, pool) for seq in range(20)]
    for each in entries:
        pool.add(each)
        pool.wait(Waiter(lambda: woken.append(1), Wants.ANY))
    finish(pool, entries[7])
    assert len(woken) == 1
    for each in entries[8:17]:
        finish(pool, each)
    assert len(woken) == 10


def test_giving_back_costs_what_is_given_back() -> None:
    """Not what else is in the pool, however often it is done."""
    pool = Pool()
    entries = [entry(seq, pool) for seq in range(50_000)]
    for each in entries:
        pool.add(each)
        finish(pool, each)
    began = time.process_time()
    for _ in range(2_000):
        taken = pool.take()
        assert taken is entries[0]
        pool.restore([taken])
    assert time.process_time() - began < 2
    assert pool.unfinished() == []
    assert pool.take(ordered=True) is entries[0]
