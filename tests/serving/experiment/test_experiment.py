"""The experiment: it decides by its rules, at once and only then, and a restart changes nothing."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.experiment import Decision, Experiment, ExperimentSpec, Observation, Quality
from serving.experiment.history import ENTRIES
from serving.experiment.record import DEAD_AFTER

START = 1_800_000_000.0


def spec(**fields: Any) -> ExperimentSpec:
    return ExperimentSpec.model_validate({"name": "t", "control": "a", "candidates": ["b"], "gain": 0.0} | fields)


def latencies(rng: np.random.Generator, count: int) -> list[float]:
    return list(rng.lognormal(math.log(200), 0.3, count) * np.where(rng.random(count) < 0.02, 3, 1))


def answer(arm: str, at: float, latency_ms: float, tokens: int = 11) -> Observation:
    return Observation(arm, START + at, 7, tokens, latency_ms / 4, latency_ms)


def failure(arm: str, at: float) -> Observation:
    return Observation(arm, START + at, 7, error="arm_failed")


def traffic(
    seed: int, requests: int, scale: dict[str, float], errors: dict[str, float] | None = None
) -> list[Observation]:
    """Requests dealt to arms by lot, one a second; how long each arm takes is in ``scale``, how often it fails in
    ``errors``."""
    rng, arms = np.random.default_rng(seed), list(scale)
    dealt = rng.integers(len(arms), size=requests)
    failed = rng.random(requests)
    return [
        failure(arms[arm], i)
        if failed[i] < (errors or {}).get(arms[arm], 0.0)
        else answer(arms[arm], i, latency * scale[arms[arm]])
        for i, (arm, latency) in enumerate(zip(dealt, latencies(rng, requests), strict=True))
    ]


def scores(arm: str, count: int, kl: float, agreement: float) -> list[Quality]:
    rng = np.random.default_rng(5)
    return [Quality(arm, START, 20, kl * k, agreement) for k in rng.uniform(0.5, 1.5, count)]


def looks(experiment: Experiment, seen: list[Observation], every: int = 20) -> Iterator[tuple[int, Decision]]:
    """All decisions, each with the number of requests seen before it."""
    for i in range(0, len(seen), every):
        experiment.observe(seen[i : i + every])
        while decision := experiment.check(seen[min(i + every, len(seen)) - 1].at):
            yield i + every, decision
            if experiment.ended is not None:
                return


def first(experiment: Experiment, seen: list[Observation], every: int = 20) -> tuple[int, Decision]:
    return next(looks(experiment, seen, every))


def test_a_faster_candidate_is_promoted_with_its_evidence() -> None:
    experiment = Experiment(spec(), START)
    requests, decision = first(experiment, traffic(1, 6000, {"a": 1.0, "b": 0.8}))
    assert (decision.outcome, decision.arm) == ("promote", "b")
    assert requests < 1000
    low, high = decision.evidence["interval"]
    assert 0 < low < decision.evidence["gain"] < high
    assert "b is promoted: its p50 of latency_ms is " in decision.reason
    assert experiment.ended == decision.at
    assert experiment.events[-1]["evidence"]["outcome"] == "promote"
    assert experiment.snapshot()["arms"]["b"]["state"] == "winner"
    assert experiment.check(START + 9999) is None


@pytest.mark.parametrize("statistic", ["mean", "p50", "p95", "p99"])
@pytest.mark.parametrize("metric", ["latency_ms", "first_token_ms", "per_token_ms"])
def test_each_statistic_of_each_metric_can_decide(statistic: str, metric: str) -> None:
    experiment = Experiment(spec(statistic=statistic, metric=metric), START)
    _, decision = first(experiment, traffic(2, 8000, {"a": 1.0, "b": 0.5}), every=200)
    assert (decision.outcome, decision.evidence["statistic"]) == ("promote", statistic)


def test_the_asked_gain_is_what_must_be_sure() -> None:
    seen = traffic(3, 3000, {"a": 1.0, "b": 0.8})
    soon, _ = first(Experiment(spec(gain=0.0), START), seen)
    later, decision = first(Experiment(spec(gain=0.12), START), seen)
    assert soon < later
    assert decision.evidence["interval"][0] > 0.12
    assert not list(looks(Experiment(spec(gain=0.25), START), seen))


def test_nothing_is_promoted_before_its_minimum() -> None:
    seen = traffic(4, 3000, {"a": 1.0, "b": 0.3})
    requests, _ = first(Experiment(spec(min_requests=10), START), seen, every=1)
    assert requests < 200
    experiment = Experiment(spec(min_requests=400), START)
    first(experiment, seen, every=1)
    arms = experiment.snapshot()["arms"]
    assert min(arms[arm]["metrics"]["latency_ms"]["count"] for arm in arms) == 400


def test_between_equal_arms_nothing_wins() -> None:
    experiment = Experiment(spec(max_requests=2000, guards={"slower": 0.0}), START)
    requests, decision = first(experiment, traffic(5, 3000, {"a": 1.0, "b": 1.0}))
    assert (requests, decision.outcome, decision.arm) == (2000, "no_winner", None)
    assert set(decision.evidence["comparisons"]["b"]) == {"mean", "p50", "p95", "p99"}


def test_a_gain_of_nothing_is_no_gain() -> None:
    """Two arms that always take the same time: the gain is surely 0, and that is not more than 0."""
    experiment = Experiment(spec(max_requests=2000), START)
    seen = [answer("ab"[i % 2], i, 50.0) for i in range(2000)]
    assert first(experiment, seen)[1].outcome == "no_winner"
    assert experiment.snapshot()["comparisons"]["b"]["p50"]["interval"] == [0.0, 0.0]


def test_false_alarms_are_rare_however_often_one_looks() -> None:
    """Both wrong promotions and wrong rollbacks, at the strictest limits; 5 % of 40 are 2 on average at most."""
    outcomes = [
        first(Experiment(spec(max_requests=1500, guards={"slower": 0.0}), START), traffic(seed, 1500, {"a": 1, "b": 1}))
        for seed in range(100, 140)
    ]
    assert sum(decision.outcome != "no_winner" for _, decision in outcomes) <= 2


def test_a_tenth_is_found() -> None:
    found = [
        first(Experiment(spec(max_requests=3000), START), traffic(seed, 3000, {"a": 1.0, "b": 0.9}), every=100)[
            1
        ].outcome
        for seed in range(200, 220)
    ]
    assert found.count("promote") >= 18


def test_a_candidate_that_fails_more_is_rolled_back_and_the_reason_has_the_numbers() -> None:
    experiment = Experiment(spec(), START)
    seen = traffic(6, 4000, {"a": 1.0, "b": 0.7}, errors={"a": 0.01, "b": 0.15})
    requests, decision = first(experiment, seen)
    assert (decision.outcome, decision.arm, decision.evidence["guard"]) == ("rollback", "b", "error_rate")
    assert requests < 400
    assert decision.evidence["interval"][0] > 0.02
    assert "is allowed" in decision.reason
    assert experiment.ended == decision.at  # it was the last


def test_as_many_failures_on_both_sides_break_nothing() -> None:
    experiment = Experiment(spec(), START)
    seen = traffic(7, 3000, {"a": 1.0, "b": 1.0}, errors={"a": 0.15, "b": 0.15})
    assert not list(looks(experiment, seen))
    error_rate = experiment.snapshot()["arms"]["b"]["error_rate"]
    assert error_rate["interval"][0] < 0.15 < error_rate["interval"][1]


def test_without_its_guard_errors_do_not_count() -> None:
    seen = traffic(6, 4000, {"a": 1.0, "b": 0.7}, errors={"b": 0.15})
    _, decision = first(Experiment(spec(guards={"error_rate": None}), START), seen)
    assert decision.outcome == "promote"


def test_nothing_is_promoted_while_a_guard_is_in_doubt() -> None:
    """Three failures of a hundred are not surely more than 2 %, but no recommendation either."""
    experiment = Experiment(spec(), START)
    experiment.observe(failure("b", 0) for _ in range(8))
    seen = traffic(8, 2000, {"a": 1.0, "b": 0.7})
    requests, decision = first(experiment, seen, every=1)
    assert decision.outcome == "promote"
    b = experiment.snapshot()["arms"]["b"]
    assert b["requests"] == 400  # the look at which 8 failures became 2 %
    assert requests < 1000


def test_a_dead_candidate_is_out_after_a_few_requests() -> None:
    experiment = Experiment(spec(), START)
    experiment.observe(traffic(9, 2000, {"a": 1.0, "b": 1.0}))
    assert experiment.check(START) is None
    for i in range(DEAD_AFTER):
        assert experiment.check(START + i) is None
        experiment.observe([failure("b", 3000 + i), answer("a", 3000.5 + i, 200.0)])
    decision = experiment.check(START + 3100)
    assert decision is not None
    assert (decision.outcome, decision.evidence["guard"]) == ("rollback", "dead")


def test_an_outage_of_everything_is_not_the_candidates_fault() -> None:
    experiment = Experiment(spec(), START)
    experiment.observe(traffic(10, 2000, {"a": 1.0, "b": 1.0}))
    experiment.observe(failure("b", 3000 + i) for i in range(DEAD_AFTER + 5))  # control happens to get no request
    assert experiment.check(START + 3100) is None
    experiment.observe([answer("a", 3200, 200.0)])
    assert experiment.check(START + 3200) is not None


def test_a_candidate_that_is_surely_slower_goes() -> None:
    seen = traffic(11, 4000, {"a": 1.0, "b": 1.4})
    assert not list(looks(Experiment(spec(), START), seen))
    _, decision = first(Experiment(spec(guards={"slower": 0.2}), START), seen)
    assert (decision.outcome, decision.evidence["guard"]) == ("rollback", "slower")
    assert decision.evidence["interval"][1] < -0.2


@pytest.mark.parametrize(
    ("guards", "kl", "agreement", "broken"),
    [
        ({"kl": 0.5}, 0.9, 0.5, "kl"),
        ({"kl": 0.5}, 0.4, 0.0, None),
        ({"agreement": 0.6}, 0.1, 0.4, "agreement"),
        ({"agreement": 0.6}, 9.0, 0.7, None),
    ],
)
def test_quality_is_guarded(guards: dict[str, float], kl: float, agreement: float, broken: str | None) -> None:
    experiment = Experiment(spec(guards=guards, sample=0.1, teacher={"model": "t"}), START)
    seen = traffic(12, 2000, {"a": 1.0, "b": 0.7})
    experiment.observe(seen)
    assert experiment.check(START) is None  # nothing was scored yet, so nothing is promoted
    experiment.score(scores("b", 300, kl, agreement))
    decision = experiment.check(START + 1)
    assert decision is not None
    assert (decision.outcome, decision.evidence.get("guard")) == ("rollback" if broken else "promote", broken)
    quality = experiment.snapshot()["arms"]["b"]["quality"]
    assert (quality["answers"], quality["tokens"]) == (300, 6000)
    assert quality["kl_interval"][0] < kl < quality["kl_interval"][1]
    assert quality["agreement_interval"][0] < agreement + 1e-9
    assert experiment.snapshot()["arms"]["a"]["quality"] is None


def test_of_several_candidates_one_goes_and_the_rest_stay() -> None:
    experiment = Experiment(spec(candidates=["b", "c", "d"], max_requests=3000, gain=0.3), START)
    seen = traffic(13, 3000, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, errors={"b": 0.3, "d": 0.3})
    decisions = [decision for _, decision in looks(experiment, seen)]
    assert sorted((decision.outcome, str(decision.arm)) for decision in decisions) == [
        ("no_winner", "None"),
        ("rollback", "b"),
        ("rollback", "d"),
    ]
    assert experiment.candidates == ["c"]
    assert [event["what"] for event in experiment.events] == ["started", "decision", "decision", "decision"]


def test_two_that_break_a_guard_at_one_look_both_go() -> None:
    experiment = Experiment(spec(candidates=["b", "c"]), START)
    experiment.observe(traffic(14, 2000, {"a": 1.0, "b": 1.0, "c": 1.0}, errors={"b": 0.5, "c": 0.5}))
    found = [experiment.check(START) for _ in range(3)]
    assert [decision.arm if decision else None for decision in found] == ["b", "c", None]
    assert experiment.ended == START


def test_the_better_of_two_winners_wins() -> None:
    experiment = Experiment(spec(candidates=["b", "c"]), START)
    experiment.observe(traffic(15, 6000, {"a": 1.0, "b": 0.8, "c": 0.6}))
    decision = experiment.check(START)
    assert decision is not None
    assert decision.arm == "c"


def test_the_order_of_candidates_changes_no_figure() -> None:
    seen = traffic(16, 2000, {"a": 1.0, "b": 0.95, "c": 1.05})
    found = []
    for candidates in (["b", "c"], ["c", "b"]):
        experiment = Experiment(spec(candidates=candidates, gain=0.5), START)
        experiment.observe(seen)
        experiment.check(START)
        found.append(experiment.snapshot()["comparisons"])
    assert found[0] == found[1]


def test_more_candidates_need_more_evidence() -> None:
    seen = traffic(17, 2000, {"a": 1.0, "b": 0.95})
    widths = []
    for candidates in (["b"], ["b", "c", "d"]):
        experiment = Experiment(spec(candidates=candidates), START)
        experiment.observe(seen)
        low, high = experiment.snapshot()["comparisons"]["b"]["p50"]["interval"]
        widths.append(high - low)
    assert widths[0] < widths[1]


def test_an_unknown_arm_is_a_programming_mistake() -> None:
    experiment = Experiment(spec(), START)
    with pytest.raises(ValueError, match="no arm 'z'; it has a, b"):
        experiment.observe([answer("z", 0, 1.0)])
    with pytest.raises(ValueError, match="no arm 'z'"):
        experiment.score([Quality("z", START, 1, 0.0, 1.0)])
    with pytest.raises(ValueError, match="no measurement"):
        experiment.observe([answer("a", 0, math.nan)])
    with pytest.raises(ValueError, match="are no scores"):
        experiment.score([Quality("a", START, 1, math.nan, 1.0)])


def test_stop_ends_it_and_what_comes_later_does_not_count() -> None:
    experiment = Experiment(spec(), START)
    experiment.observe(traffic(18, 100, {"a": 1.0, "b": 1.0}))
    assert experiment.stop(START + 100, "enough").outcome == "stopped"
    before = experiment.snapshot(values=True)
    experiment.observe([answer("a", 200, 1.0)])
    experiment.score(scores("a", 3, 0.1, 0.5))
    assert experiment.check(START + 200) is None
    assert experiment.snapshot(values=True) == before
    with pytest.raises(ValueError, match="ended already"):
        experiment.stop(START + 300)


def test_a_request_whose_client_hung_up_is_neither_failed_nor_timed() -> None:
    experiment = Experiment(spec(), START)
    experiment.observe([Observation("a", START), answer("a", 1, 100.0)])
    arm = experiment.snapshot()["arms"]["a"]
    assert (arm["requests"], arm["errors"], arm["metrics"]["latency_ms"]["count"]) == (2, 0, 1)


def test_the_snapshot_says_what_was_seen_and_is_json() -> None:
    experiment = Experiment(spec(cost_per_hour={"a": 3.6}), START, {"cpu": "some"})
    experiment.observe(
        [answer("a", 0, 100.0), answer("a", 15, 300.0), failure("a", 16), answer("b", 16, 50.0, tokens=1)]
    )
    experiment.check(START + 100)
    snapshot = json.loads(json.dumps(experiment.snapshot(), allow_nan=False))
    assert snapshot["environment"] == {"cpu": "some"}
    a, b = snapshot["arms"]["a"], snapshot["arms"]["b"]
    assert (a["state"], a["requests"], a["errors"], a["completion_tokens"]) == ("control", 3, 1, 22)
    assert (a["cost"], b["cost"]) == (pytest.approx(0.1), None)
    assert a["tokens_per_s"] == pytest.approx(22 / 0.4)
    assert a["metrics"]["latency_ms"]["mean"] == pytest.approx(200)
    assert a["metrics"]["latency_ms"]["intervals"]["p50"] == [0.0, None]
    assert a["metrics"]["per_token_ms"]["p50"] == pytest.approx(15.0)
    assert b["metrics"]["per_token_ms"]["count"] == 0
    assert snapshot["comparisons"]["b"]["p50"] == {"gain": 0.75, "interval": [None, 1.0]}
    assert snapshot["traffic"] == [
        {"at": START, "requests": {"a": 1}},
        {"at": START + 10, "requests": {"a": 2, "b": 1}},
    ]
    assert snapshot["timeline"][0]["arms"]["a"] == {
        "requests": 3,
        "mean": [200.0, 0.0, None],
        "p50": [200.0, 0.0, None],
        "p95": [pytest.approx(290.0), 0.0, None],
        "p99": [pytest.approx(298.0), 0.0, None],
    }
    assert "values" not in a
    with pytest.raises(ValueError, match="no values to go on from"):
        Experiment.restore(snapshot)


def test_a_long_experiment_keeps_a_short_record() -> None:
    experiment = Experiment(spec(gain=0.9), START)
    seen = traffic(19, 12_000, {"a": 1.0, "b": 1.0})
    assert not list(looks(experiment, seen))
    snapshot = experiment.snapshot()
    times = [entry["at"] for entry in snapshot["timeline"]]
    assert len(times) == ENTRIES < 600
    assert (times[0], times[-1]) == (seen[19].at, seen[-1].at)
    assert max(np.diff(times)) <= 60
    assert len(snapshot["traffic"]) == 12_000 / snapshot["traffic_bucket_s"] <= ENTRIES
    for arm in ("a", "b"):
        counted = sum(bucket["requests"].get(arm, 0) for bucket in snapshot["traffic"])
        assert counted == snapshot["arms"][arm]["requests"]


@settings(max_examples=settings().max_examples // 4)
@given(st.lists(st.integers(1, 59), max_size=3), st.integers(0, 50))
def test_restarts_change_nothing(restarts: list[int], seed: int) -> None:
    """Decisions, record and every figure are those of an experiment that was never interrupted."""
    fields = {"candidates": ["b", "c"], "guards": {"kl": 0.5}, "sample": 0.1, "teacher": {"model": "t"}}
    seen = traffic(seed, 1800, {"a": 1.0, "b": 0.75, "c": 1.0}, errors={"c": 0.2})
    answers = scores("b", 90, 0.3, 0.5) + scores("c", 90, 0.3, 0.5)
    ends = []
    for stops in ([], restarts):
        experiment, decisions = Experiment(spec(**fields), START), []
        for turn in range(60):
            if turn in stops:
                experiment = Experiment.restore(json.loads(json.dumps(experiment.snapshot(values=True))))
            experiment.observe(seen[30 * turn : 30 * turn + 30])
            experiment.score(answers[3 * turn : 3 * turn + 3])
            decisions.append(experiment.check(START + 30 * turn))
        ends.append((decisions, experiment.snapshot(values=True)))
    assert any(ends[0][0])
    assert ends[0] == ends[1]
