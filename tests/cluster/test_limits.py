"""The most that a family may hold, by its own spec and by whoever runs the cluster."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cluster.capacity import Need
from cluster.errors import UserError
from cluster.limits import Most, most_allowed
from cluster.spec import FamilySpec
from tests.tiny import tiny_family


def allowed(**sections: Any) -> Most:
    return most_allowed(FamilySpec.model_validate(tiny_family(**sections)))


def refusal(**sections: Any) -> str:
    with pytest.raises(UserError) as refused:
        allowed(**sections)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("own", "cluster", "most"),
    [
        ({}, {}, Most(math.inf, math.inf)),
        ({"cpus": 4}, {}, Most(4, math.inf)),
        ({}, {"STILLHOUSE_MAX_CPUS": "3", "STILLHOUSE_MAX_GPUS": "1"}, Most(3, 1)),
        ({"cpus": 4, "gpus": 2}, {"STILLHOUSE_MAX_CPUS": "3", "STILLHOUSE_MAX_GPUS": "8"}, Most(3, 2)),
        ({"cpus": 2}, {"STILLHOUSE_MAX_CPUS": ""}, Most(2, math.inf)),
    ],
)
def test_the_smaller_limit_counts(
    own: dict[str, float], cluster: dict[str, str], most: Most, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    assert allowed(limits=own) == most


def test_a_family_that_needs_more_than_its_own_limit_is_refused_by_the_field() -> None:
    message = refusal(limits={"cpus": 1.5})
    assert "limits.cpus: got 1.5, and the family needs at least 2 CPU at a time" in message
    assert "the teacher needs 1 x (1 CPU); student small needs 1 x (1 CPU)" in message
    assert "limits.gpus: got 0.5" in refusal(limits={"gpus": 0.5}, teacher={"gpus_per_shard": 1})


def test_what_the_comparison_of_the_endpoints_needs_counts_too() -> None:
    assert "serving needs 2 x (3 CPU)" in refusal(limits={"cpus": 5}, serving={"cpus_per_arm": 3})


def test_an_elastic_teacher_is_held_against_its_least_replicas() -> None:
    elastic = {"replicas": {"min": 1, "max": 9}}
    assert allowed(teacher=elastic, limits={"cpus": 2}) == Most(2, math.inf)


def test_a_family_that_needs_more_than_the_cluster_allows_is_told_whose_limit_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STILLHOUSE_MAX_CPUS", "1.5")
    message = refusal(limits={"cpus": 8})
    assert "the cluster allows a family 1.5 CPU (STILLHOUSE_MAX_CPUS)" in message
    assert "needs at least 2 CPU at a time" in message
    monkeypatch.setenv("STILLHOUSE_MAX_CPUS", "2")
    monkeypatch.setenv("STILLHOUSE_MAX_GPUS", "0.5")
    assert "(STILLHOUSE_MAX_GPUS)" in refusal(teacher={"gpus_per_shard": 1})


@pytest.mark.parametrize("given", ["many", "0", "-1", "inf", "nan"])
def test_a_limit_of_the_cluster_that_is_no_number_above_0_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_MAX_CPUS", given)
    assert f"STILLHOUSE_MAX_CPUS: got '{given}'" in refusal()


def test_tenths_that_do_not_add_up_exactly_are_within_a_limit() -> None:
    assert Most(cpus=0.3).allows([Need("a", 1, 0.1, 0), Need("b", 1, 0.2, 0)])
    assert not Most(cpus=0.3).allows([Need("a", 4, 0.1, 0)])
    assert not Most(gpus=1).allows([Need("a", 2, 1, 1)])
