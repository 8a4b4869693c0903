"""The draw: shares as weighted, the same caller the same arm, and nobody moved who need not be."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.split import choose, point

UNITS = [f"user:{number}" for number in range(20_000)]


def shares(weights: dict[str, float], **more: object) -> Counter[str]:
    return Counter(choose(weights, unit, **more) for unit in UNITS)  # type: ignore[arg-type]


def test_shares_are_the_weights() -> None:
    """Within four standard deviations; the units are fixed, so this does not vary from run to run."""
    drawn = shares({"a": 1, "b": 2, "c": 7, "never": 0})
    for arm, share in (("a", 0.1), ("b", 0.2), ("c", 0.7)):
        assert abs(drawn[arm] - share * len(UNITS)) < 4 * math.sqrt(len(UNITS) * share * (1 - share))
    assert drawn["never"] == 0


def test_one_caller_one_arm_whatever_the_order() -> None:
    assert [choose({"a": 1, "b": 3}, unit) for unit in UNITS[:500]] == [
        choose({"b": 3, "a": 1}, unit) for unit in UNITS[:500]
    ]


def test_a_weight_that_grows_only_draws_to_itself() -> None:
    before, after = {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}
    moves = Counter((choose(before, unit), choose(after, unit)) for unit in UNITS)
    assert {new for (old, new) in moves if old != new} == {"c"}
    moved = sum(count for (old, new), count in moves.items() if old != new)
    assert abs(moved / len(UNITS) - (1 / 2 - 1 / 3)) < 0.01  # no more than the shares ask for


def test_an_arm_that_is_out_gives_its_callers_to_the_others_and_gets_them_back() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    for unit in UNITS[:2000]:
        usual, now = choose(weights, unit), choose(weights, unit, out=["b"])
        assert now in ("a", "c")
        assert usual == "b" or now == usual


def test_nobody_is_left() -> None:
    assert choose({"a": 1, "b": 0}, "user:1", out=["a"]) is None
    assert choose({}, "user:1") is None


@given(st.text(), st.text())
def test_points_lie_inside(one: str, other: str) -> None:
    assert 0 < point(one, other) < 1


def test_parts_are_kept_apart() -> None:
    assert point("ab", "c") != point("a", "bc")
    assert choose({"a": 1}, "\ud800") == "a"  # half a character is a unit like any other
