"""When a pool grows and shrinks, on a clock that the test turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.teacher.scaling import Look, Pace, Scaling

PACE = Pace(look_s=1.0, grow_s=10.0, grow_share=0.5, idle_s=30.0, retry_s=20.0, retry_most_s=80.0)
# Of each second: whether all replicas are busy, and whether a student waits.
Load = Callable[[float, int], tuple[bool, bool]]


class Pool:
    """Does what the rule says at once, and keeps when it did."""

    def __init__(self, least: int, most: int, start_s: float = 0.0) -> None:
        self.scaling = Scaling(least, most, PACE, 0.0)
        self.now, self.size, self.ready, self.busy_at = 0.0, least, least, 0.0
        self.start_s, self.crowded = start_s, False
        self.changes: list[tuple[float, int]] = []

    def decide(self, busy: bool, waits: bool) -> int:
        """What the rule says a second later."""
        self.now += 1.0
        if busy:
            self.busy_at = self.now
        contended = busy and waits
        return self.scaling.decide(
            Look(self.now, self.size, self.ready, contended, self.busy_at, self.start_s, self.crowded)
        )

    def live(self, seconds: int, load: Load) -> None:
        for _ in range(seconds):
            if change := self.decide(*load(self.now, self.size)):
                self.size += change
                self.ready = self.size
                self.changes.append((self.now, self.size))
                self.scaling.resized(self.now)


def starved(_at: float, _size: int) -> tuple[bool, bool]:
    return True, True


def idle(_at: float, _size: int) -> tuple[bool, bool]:
    return False, False


def test_a_pool_grows_one_by_one_to_its_most_while_students_wait() -> None:
    pool = Pool(1, 4)
    pool.live(100, starved)
    assert [size for _, size in pool.changes] == [2, 3, 4]
    assert [at for at, _ in pool.changes] == [10, 20, 30]


def test_an_idle_pool_shrinks_one_by_one_to_its_least() -> None:
    pool = Pool(2, 4)
    pool.live(40, starved)
    pool.live(200, idle)
    assert [size for _, size in pool.changes] == [3, 4, 3, 2]
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(pool.changes[1:])]
    assert min(gaps) > PACE.idle_s


@pytest.mark.parametrize(("share", "grows"), [(0.3, False), (0.5, False), (0.7, True)])
def test_waiting_counts_by_its_share_of_the_time(share: float, grows: bool) -> None:
    pool = Pool(1, 2)
    pool.live(100, lambda at, _: (True, at % 10 < 10 * share))
    assert bool(pool.changes) is grows


@pytest.mark.parametrize("load", [(True, False), (False, True)], ids=["nobody waits", "a replica is free"])
def test_more_replicas_would_not_help(load: tuple[bool, bool]) -> None:
    pool = Pool(1, 2)
    pool.live(100, lambda *_: load)
    assert pool.changes == []


def test_a_replica_that_is_needed_now_and_then_stays() -> None:
    pool = Pool(1, 2)
    pool.live(15, starved)
    pool.live(200, lambda at, _: (at % 25 == 0, False))
    assert [size for _, size in pool.changes] == [2]


def test_a_replica_is_kept_idle_for_as_long_as_it_took_to_start() -> None:
    pool = Pool(1, 2, start_s=120.0)
    pool.live(15, starved)
    pool.live(110, idle)
    assert pool.size == 2
    pool.live(20, idle)
    assert pool.size == 1


def test_load_that_one_replica_cannot_carry_and_two_can_does_not_make_the_pool_swing() -> None:
    pool = Pool(1, 4)
    pool.live(1000, lambda at, size: (at % 4 < 4 / size, size == 1))
    assert [size for _, size in pool.changes] == [2]


def test_nothing_is_decided_while_a_replica_is_started_again() -> None:
    pool = Pool(2, 4)
    pool.ready = 1
    assert [pool.decide(True, True) for _ in range(30)] == [0] * 30
    pool.ready = 2
    assert [pool.decide(True, True) for _ in range(10)] == [0] * 9 + [1]


def test_a_busy_pool_makes_room_for_students_one_by_one_down_to_its_least() -> None:
    pool = Pool(1, 3)
    pool.live(25, starved)
    pool.crowded = True
    pool.live(25, starved)
    assert [size for _, size in pool.changes] == [2, 3, 2, 1]
    first, second = (at for at, _ in pool.changes[2:])
    assert first - 25 == second - first == PACE.grow_s + 1
    assert [pool.decide(True, True) for _ in range(5)] == [0] * 5


def test_a_pool_that_is_in_the_way_for_a_moment_stays() -> None:
    pool = Pool(1, 2)
    pool.live(15, starved)
    for _ in range(10):
        pool.crowded = True
        pool.live(int(PACE.grow_s), starved)
        pool.crowded = False
        pool.live(1, starved)
    assert [size for _, size in pool.changes] == [2]


def test_without_room_it_asks_again_after_each_span() -> None:
    pool, asked = Pool(1, 2), []
    for _ in range(45):
        if pool.decide(True, True):
            asked.append(pool.now)
            pool.scaling.no_room(pool.now)
    assert asked == [10, 20, 30, 40]


def test_after_one_that_did_not_come_up_it_waits_longer_each_time_and_forgets_in_the_end() -> None:
    pool, asked = Pool(1, 2), []
    for _ in range(500):
        if pool.decide(True, True):
            asked.append(pool.now)
            pool.scaling.failed(pool.now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps[:5] == [20, 40, 80, 80, 80]
    pool.live(200, idle)
    pool.live(10, starved)
    assert pool.size == 2
    pool.live(20, starved)
    pool.size = pool.ready = 1  # it did not live for long
    pool.scaling.failed(pool.now)
    assert [pool.decide(True, True) for _ in range(80)] == [0] * 79 + [1]
    pool.scaling.resized(pool.now)
    pool.live(200, lambda *_: (True, False))
    pool.scaling.failed(pool.now)
    assert [pool.decide(True, True) for _ in range(20)] == [0] * 19 + [1]


@given(
    bounds=st.tuples(st.integers(1, 4), st.integers(0, 4)),
    loads=st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=20),
)
def test_a_pool_keeps_its_bounds_and_never_turns_around_at_once(
    bounds: tuple[int, int], loads: list[tuple[int, bool, bool]]
) -> None:
    least, most = bounds[0], bounds[0] + bounds[1]
    pool = Pool(least, most)
    for seconds, busy, waits in loads:
        pool.live(seconds, lambda *_, load=(busy, waits): load)
    last_at, last_size = 0.0, least
    for at, size in pool.changes:
        assert least <= size <= most
        assert abs(size - last_size) == 1
        assert at - last_at >= (PACE.grow_s if size > last_size else PACE.idle_s)
        last_at, last_size = at, size
