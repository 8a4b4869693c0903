"""The gate: each margin at its border, what the held-out text cannot tell, and reasons that show why."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from cluster.evaluate.checks import KL, PERPLEXITY
from cluster.evaluate.figures import Fidelity
from cluster.evaluate.gate import KEPT, PROMOTED, ROLLED_BACK, Measured, Verdict, decide, learnt
from cluster.spec import LossSpec, PromotionSpec, Ramp
from tests.fidelities import fidelity

# All blocks alike, so a bound is the figure itself.
CHAMPION = Measured(fidelity(1.41, 0.60, 200.0), latency_ms=100.0)
INITIAL = fidelity(6.7, 0.05, 9000.0)
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
    ({"max_kl": 1.2}, "kl", 1.2),
    ({"max_perplexity": 150.0}, "perplexity", 150.0),
    ({"min_agreement": 0.7}, "agreement", 0.7),
]


def measured(latency_ms: float | None = 100.0, **figures: Any) -> Measured:
    """A student with the champion's figures but for some."""
    known = {"kl": 1.41, "agreement": 0.60, "perplexity": 200.0}
    return Measured(fidelity(**{**known, **figures}), latency_ms)


def verdict_on(
    new: Measured, champion: Measured | None = CHAMPION, initial: Fidelity = INITIAL, **margins: float
) -> Verdict:
    return decide(PromotionSpec(**margins), new, initial, champion, 3 if champion else None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("margins", "field", "border"), BORDERS, ids=repr)
def test_a_figure_at_its_border_passes_and_one_beyond_does_not(
    margins: dict[str, float], field: str, border: float
) -> None:
    worse = -JUST if field == "agreement" else JUST
    assert verdict_on(measured(**{field: border}), **margins).outcome == PROMOTED
    verdict = verdict_on(measured(**{field: border * (1 + worse)}), **margins)
    assert (verdict.outcome, verdict.against, verdict.unclear) == (KEPT, 3, False)
    assert ";" not in verdict.reason  # what is good enough is not held against it


def test_the_reason_shows_the_figures_the_champion_and_what_was_allowed() -> None:
    verdict = verdict_on(measured(kl=1.62, agreement=0.55, perplexity=190.0), kl=0.02, agreement=0.01)
    assert verdict == Verdict(
        KEPT,
        "KL 1.62 against 1.41 of champion v3, allowed 1.44; "
        "agreement 55.0 % against 60.0 % of champion v3, allowed 59.0",
        3,
    )
    assert verdict.line("demo-small", 4) == f"promotion: demo-small v4 stays challenger: {verdict.reason}"


def test_one_that_is_better_in_all_is_promoted_with_all_its_figures() -> None:
    champion = Measured(fidelity(1.41, 0.6, 20000.0), 100.0)
    verdict = verdict_on(measured(50.0, kl=1.2, agreement=0.65, perplexity=1234.2), champion, latency=0.0, max_kl=1.3)
    assert verdict.promoted
    assert verdict.reason == (
        "KL 1.20 against 1.41 of champion v3, allowed 1.41, 95 % bound 1.20; "
        "perplexity 1234 against 20000 of champion v3, allowed 20000, 95 % bound 1234; "
        "agreement 65.0 % against 60.0 % of champion v3, allowed 60.0, 95 % bound 65.0; "
        "answer p50 50.0 ms against 100 ms of champion v3, allowed 100; "
        "KL 1.20 against 6.70 of its initial weights, 95 % bound 1.20; "
        "KL 1.20, promotion.max_kl is 1.30, 95 % bound 1.20"
    )
    assert verdict.line("demo-small", 4).startswith("promotion: demo-small v4 is champion: KL 1.20 against")


def test_a_figure_just_beyond_is_shown_with_the_digits_that_tell_it_from_the_border() -> None:
    verdict = verdict_on(measured(kl=1.41001))
    assert verdict.reason == "KL 1.41001 against 1.41000 of champion v3, allowed 1.41000"


def test_the_first_one_becomes_champion() -> None:
    assert verdict_on(measured(None), None) == Verdict(
        PROMOTED,
        "there was no champion; KL 1.41 against 6.70 of its initial weights, 95 % bound 1.41; "
        "perplexity 200; agreement 60.0 %",
    )


