"""The gate: each margin at its border, what is no number, and reasons that show why."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from cluster.evaluate.gate import KEPT, PROMOTED, ROLLED_BACK, Figures, Verdict, decide
from cluster.spec import PromotionSpec

CHAMPION = Figures(kl=1.41, agreement=0.60, perplexity=200.0, latency_ms=100.0)
JUST = 1e-6
# A margin, and the worst figure that it allows.
BORDERS: list[tuple[dict[str, float], str, float]] = [
    ({}, "kl", 1.41),
    ({"kl": 0.02}, "kl", 1.41 * 1.02),
    ({"kl": 0.1}, "kl", 1.551),
    ({}, "perplexity", 200.0),
    ({"perplexity": 0.05}, "perplexity", 210.0),
    ({}, "agreement", 0.60),
    ({"agreement": 0.01}, "agreement", 0.59),
    ({"agreement": 0.3}, "agreement", 0.3),
    ({"latency": 0.0}, "latency_ms", 100.0),
    ({"latency": 0.1}, "latency_ms", 110.0),
]


@pytest.mark.parametrize(("margins", "field", "border"), BORDERS, ids=repr)
def test_a_figure_at_its_border_passes_and_one_beyond_does_not(
    margins: dict[str, float], field: str, border: float
) -> None:
    spec, worse = PromotionSpec(**margins), -JUST if field == "agreement" else JUST
    figures: dict[str, Any] = {field: border}
    assert decide(spec, replace(CHAMPION, **figures), CHAMPION, 3).outcome == PROMOTED
    figures = {field: border * (1 + worse)}
    verdict = decide(spec, replace(CHAMPION, **figures), CHAMPION, 3)
    assert (verdict.outcome, verdict.against) == (KEPT, 3)
    assert ";" not in verdict.reason  # what is good enough is not held against it


def test_the_reason_shows_the_figures_the_champion_and_what_was_allowed() -> None:
    new = Figures(kl=1.62, agreement=0.55, perplexity=190.0)
    verdict = decide(PromotionSpec(kl=0.02, agreement=0.01), new, CHAMPION, 3)
    assert verdict == Verdict(
        KEPT,
        "KL 1.62 against 1.41 of champion v3, allowed 1.44; "
        "agreement 55.0 % against 60.0 % of champion v3, allowed 59.0",
        3,
    )
    assert verdict.line("demo-small", 4) == f"promotion: demo-small v4 stays challenger: {verdict.reason}"


def test_one_that_is_better_in_all_is_promoted_with_all_its_figures() -> None:
    new = Figures(kl=1.2, agreement=0.65, perplexity=1234.5, latency_ms=50.0)
    verdict = decide(PromotionSpec(latency=0.0), new, replace(CHAMPION, perplexity=20000.0), 3)
    assert verdict.promoted
    assert verdict.reason == (
        "KL 1.20 against 1.41 of champion v3, allowed 1.41; "
        "perplexity 1234 against 20000 of champion v3, allowed 20000; "
        "agreement 65.0 % against 60.0 % of champion v3, allowed 60.0; "
        "answer p50 50.0 ms against 100 ms of champion v3, allowed 100"
    )
    assert verdict.line("demo-small", 4).startswith("promotion: demo-small v4 is champion: KL 1.20 against")


def test_a_figure_just_beyond_is_shown_with_the_digits_that_tell_it_from_the_border() -> None:
    verdict = decide(PromotionSpec(), replace(CHAMPION, kl=1.41001), CHAMPION, 3)
    assert verdict.reason == "KL 1.41001 against 1.41000 of champion v3, allowed 1.41000"


def test_the_first_one_becomes_champion() -> None:
    verdict = decide(PromotionSpec(), replace(CHAMPION, latency_ms=None), None, None)
    assert verdict == Verdict(PROMOTED, "there was no champion; KL 1.41; perplexity 200; agreement 60.0 %", None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["kl", "agreement", "perplexity"])
@pytest.mark.parametrize("champion", [None, CHAMPION], ids=["first", "later"])
def test_a_new_figure_that_is_no_finite_number_is_never_good_enough(
    bad: float, field: str, champion: Figures | None
) -> None:
    figures: dict[str, Any] = {field: bad}
    new = replace(CHAMPION, **figures)
    verdict = decide(PromotionSpec(kl=9, perplexity=9, agreement=1), new, champion, 3 if champion else None)
    assert verdict.outcome == KEPT
    assert str(bad) in verdict.reason


@pytest.mark.parametrize("field", ["kl", "agreement", "perplexity", "latency_ms"])
def test_a_champion_s_figure_that_is_no_number_sets_no_limit_and_the_others_still_do(field: str) -> None:
    figures: dict[str, Any] = {field: math.nan}
    broken, spec = replace(CHAMPION, **figures), PromotionSpec(latency=0.0)
    assert decide(spec, CHAMPION, broken, 3).outcome == PROMOTED
    worse = replace(CHAMPION, kl=2.0, perplexity=300.0)
    assert decide(spec, worse, broken, 3).outcome == KEPT


@pytest.mark.parametrize(
    ("new", "champion", "says"),
    [(None, 100.0, "answer p50 was not measured"), (100.0, None, "answer p50 was not measured of champion v3")],
)
def test_a_latency_that_counts_must_have_been_measured_of_both(
    new: float | None, champion: float | None, says: str
) -> None:
    both = replace(CHAMPION, latency_ms=new), replace(CHAMPION, latency_ms=champion)
    assert decide(PromotionSpec(latency=9.0), *both, 3) == Verdict(KEPT, says, 3)
    assert decide(PromotionSpec(), *both, 3).outcome == PROMOTED


def test_without_a_champion_a_latency_that_counts_must_have_been_measured_too() -> None:
    silent = replace(CHAMPION, latency_ms=None)
    assert decide(PromotionSpec(latency=1.0), silent, None, None) == Verdict(
        KEPT, "answer p50 was not measured; a champion needs finite figures"
    )


def test_a_champion_that_is_the_teacher_itself_leaves_room_by_its_rounding_only() -> None:
    exact = replace(CHAMPION, kl=-1e-12)
    assert decide(PromotionSpec(kl=0.5), exact, exact, 3).promoted
    assert not decide(PromotionSpec(kl=0.5), replace(exact, kl=1e-6), exact, 3).promoted


def test_a_verdict_is_frozen_and_its_line_says_what_became_of_the_version() -> None:
    verdict = Verdict(ROLLED_BACK, "v1 was put back", None)
    assert verdict.line("a-b", 2) == "promotion: a-b v2 was rolled back: v1 was put back"
    with pytest.raises(FrozenInstanceError):
        verdict.outcome = PROMOTED  # type: ignore[misc]


def test_the_gate_needs_nothing_heavy() -> None:
    code = "import sys, cluster.evaluate.gate; print(*{'ray', 'torch', 'mlflow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
