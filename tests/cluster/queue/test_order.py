"""Who is admitted and who waits, decided without a cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity import Need, first_without_room, totals
from cluster.queue.order import MOST_PASSED, SILENT_S, Entry, Order, Place

Node = dict[str, float]


def family(key: str, cpus: float, user: str = "ann", priority: int = 0, gpus: float = 0.0, count: int = 1) -> Entry:
    return Entry(key, user, ((Need(key, count, cpus, gpus),),), priority)


class Cluster:
    """An order with a clock and nodes that a test sets, and drivers that say that they are there."""

    def __init__(self, *nodes: float, order: Order | None = None) -> None:
        self.nodes: list[Node] = [{"CPU": cpus} for cpus in nodes]
        self.order = order or Order()
        self.now = 0.0
        self.drivers: dict[str, Entry] = {}

    def renew(self, entry: Entry) -> Place:
        self.now += 0.01
        place = self.order.renew(self.drivers.get(entry.key, entry), self.now, 1000.0 + self.now, self.nodes)
        self.drivers[entry.key] = place.entry
        return place

    def enter(self, *entries: Entry) -> None:
        for entry in entries:
            self.renew(entry)

    def end(self, key: str) -> None:
        del self.drivers[key]
        self.order.leave(key)
        self.all_renew()

    def all_renew(self) -> None:
        for entry in list(self.drivers.values()):
            self.renew(entry)

    @property
    def running(self) -> set[str]:
        return {entry.key for entry in self.order.admitted()}

    @property
    def waiting(self) -> list[str]:
        return [entry.key for entry in self.order.waiting(self.nodes)]


CASES: dict[str, tuple[list[float], list[Entry], set[str], list[str]]] = {
    "one that is alone": ([2], [family("a", 2)], {"a"}, []),
    "all that fit": ([2, 1], [family("a", 2), family("b", 1)], {"a", "b"}, []),
    "no sum over nodes": ([1.5, 1.5], [family("a", 1), family("b", 1), family("c", 1)], {"a", "b"}, ["c"]),
    "who came first, for one user": ([1], [family("a", 1), family("b", 1), family("c", 1)], {"a"}, ["b", "c"]),
    "priority": ([1], [family("a", 1), family("b", 1), family("c", 1, priority=1)], {"a"}, ["c", "b"]),
    "the user who holds nothing": ([1], [family("a", 1), family("b", 1), family("c", 1, "bob")], {"a"}, ["c", "b"]),
    "users in turn": (
        [1],
        [family("a", 1), *(family(f"a{n}", 1) for n in range(2)), *(family(f"b{n}", 1, "bob") for n in range(2))],
        {"a"},
        ["b0", "a0", "b1", "a1"],
    ),
    "a small one past one that does not fit": (
        [2],
        [family("a", 1), family("b", 2), family("c", 1)],
        {"a", "c"},
        ["b"],
    ),
    "one that no node can hold holds nobody up": ([2], [family("a", 3), family("b", 2)], {"b"}, ["a"]),
}


@pytest.mark.parametrize(("nodes", "entries", "running", "waiting"), CASES.values(), ids=CASES)
def test_who_runs_and_who_waits(
    nodes: list[float], entries: list[Entry], running: set[str], waiting: list[str]
) -> None:
    cluster = Cluster(*nodes)
    cluster.enter(*entries)
    assert (cluster.running, cluster.waiting) == (running, waiting)


def test_a_driver_is_told_its_place_and_who_runs_beside_it() -> None:
    cluster = Cluster(3)
    cluster.enter(family("a", 2), family("b", 2), family("c", 3))
    place = cluster.renew(family("c", 3))
    assert (place.number, place.waiting, place.running, place.fits, place.settled) == (2, 2, 1, True, True)
    assert place.others == [Need("a", 1, 2, 0)]
    admitted = cluster.renew(family("a", 2))
    assert (admitted.number, admitted.others, admitted.entry.admitted) == (0, [], True)


def test_the_larger_share_of_cpus_or_gpus_counts() -> None:
    cluster = Cluster()
    cluster.nodes = [{"CPU": 100.0, "GPU": 4.0}]
    # Ann holds half of the GPUs and hardly any CPU, Bob a third of the CPUs.
    cluster.enter(family("a", 1, "ann", gpus=2), family("b", 33, "bob"), family("c", 66, "eve"))
    assert cluster.running == {"a", "b", "c"}
    cluster.enter(family("a2", 34, "ann"), family("b2", 34, "bob"))
    assert cluster.waiting == ["b2", "a2"]


def test_an_end_lets_the_next_one_in() -> None:
    cluster = Cluster(2)
    cluster.enter(family("a", 2), family("b", 2), family("c", 2))
    cluster.end("a")
    assert (cluster.running, cluster.waiting) == ({"b"}, ["c"])
    cluster.end("c")
    cluster.end("b")
    assert (cluster.running, cluster.waiting) == (set(), [])


def test_an_end_that_nobody_knows_of_is_no_mistake() -> None:
    cluster = Cluster(2)
    cluster.order.leave("nobody")
    cluster.enter(family("a", 2))
    assert cluster.running == {"a"}


def test_one_whose_driver_is_silent_is_dropped_and_not_before_its_time() -> None:
    cluster = Cluster(2)
    cluster.enter(family("a", 2), family("b", 2), family("c", 2))
    cluster.now += SILENT_S - 1
    assert cluster.renew(family("c", 2)).number == 2
    cluster.now += 2
    assert cluster.renew(family("c", 2)).entry.admitted
    assert (cluster.running, cluster.waiting) == ({"c"}, [])
    # A driver that had only been asleep has its place still.
    assert cluster.renew(family("a", 2)).entry.admitted


def test_one_that_runs_stays_admitted_when_its_node_is_gone() -> None:
    cluster = Cluster(2, 2)
    cluster.enter(family("a", 2), family("b", 2))
    cluster.nodes.pop()
    cluster.enter(family("c", 2))
    cluster.all_renew()
    assert (cluster.running, cluster.waiting) == ({"a", "b"}, ["c"])


def test_a_family_that_is_larger_at_its_end_needs_both() -> None:
    stages = ((Need("training", 1, 1, 0),), (Need("serving", 3, 1, 0),))
    cluster = Cluster(4)
    cluster.enter(Entry("a", "ann", stages), family("b", 1), family("c", 1))
    assert (cluster.running, cluster.waiting) == ({"a", "b"}, ["c"])


def test_one_that_fits_alone_in_each_of_its_stages_is_admitted_alone_and_beside_nobody() -> None:
    stages = ((Need("a", 1, 3, 0), Need("b", 1, 1, 0)), (Need("serving", 2, 2, 0),))
    cluster = Cluster(4)
    cluster.enter(Entry("a", "ann", stages))
    assert totals(cluster.drivers["a"].needs)[0] > 4
    cluster.enter(family("b", 0.1))
    assert (cluster.running, cluster.waiting) == ({"a"}, ["b"])


def test_the_first_is_passed_a_few_times_and_then_nobody_goes_before_it() -> None:
    cluster = Cluster(4)
    cluster.enter(family("small", 1), family("large", 4))
    cluster.enter(*(family(f"s{n}", 0.1) for n in range(MOST_PASSED + 2)))
    assert cluster.running == {"small", *(f"s{n}" for n in range(MOST_PASSED))}
    assert cluster.waiting[0] == "large"
    # Neither does a user who holds nothing; only a higher priority does.
    cluster.enter(family("bob", 0.1, "bob"), family("urgent", 0.1, priority=1))
    assert "urgent" in cluster.running
    assert "bob" not in cluster.running
    for key in sorted(cluster.running):
        cluster.end(key)
    assert "large" in cluster.running


def test_one_that_was_passed_so_often_stays_first_when_somebody_who_came_before_it_holds_nothing_any_more() -> None:
    cluster = Cluster(4)
    cluster.enter(family("bob0", 2, "bob"), family("ann0", 1), family("bob1", 2, "bob"), family("large", 4))
    cluster.enter(*(family(f"s{n}", 0.1) for n in range(MOST_PASSED)))
    assert cluster.waiting == ["large", "bob1"]
    cluster.end("bob0")
    assert cluster.waiting == ["large", "bob1"]


def test_a_queue_that_has_died_knows_order_and_admission_again_from_its_drivers() -> None:
    cluster = Cluster(4)
    cluster.enter(family("a", 1), family("large", 4), family("b", 1, "bob"), family("c", 4), family("d", 4, priority=1))
    before = (cluster.running, cluster.waiting, {entry.key: entry.passed for entry in cluster.order.waiting([])})
    cluster.all_renew()
    cluster.order = Order(settled_at=cluster.now + 10)
    # Those who wait come first, and are not let in while the others may still be coming back.
    backwards = sorted(cluster.drivers.values(), key=lambda entry: entry.admitted)
    assert not any(cluster.renew(entry).entry.admitted for entry in backwards if not entry.admitted)
    assert not cluster.renew(family("large", 4)).settled
    cluster.all_renew()
    cluster.now += 11
    cluster.all_renew()
    after = (cluster.running, cluster.waiting, {entry.key: entry.passed for entry in cluster.order.waiting([])})
    assert after == before
    assert after[2]["d"] == 0 and cluster.renew(family("c", 4)).settled


def test_an_answer_that_got_lost_does_not_take_a_place_away() -> None:
    cluster = Cluster(1)
    entry = family("a", 1)
    cluster.renew(entry)
    cluster.drivers["a"] = entry  # its driver never heard that it was admitted
    assert cluster.renew(entry).entry.admitted
    assert len(cluster.order.admitted()) == 1


AMOUNTS = st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0, 3.0])
GPUS = st.sampled_from([0.0, 0.0, 0.5, 1.0])
NEEDS = st.lists(st.builds(Need, st.just("x"), st.integers(1, 3), AMOUNTS, GPUS), min_size=1, max_size=3).map(tuple)
NODES = st.lists(st.fixed_dictionaries({"CPU": st.sampled_from([1.0, 2.0, 4.0]), "GPU": st.integers(0, 2)}), max_size=3)
ENTRIES = st.builds(
    Entry,
    st.integers(0, 10**9).map(str),
    st.sampled_from(["ann", "bob", "eve"]),
    st.lists(NEEDS, min_size=1, max_size=2).map(tuple),
    st.integers(0, 1),
)
EVENTS: Any = st.lists(st.one_of(ENTRIES, st.integers(0, 5), st.just("silence")), max_size=25)


@given(NODES, EVENTS)
def test_whatever_happens_it_admits_no_more_than_fits_and_passes_nobody_too_often(
    nodes: list[Node], events: list[Any]
) -> None:
    cluster = Cluster()
    cluster.nodes = nodes
    for event in events:
        before = {entry.key for entry in cluster.order.admitted()}
        if isinstance(event, Entry):
            cluster.enter(event)
        elif event == "silence":
            cluster.now += SILENT_S + 1
            cluster.drivers = {key: entry for key, entry in cluster.drivers.items() if key in before}
        elif cluster.drivers:
            cluster.end(sorted(cluster.drivers)[event % len(cluster.drivers)])
        cluster.all_renew()
        admitted = cluster.order.admitted()
        for entry in admitted:
            assert all(first_without_room(stage, nodes) is None for stage in entry.stages)
        for kind, name in enumerate(("CPU", "GPU")):
            # Each at the stage in which it holds the most.
            held = sum(max(totals(stage)[kind] for stage in entry.stages) for entry in admitted)
            assert held <= sum(node.get(name, 0) for node in nodes) + 1e-6
        waiting = cluster.order.waiting(nodes)
        assert all(entry.passed <= MOST_PASSED for entry in waiting)
        # Nobody keeps a cluster idle.
        if not admitted:
            assert not any(all(first_without_room(s, nodes) is None for s in entry.stages) for entry in waiting)


@given(st.lists(st.tuples(st.sampled_from(["ann", "bob", "eve"]), AMOUNTS), min_size=40, max_size=40), st.data())
def test_a_large_one_gets_in_however_many_small_ones_keep_coming(
    small: list[tuple[str, float]], data: st.DataObject
) -> None:
    cluster = Cluster(4)
    cluster.enter(family("first", 1, "bob"), family("large", 4, "ann"))
    for number, (user, cpus) in enumerate(small):
        cluster.enter(family(f"s{number}", min(cpus, 2.0), user))
        if number % 2:
            running = sorted(cluster.running)
            cluster.end(running[data.draw(st.integers(0, len(running) - 1))])
        if "large" in cluster.running or "large" not in cluster.drivers:
            return
    # By now it is the first of all, and only those that ran before it may still be running.
    assert cluster.waiting[0] == "large"
    for key in sorted(cluster.running):
        cluster.end(key)
    assert cluster.running == {"large"}


@given(st.lists(st.sampled_from(["ann", "bob"]), min_size=2, max_size=30), st.integers(1, 4))
def test_two_users_who_both_wait_hold_the_same_to_within_one_family(users: list[str], places: int) -> None:
    cluster = Cluster(float(places))
    cluster.enter(*(family(f"{number:02}", 1, user) for number, user in enumerate(users)))
    for _ in range(len(users)):
        # Which one ends is not chosen, so that of those who have more, one ends.
        running = cluster.order.admitted()
        held = {user: sum(entry.user == user for entry in running) for user in ("ann", "bob")}
        ends = next((e for e in running if held[e.user] == max(held.values())), None)
        if ends is None:
            return
        cluster.end(ends.key)
        if {entry.user for entry in cluster.order.waiting(cluster.nodes)} == {"ann", "bob"}:
            now = [sum(e.user == user for e in cluster.order.admitted()) for user in ("ann", "bob")]
            was = abs(held["ann"] - held["bob"])
            assert abs(now[0] - now[1]) <= max(1, was - 1)


def test_an_entry_that_is_told_nothing_new_stays_as_it_was() -> None:
    cluster = Cluster(1)
    cluster.enter(family("a", 1), family("b", 1))
    since = cluster.drivers["b"].since
    cluster.all_renew()
    assert cluster.drivers["b"] == replace(family("b", 1), since=since)