@pytest.mark.parametrize("champion", [None, CHAMPION], ids=["first", "later"])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_one_that_ended_worse_than_it_began_or_no_better_is_never_promoted(
    champion: Measured | None, confidence: float
) -> None:
    generous = {"kl": 9.0, "perplexity": 9.0, "agreement": 1.0, "confidence": confidence}
    for after, outcome in ((0.95, KEPT), (0.82, KEPT), (0.81, PROMOTED)):
        verdict = verdict_on(measured(kl=after), champion, fidelity(0.82), **generous)
        assert verdict.outcome == outcome, verdict
    worse = verdict_on(measured(kl=0.95), champion, fidelity(0.82), **generous)
    assert worse.reason == "KL 0.950 against 0.820 of its initial weights, must be better" and not worse.unclear


def test_the_absolute_limits_hold_for_the_first_one_too() -> None:
    limits = {"max_kl": 1.0, "max_perplexity": 1000.0, "min_agreement": 0.5}
    assert verdict_on(measured(kl=0.9, perplexity=1999.0), None, **limits).reason == (
        "perplexity 1999, promotion.max_perplexity is 1000"
    )
    assert verdict_on(measured(kl=1.1, agreement=0.4), None, **limits).reason == (
        "KL 1.10, promotion.max_kl is 1.00; agreement 40.0 %, promotion.min_agreement is 50.0"
    )
    assert verdict_on(measured(kl=0.9), None, **limits).promoted


def test_a_student_that_learns_from_the_text_alone_must_better_its_perplexity() -> None:
    assert learnt(LossSpec()) is learnt(LossSpec(soft=Ramp(start=0.0, end=1.0))) is KL
    assert (
        learnt(LossSpec(hard=1.0, soft=0.0)) is learnt(LossSpec(hard=1.0, soft=Ramp(start=0.0, end=0.0))) is PERPLEXITY
    )
    new = measured(kl=2.0, perplexity=100.0)
    verdict = decide(PromotionSpec(), new, fidelity(1.41, 0.6, 200.0), None, None, PERPLEXITY)
    assert verdict.promoted and "perplexity 100 against 200 of its initial weights" in verdict.reason
    assert "KL 2.00" in verdict.reason


def test_a_difference_that_the_text_cannot_tell_keeps_the_champion_and_names_the_tokens_it_takes() -> None:
    # Better than the champion by 1 % on 500 tokens whose blocks differ by ten times that.
    noisy = Measured(fidelity(1.40, 0.65, 190.0, spread=0.1), 100.0)
    verdict = verdict_on(noisy, kl=0.02)
    assert (verdict.outcome, verdict.unclear) == (KEPT, True)
    assert verdict.reason.startswith("KL 1.40 against 1.41 of champion v3, allowed 1.44, 95 % bound 1.4")
    assert ": too close to call on 500 held-out tokens, about " in verdict.reason and ";" not in verdict.reason
    # As many more blocks as it asks for, of the same kind, do tell.
    needed = int(verdict.reason.split("about ")[1].split()[0].replace(",", ""))
    blocks = math.ceil(needed / 50)
    assert 10 < blocks < 300 and verdict.reason.endswith("are needed for such a difference")
    more = Measured(fidelity(1.40, 0.65, 190.0, spread=0.1, blocks=blocks), 100.0)
    other = replace(CHAMPION, fidelity=fidelity(1.41, blocks=blocks))
    assert verdict_on(more, other, fidelity(6.7, blocks=blocks), kl=0.02).promoted
    # Whoever wants the means compared can have that.
    assert verdict_on(noisy, kl=0.02, confidence=0.5).promoted


@pytest.mark.parametrize("kl", [1.43, 1.435, 1.4379])
def test_the_tokens_that_are_needed_are_always_more_than_there_are(kl: float) -> None:
    # However wide the margin: a student at its edge takes more text than one that equals the champion.
    verdict = verdict_on(Measured(fidelity(kl, 0.65, 190.0, spread=0.02), 100.0), kl=0.02)
    assert verdict.unclear
    assert int(verdict.reason.split("about ")[1].split()[0].replace(",", "")) > 500


def test_a_tie_names_no_number_of_tokens_for_none_would_do() -> None:
    # As many agreements as the champion in all, in other documents.
    one = fidelity(1.2, 0.6, 150.0)
    blocks = tuple((n, kl, agreed + (-3 if k % 2 else 3), ce) for k, (n, kl, agreed, ce) in enumerate(one.blocks))
    verdict = verdict_on(Measured(replace(one, blocks=blocks), 100.0))
    assert verdict.unclear and verdict.reason.endswith(
        "too close to call on 500 held-out tokens, and on any number of them: it is exactly as bad as allowed"
    )


