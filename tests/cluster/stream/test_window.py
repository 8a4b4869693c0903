"""Which batches are fetched and forgotten: the window at the slowest student, or with a store at the fastest."""

import pytest

from cluster.stream.window import READ_AHEAD, Window

SIZE, TOTAL = 4, 20


def window(stored: bool, ready: tuple[int, ...] = (), safe: tuple[int, ...] = ()) -> Window:
    made = Window(SIZE, TOTAL, stored, safe=set(safe))
    made.ready = {number: [] for number in ready}
    return made


def fetch_all(at: Window, positions: list[int], save: bool = True) -> list[int]:
    """Fetch until nothing more may be; every batch arrives, and is saved where there is a store that takes it."""
    fetched = []
    while (number := at.next_to_fetch(positions)) is not None:
        fetched.append(number)
        at.ready[number] = []
        if save:
            at.safe.add(number)
    return fetched


def test_without_a_store_the_slowest_student_sets_the_end() -> None:
    assert fetch_all(window(stored=False), [3, 9]) == [3, 4, 5, 6]


def test_with_a_store_the_fastest_sets_the_end_and_a_laggard_reads_a_little_ahead() -> None:
    assert fetch_all(window(stored=True), [3, 9]) == [3, 4, 9, 10, 11, 12]


@pytest.mark.parametrize("stored", [False, True])
def test_nothing_past_the_end_is_fetched(stored: bool) -> None:
    assert fetch_all(window(stored), [TOTAL - 2]) == [TOTAL - 2, TOTAL - 1]
    assert fetch_all(window(stored), [TOTAL]) == []


@pytest.mark.parametrize("stored", [False, True])
def test_what_is_on_its_way_is_not_fetched_twice(stored: bool) -> None:
    at = window(stored)
    at.in_flight = {0, 1}
    assert at.next_to_fetch([0]) == 2


def test_without_a_store_a_batch_is_kept_until_the_slowest_has_passed_it() -> None:
    at = window(stored=False, ready=(2, 3, 4, 5))
    at.forget([5, 4])
    assert set(at.ready) == {3, 4, 5}


def test_with_a_store_what_is_safe_and_far_from_every_student_is_forgotten() -> None:
    at = window(stored=True, ready=tuple(range(2, 12)), safe=tuple(range(2, 12)))
    at.forget([3, 9])
    assert set(at.ready) == {2, 3, 4, 8, 9, 10, 11}


def test_what_is_not_safe_is_kept_for_the_slowest() -> None:
    at = window(stored=True, ready=tuple(range(2, 12)), safe=(6,))
    at.forget([3, 9])
    assert set(at.ready) == set(range(2, 12)) - {6}


def test_a_store_that_takes_nothing_stops_the_fast_but_never_the_slowest() -> None:
    at = window(stored=True)
    assert fetch_all(at, [0, 0], save=False) == [0, 1, 2, 3]
    # The fast one has read all four; nothing may be forgotten, so it waits.
    assert at.next_to_fetch([0, 4]) is None
    at.forget([1, 4])
    assert at.next_to_fetch([1, 4]) is None
    at.forget([4, 4])
    assert at.next_to_fetch([4, 4]) == 4


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_every_student_gets_every_batch_and_memory_stays_bounded(stored: bool, save: bool) -> None:
    at, positions, most = window(stored), [0, 0, 0], 0
    paces = (1, 2, 5)
    for turn in range(400):
        fetch_all(at, positions, save)
        most = max(most, len(at.ready))
        for student, pace in enumerate(paces):
            if turn % pace == 0 and positions[student] < TOTAL:
                # A batch that is there is read; one that is not is waited for.
                positions[student] += positions[student] in at.ready
        at.forget(positions)
    assert positions == [TOTAL] * 3
    assert most <= 2 * SIZE + len(paces) * (READ_AHEAD + 1)


def test_when_nobody_is_left_nothing_is_kept() -> None:
    at = window(stored=True, ready=(1, 2))
    at.forget([])
    assert not at.ready
