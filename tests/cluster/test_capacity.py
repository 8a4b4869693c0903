"""Whether a family fits, said before anything is started."""

from typing import Any

import pytest

from cluster import capacity
from cluster.capacity import Need, check_capacity, most_of, needs_of, serving_needs_of
from cluster.errors import RunError, UserError
from cluster.spec import FamilySpec
from tests.tiny import tiny_family

Node = dict[str, float]


def cpu(*amounts: float) -> list[Node]:
    return [{"CPU": amount} for amount in amounts]


FITS: dict[str, tuple[list[Need], list[Node]]] = {
    "exactly": ([Need("the teacher", 1, 1, 0), Need("student a", 1, 1, 0)], cpu(2)),
    "shares that do not add up exactly": (
        [Need("a", 1, 0.6, 0), Need("b", 1, 0.7, 0), Need("c", 1, 0.7, 0)],
        cpu(2),
    ),
    "tenths that leave a little less": ([Need("a", 1, 0.9, 0), Need("b", 1, 0.1, 0)], cpu(1)),
    "one rank a node": ([Need("student a", 2, 3, 0)], cpu(4, 4)),
    "both ranks on one node": ([Need("student a", 2, 3, 0)], cpu(6)),
    "the large one although the small ones come first": ([Need("a", 2, 1, 0), Need("b", 1, 4, 0)], cpu(4, 2)),
    "the one with a GPU before those without": (
        [Need("a", 1, 2, 0), Need("b", 1, 1, 1)],
        [{"CPU": 2, "GPU": 1}, {"CPU": 2}],
    ),
    "half a GPU each": ([Need("the teacher", 2, 1, 0.5)], [{"CPU": 2, "GPU": 1}]),
    "nothing on nothing": ([], []),
}


@pytest.mark.parametrize(("needs", "nodes"), FITS.values(), ids=FITS)
def test_what_can_be_placed_is_let_through(needs: list[Need], nodes: list[Node]) -> None:
    check_capacity(needs, nodes)


TOO_BIG: dict[str, tuple[list[Need], list[Node], str]] = {
    "one process above every node": ([Need("student a", 1, 5, 0)], cpu(4, 4), "student a needs 1 x (5 CPU)"),
    "the sum on one node": ([Need("a", 2, 3, 0)], cpu(5), "a needs 2 x (3 CPU)"),
    "a hundredth too much": ([Need("a", 1, 0.61, 0), Need("b", 2, 0.7, 0)], cpu(2), "a needs 1 x (0.61 CPU)"),
    "two on one GPU": ([Need("a", 2, 1, 1)], [{"CPU": 8, "GPU": 1}], "a needs 2 x (1 CPU and 1 GPU)"),
    "a GPU where there is none": ([Need("a", 1, 1, 1)], cpu(8), "a needs 1 x (1 CPU and 1 GPU)"),
    "the GPU and the CPUs on different nodes": (
        [Need("a", 1, 4, 1)],
        [{"CPU": 8}, {"CPU": 1, "GPU": 1}],
        "a needs 1 x (4 CPU and 1 GPU)",
    ),
    "no node": ([Need("a", 1, 1, 0)], [], "no node"),
}