def test_of_one_that_is_worse_it_does_not_matter_what_is_too_close_to_call() -> None:
    verdict = verdict_on(Measured(fidelity(1.40, 0.3, 200.0, spread=0.1)))
    assert verdict.reason == "agreement 30.0 % against 60.0 % of champion v3, allowed 60.0" and not verdict.unclear


def test_too_few_documents_tell_nothing() -> None:
    champion, initial = Measured(fidelity(1.41, blocks=4)), fidelity(6.7, blocks=4)
    verdict = verdict_on(Measured(fidelity(1.0, 0.7, 100.0, blocks=4)), champion, initial)
    assert (verdict.outcome, verdict.unclear) == (KEPT, True)
    assert (
        ": cannot be decided on 200 held-out tokens, which are of fewer than 5 documents, or mostly of one"
        in verdict.reason
    )


def test_figures_without_blocks_or_of_other_blocks_are_not_compared() -> None:
    for blocks in ((), CHAMPION.fidelity.blocks[1:], tuple((n + 1, *rest) for n, *rest in CHAMPION.fidelity.blocks)):
        other = replace(CHAMPION, fidelity=replace(CHAMPION.fidelity, blocks=blocks))
        verdict = verdict_on(measured(kl=1.0), other)
        assert verdict.outcome == KEPT and not verdict.unclear
        assert (
            "KL 1.00 against 1.41 of champion v3, allowed 1.41, and not measured on the same blocks" in verdict.reason
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["kl", "agreement", "student_perplexity"])
@pytest.mark.parametrize("champion", [None, CHAMPION], ids=["first", "later"])
def test_a_new_figure_that_is_no_finite_number_is_never_good_enough(
    bad: float, field: str, champion: Measured | None
) -> None:
    figures: dict[str, Any] = {field: bad}
    new = Measured(replace(fidelity(1.0), **figures))
    verdict = verdict_on(new, champion, kl=9, perplexity=9, agreement=1)
    assert verdict.outcome == KEPT
    assert str(bad) in verdict.reason


@pytest.mark.parametrize("field", ["kl", "agreement", "student_perplexity", "latency_ms"])
def test_a_champion_s_figure_that_is_no_number_sets_no_limit_and_the_others_still_do(field: str) -> None:
    figures: dict[str, Any] = {field: math.nan}
    if field == "latency_ms":
        broken = replace(CHAMPION, **figures)
    else:
        broken = replace(CHAMPION, fidelity=replace(CHAMPION.fidelity, **figures))
    assert verdict_on(CHAMPION, broken, latency=0.0).outcome == PROMOTED
    assert verdict_on(measured(kl=2.0, perplexity=300.0), broken, latency=0.0).outcome == KEPT


@pytest.mark.parametrize(
    ("new", "champion", "says"),
    [(None, 100.0, "answer p50 was not measured"), (100.0, None, "answer p50 was not measured of champion v3")],
)
def test_a_latency_that_counts_must_have_been_measured_of_both(
    new: float | None, champion: float | None, says: str
) -> None:
    both = replace(CHAMPION, latency_ms=new), replace(CHAMPION, latency_ms=champion)
    assert verdict_on(*both, latency=9.0) == Verdict(KEPT, f"{says}: not every request was answered", 3)
    assert verdict_on(*both).outcome == PROMOTED


def test_without_a_champion_a_latency_that_counts_must_have_been_measured_too() -> None:
    assert verdict_on(measured(None), None, latency=1.0) == Verdict(
        KEPT, "answer p50 was not measured: not every request was answered"
    )
    assert verdict_on(measured(70.0), None, latency=1.0).reason.endswith("agreement 60.0 %; answer p50 70.0 ms")


def test_a_champion_that_is_the_teacher_itself_leaves_room_by_its_rounding_only() -> None:
    exact = measured(kl=-1e-12)
    assert verdict_on(exact, exact, kl=0.5).promoted
    assert not verdict_on(measured(kl=1e-6), exact, kl=0.5).promoted


def test_a_verdict_is_frozen_and_its_line_says_what_became_of_the_version() -> None:
    verdict = Verdict(ROLLED_BACK, "v1 was put back", None)
    assert verdict.line("a-b", 2) == "promotion: a-b v2 was rolled back: v1 was put back"
    with pytest.raises(FrozenInstanceError):
        verdict.outcome = PROMOTED  # type: ignore[misc]


def test_the_gate_needs_nothing_heavy() -> None:
    code = "import sys, cluster.evaluate.gate; print(*{'ray', 'torch', 'mlflow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
