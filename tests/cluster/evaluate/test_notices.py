"""What is told of the held-out text before a start; what is told at the end is tested where it is shown."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.evaluate.notices import before_start
from cluster.spec import FamilySpec
from tests.tiny import tiny_family

LARGE = {"sequence_length": 513, "batch_sequences": 16}


def notices(promotion: dict[str, Any] | None, batches: int = 4, **corpus: Any) -> list[str]:
    sections = {"evaluation": {"batches": batches}, "corpus": corpus, "promotion": promotion}
    return before_start(FamilySpec.model_validate(tiny_family(**sections)))


def test_a_text_that_is_too_small_for_a_margin_is_told_with_what_it_takes() -> None:
    (line,) = notices({"kl": 0.02, "agreement": 0.01, "perplexity": 0.05})
    assert line == (
        "evaluation: at most 496 held-out tokens are measured, too few to tell from noise: promotion.kl 0.02 takes "
        "about 30,000, promotion.perplexity 0.05 takes about 9,900, promotion.agreement 0.01 takes about 19,000; a "
        "student that is too close to call stays challenger. Raise evaluation.batches to 245 and corpus.held_out with "
        "it, or allow wider margins"
    )
    assert notices({"kl": 0.02, "agreement": 0.01, "perplexity": 0.05}, 245) == []


def test_margins_of_zero_are_looked_at_by_a_difference_that_matters() -> None:
    (line,) = notices({})
    assert (
        "a KL 2 % lower takes about 30,000, a perplexity 2 % lower takes about 62,000, an agreement 1 % higher" in line
    )
    assert notices({}, 8, **LARGE) == []


@pytest.mark.parametrize("promotion", [None, {"confidence": 0.5}, {"kl": 0.5, "perplexity": 0.5, "agreement": 0.2}])
def test_without_a_decision_or_with_wide_margins_nothing_is_told(promotion: dict[str, Any] | None) -> None:
    assert notices(promotion) == []


def test_more_confidence_takes_more_text() -> None:
    wide = {"perplexity": 9.0, "agreement": 1.0, "kl": 0.02}
    takes = [notices({**wide, "confidence": each})[0] for each in (0.9, 0.99)]
    assert "takes about 22,000" in takes[0] and "takes about 49,000" in takes[1]
