"""The experiment spec refuses what no experiment can be made of, in one sentence."""

from typing import Any

import pytest

from cluster.errors import UserError
from serving.experiment.guards import Alphas
from serving.experiment.spec import ExperimentSpec, parse_experiment

SMALLEST: dict[str, Any] = {"name": "small-v-large", "control": "large", "candidates": ["small"]}


def test_the_smallest_spec_compares_medians_of_whole_answers() -> None:
    spec = parse_experiment(SMALLEST)
    assert (spec.metric, spec.statistic, spec.gain, spec.confidence) == ("latency_ms", "p50", 0.05, 0.95)
    assert spec.weights() == {"large": 1.0, "small": 1.0}
    assert parse_experiment(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidates": []}, r"candidates: got \[\]; .*at least 1 item"),
        ({"candidates": ["large"]}, "each arm may be named once"),
        ({"control": None}, "control: got None"),
        ({"gains": 0.1}, "gains: no such field; there are name, control, .*gain"),
        ({"guards": {"errors": 0.1}}, "guards.errors: no such field; there are error_rate, kl"),
        ({"gain": 1.0}, "gain: got 1.0"),
        ({"confidence": 1.0}, "confidence: got 1.0"),
        ({"statistic": "p90"}, "statistic: got 'p90'; .*'p95'"),
        ({"traffic": {"large": 1}}, "traffic weighs large; give each of large, small a weight"),
        ({"traffic": {"large": 0, "small": 0}}, "traffic has only weights of 0"),
        ({"ramp": [{"after_s": 5, "weights": {}}]}, "ramp weighs nothing"),
        ({"ramp": [{"after_s": s, "weights": {"large": 1, "small": 1}} for s in (9, 5)]}, "in order"),
        ({"ramp": [{"weights": {"large": 1, "small": 1}}]}, "ramp.0.after_s: is required"),
        ({"cost_per_hour": {"huge": 1.0}}, "cost_per_hour names huge; allowed are large, small"),
        ({"guards": {"kl": 0.1}}, "guards.kl needs answers that the teacher scored"),
        ({"guards": {"agreement": 0.5}}, "guards.agreement needs answers"),
        ({"sample": 0.1}, "no teacher to score it"),
    ],
)
def test_refusals_say_what_is_allowed(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        parse_experiment(SMALLEST | change)
    assert "\n" not in str(refusal.value)


def alphas(candidates: int, **guards: float | None) -> Alphas:
    scored = {"sample": 0.1, "teacher": {"model": "t"}}
    names = [f"c{i}" for i in range(candidates)]
    return Alphas.of(ExperimentSpec.model_validate(SMALLEST | {"candidates": names, "guards": guards} | scored))


@pytest.mark.parametrize(("candidates", "guards"), [(1, {}), (3, {}), (2, {"kl": 1.0, "agreement": 0.5})])
def test_all_chances_of_a_mistake_add_up_to_what_confidence_leaves(candidates: int, guards: dict[str, float]) -> None:
    shares = alphas(candidates, **guards)
    assert candidates * (shares.comparison + (1 + len(guards)) * shares.guard) == pytest.approx(0.05)
    assert shares.comparison == pytest.approx(0.025 / candidates)


def test_without_guards_the_comparison_has_it_all() -> None:
    assert alphas(1, error_rate=None).comparison == pytest.approx(0.05)