@pytest.mark.parametrize(("needs", "nodes", "said"), TOO_BIG.values(), ids=TOO_BIG)
def test_what_cannot_be_placed_is_refused(needs: list[Need], nodes: list[Node], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_capacity(needs, nodes)
    assert said in str(caught.value)


def test_the_refusal_says_all_that_is_needed_and_what_there_is() -> None:
    with pytest.raises(UserError) as caught:
        check_capacity([Need("the teacher", 2, 1.5, 0), Need("student a", 1, 2, 1)], [{"CPU": 3, "GPU": 1}, {"CPU": 1}])
    message = str(caught.value)
    parts = [
        "the teacher needs 2 x (1.5 CPU)",
        "student a needs 1 x (2 CPU and 1 GPU)",
        "3 CPU, 1 GPU + 1 CPU, 0 GPU",
    ]
    assert [part for part in parts if part not in message] == []


def test_a_family_needs_every_shard_of_every_replica_and_every_rank() -> None:
    shape: dict[str, Any] = tiny_family()["students"]["small"]
    tree = tiny_family(
        teacher={"replicas": 2, "shards": 3, "cpus_per_shard": 0.5, "gpus_per_shard": 1},
        students={"wide": {**shape, "ranks": 4, "cpus_per_rank": 2}},
    )
    assert needs_of(FamilySpec.model_validate(tree)) == [
        Need("the teacher", 6, 0.5, 1.0),
        Need("student small", 1, 1.0, 0.0),
        Need("student wide", 4, 2.0, 0.0),
    ]


def test_an_elastic_teacher_needs_its_least_replicas_from_the_start() -> None:
    tree = tiny_family(teacher={"replicas": {"min": 2, "max": 9}, "shards": 2})
    assert needs_of(FamilySpec.model_validate(tree))[0] == Need("the teacher", 4, 1.0, 0.0)


def test_serving_needs_an_arm_for_every_student_and_one_for_the_teacher() -> None:
    tree = tiny_family(serving={"cpus_per_arm": 0.4})
    assert serving_needs_of(FamilySpec.model_validate(tree)) == [Need("serving", 2, 0.4, 0.0)]
    without = tiny_family(serving={"include_teacher": False, "gpus_per_arm": 1.0})
    assert serving_needs_of(FamilySpec.model_validate(without)) == [Need("serving", 1, 0.5, 1.0)]
    assert serving_needs_of(FamilySpec.model_validate(tiny_family())) == []


@pytest.mark.parametrize(("promotion", "arms"), [({"latency": 0.0}, 5), ({"kl": 0.1}, 3)])
def test_serving_needs_the_champions_beside_the_students_where_latency_decides(
    promotion: dict[str, Any], arms: int
) -> None:
    shape: dict[str, Any] = tiny_family()["students"]["small"]
    tree = tiny_family(serving={}, promotion=promotion, students={"large": shape})
    assert serving_needs_of(FamilySpec.model_validate(tree)) == [Need("serving", arms, 0.5, 0.0)]


MOST: dict[str, tuple[list[list[Need]], list[Need]]] = {
    "one stage": ([[Need("a", 2, 1, 0)]], [Need("a", 2, 1, 0)]),
    "nothing": ([], []),
    "a second that fits into the first's places": (
        [[Need("a", 1, 1, 1)], [Need("s", 2, 0.5, 0.5)]],
        [Need("a", 1, 1, 1)],
    ),
    "a second that is larger": ([[Need("a", 2, 0.2, 0)], [Need("s", 2, 0.5, 0)]], [Need("s", 2, 0.5, 0)]),
    "a second with more processes": (
        [[Need("a", 1, 2, 0)], [Need("s", 3, 1, 0)]],
        [Need("a", 1, 2, 0), Need("s", 1, 1, 0)],
    ),
    "GPUs before CPUs": (
        [[Need("a", 1, 8, 0)], [Need("s", 1, 1, 1)]],
        [Need("a", 1, 8, 0), Need("s", 1, 1, 1)],
    ),
}


@pytest.mark.parametrize(("stages", "most"), MOST.values(), ids=MOST)
def test_stages_that_follow_each_other_share_their_places(stages: list[list[Need]], most: list[Need]) -> None:
    assert most_of(stages) == most


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A clock that a test sets."""
    now = {"s": 0.0}
    monkeypatch.setattr(capacity.time, "monotonic", lambda: now["s"])
    return now


def let_pass(unplaced: capacity.Unplaced, clock: dict[str, float], seconds: int, *without: str) -> None:
    """Look once a second while these students have no rank running."""
    for _ in range(seconds):
        clock["s"] += 1
        unplaced.look(without)


def test_a_student_without_a_place_ends_the_run_after_its_patience(clock: dict[str, float]) -> None:
    spec = FamilySpec.model_validate(tiny_family(patience_s=60.0))
    unplaced = capacity.Unplaced(spec, lambda: True, lambda: [{"CPU": 0.5}])
    let_pass(unplaced, clock, 59, "small")
    with pytest.raises(RunError, match=r"student small needs 1 x \(1 CPU\) .* 60 s; there is 0.5 CPU.*--resume"):
        let_pass(unplaced, clock, 1, "small")


def test_a_student_is_shown_as_waiting_only_once_it_has_waited_for_a_while(clock: dict[str, float]) -> None:
    pending = [False]
    unplaced = capacity.Unplaced(FamilySpec.model_validate(tiny_family()), lambda: pending[0], list)
    let_pass(unplaced, clock, 60, "small")  # it has its place, and starts
    assert unplaced.waiting == []
    pending[0] = True
    let_pass(unplaced, clock, 9, "small")
    assert unplaced.waiting == []
    let_pass(unplaced, clock, 1, "small")
    assert unplaced.waiting == ["small"]
    let_pass(unplaced, clock, 1)  # it runs
    assert unplaced.waiting == []


def test_only_the_time_without_a_place_counts(clock: dict[str, float]) -> None:
    spec = FamilySpec.model_validate(tiny_family(patience_s=60.0))
    pending = [True]
    unplaced = capacity.Unplaced(spec, lambda: pending[0], list)
    let_pass(unplaced, clock, 50, "small")
    pending[0] = False
    let_pass(unplaced, clock, 450, "small")  # it has a place, and starts its processes
    pending[0] = True
    let_pass(unplaced, clock, 1)  # it runs
    let_pass(unplaced, clock, 50, "small")  # it lost its ranks, and waits anew


def test_a_student_whose_processes_never_come_up_ends_the_run(clock: dict[str, float]) -> None:
    spec = FamilySpec.model_validate(tiny_family(patience_s=60.0))
    pending = [False]
    unplaced = capacity.Unplaced(spec, lambda: pending[0], list)
    let_pass(unplaced, clock, 900, "small")
    let_pass(unplaced, clock, 1)  # it ran for a moment
    let_pass(unplaced, clock, 900, "small")
    pending[0] = True
    let_pass(unplaced, clock, 50, "small")  # that it waits for a place counts apart
    pending[0] = False
    let_pass(unplaced, clock, 59, "small")
    with pytest.raises(RunError, match=r"student small had places .* come up for 960 s.*--resume"):
        let_pass(unplaced, clock, 1, "small")


def test_time_in_which_nobody_looked_is_nobody_s_patience(clock: dict[str, float]) -> None:
    spec = FamilySpec.model_validate(tiny_family(patience_s=60.0))
    unplaced = capacity.Unplaced(spec, lambda: True, list)
    let_pass(unplaced, clock, 1, "small")
    clock["s"] = 5000.0
    unplaced.look(["small"])
    with pytest.raises(RunError, match="has had no place"):
        let_pass(unplaced, clock, 60, "small")
