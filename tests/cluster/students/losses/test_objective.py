"""What a spec's loss means at one batch: its ramps, and where T comes from."""

import itertools
from typing import Any

import pytest

from cluster.spec import DenseLabels, HiddenLabels, LabelsSpec, LossSpec, SampledLabels, TopKLabels
from cluster.students.losses.objective import Objective, objective_at

DENSE, HIDDEN = DenseLabels(kind="dense"), HiddenLabels(kind="hidden")


def soft(ramp: dict[str, Any], total: int) -> list[float]:
    loss = LossSpec.model_validate({"soft": ramp})
    return [objective_at(loss, TopKLabels(), batch, total).soft for batch in range(total)]


def temperature(labels: LabelsSpec, given: Any = None, batch: int = 0, total: int = 10) -> float:
    return objective_at(LossSpec.model_validate({"temperature": given}), labels, batch, total).temperature


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.25), (0.5, 0.5)])
@pytest.mark.parametrize("total", [2, 3, 10, 1001])
def test_a_ramp_meets_its_ends_at_the_first_and_the_last_batch(
    shape: str, start: float, end: float, total: int
) -> None:
    values = soft({"start": start, "end": end, "shape": shape}, total)
    assert (values[0], values[-1]) == (start, end)
    up = sorted(values, reverse=start > end)
    assert values == up


def test_a_linear_ramp_is_a_line() -> None:
    assert soft({"start": 0.0, "end": 1.0}, 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_cosine_ramp_is_slow_at_both_ends_and_half_way_in_the_middle() -> None:
    values = soft({"start": 0.0, "end": 1.0, "shape": "cosine"}, 101)
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert values[50] == pytest.approx(0.5)
    assert values[25] == pytest.approx(0.5 - 0.5**1.5)
    assert steps.index(max(steps)) in (49, 50)
    assert max(steps[0], steps[-1]) < 0.1 * max(steps)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("over", "last"), [(0.5, 49), (0.1, 9), (0.01, 1), (0.001, 1), (1.0, 99)])
def test_a_ramp_over_a_share_of_the_batches_stays_at_its_end(shape: str, over: float, last: int) -> None:
    values = soft({"start": 0.25, "end": 0.75, "over": over, "shape": shape}, 100)
    assert values[0] == 0.25
    assert values[last - 1] < values[last]
    assert set(values[last:]) == {0.75}


def test_a_single_batch_is_the_first_one() -> None:
    assert soft({"start": 0.25, "end": 0.75}, 1) == [0.25]


def test_a_batch_past_the_last_one_stays_at_the_end() -> None:
    loss = LossSpec.model_validate({"soft": {"start": 0.0, "end": 1.0}})
    assert objective_at(loss, DENSE, 25, 10).soft == 1.0


@pytest.mark.parametrize("labels", [TopKLabels(temperature=2.5), SampledLabels(kind="sampled", temperature=2.5)])
def test_labels_that_are_made_at_a_temperature_bring_it_with_them(labels: LabelsSpec) -> None:
    assert temperature(labels) == 2.5
    assert temperature(labels, 2.5) == 2.5


@pytest.mark.parametrize("labels", [DENSE, HIDDEN])
def test_exact_labels_take_the_loss_s_temperature(labels: LabelsSpec) -> None:
    assert temperature(labels, 3.0) == 3.0
    ramp = {"start": 4.0, "end": 1.0}
    assert [temperature(labels, ramp, batch, 4) for batch in range(4)] == [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("labels", [DENSE, HIDDEN, TopKLabels(), SampledLabels(kind="sampled")])
def test_where_nothing_is_said_the_temperature_is_one(labels: LabelsSpec) -> None:
    assert temperature(labels) == 1.0


def test_a_loss_of_defaults_is_mostly_forward_kl() -> None:
    assert objective_at(LossSpec(), TopKLabels(), 3, 10) == Objective(0.1, 0.9, 1.0, "forward_kl", 0.5)


@pytest.mark.parametrize(
    ("divergence", "mix"), [("jensen_shannon", 0.5), ("skewed_kl", 0.1), ("skewed_reverse_kl", 0.1)]
)
def test_a_mixture_has_its_own_default(divergence: str, mix: float) -> None:
    silent = LossSpec.model_validate({"divergence": divergence})
    given = LossSpec.model_validate({"divergence": divergence, "mix": 0.7})
    assert objective_at(silent, DENSE, 0, 1) == Objective(0.1, 0.9, 1.0, divergence, mix)
    assert objective_at(given, DENSE, 0, 1).mix == 0.7
