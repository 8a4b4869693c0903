"""The spec of a student's loss, and which losses a label kind can give."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, Tag, model_validator

from cluster.spec.base import Section, Share
from cluster.spec.labels import DenseLabels, HiddenLabels, LabelsSpec, SampledLabels, TopKLabels

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "total_variation",
]
MIXED = {"jensen_shannon": 0.5, "skewed_kl": 0.1, "skewed_reverse_kl": 0.1}
Weight = Annotated[float, Field(ge=0.0)]


class Ramp(Section):
    """A value that changes over training: from `start` to `end` over a share of the batches, then stays."""

    start: Weight
    """Value at the first batch."""
    end: Weight
    """Value once `over` of the batches are learnt."""
    over: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the batches in which it changes."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way from start to end: a line, or half a cosine."""


def _number_or_ramp(given: Any) -> str:
    return "ramp" if isinstance(given, dict | Ramp) else "number"


Ramped = Discriminator(_number_or_ramp)


class LossSpec(Section):
    """Loss per token: hard * CE(next token, q) + soft * T^2 * D(p_T, q_T), p teacher, q student."""

    hard: Weight = 0.1
    """Weight of the cross-entropy with the corpus."""
    soft: Annotated[Annotated[Weight, Tag("number")] | Annotated[Ramp, Tag("ramp")], Ramped] = 0.9
    """Weight of the divergence from the teacher: a number, or a ramp such as {start: 0.5, end: 1.0}."""
    divergence: Divergence = "forward_kl"
    """D. `topk` gives it over its K + 1 buckets, `sampled` gives `forward_kl` only."""
    mix: Share | None = None
    """Weight of the teacher in `jensen_shannon`'s mixture (0.5), of the other side in `skewed_kl`'s and
    `skewed_reverse_kl`'s (0.1)."""
    temperature: Annotated[Annotated[PositiveFloat, Tag("number")] | Annotated[Ramp, Tag("ramp")], Ramped] | None = None
    """T of the loss, for `hidden` and `dense` labels: a number or a ramp; none means 1. Other kinds fix T when
    they are made, in `labels.temperature`."""

    @model_validator(mode="after")
    def _has_effect(self) -> LossSpec:
        soft = self.soft
        if self.hard == 0 and (soft == 0 or (isinstance(soft, Ramp) and soft.start == soft.end == 0)):
            raise ValueError("hard and soft are both 0, so nothing would be learnt; give at least one a weight")
        if isinstance(self.temperature, Ramp) and not (self.temperature.start and self.temperature.end):
            raise ValueError("a temperature must be above 0, at the start and at the end of its ramp")
        if self.mix is not None and self.divergence not in MIXED:
            raise ValueError(f"mix has no effect on {self.divergence}; it is allowed with {', '.join(MIXED)}")
        return self

    @property
    def mixture(self) -> float:
        """`mix`, or what the divergence has where nothing is said."""
        return self.mix if self.mix is not None else MIXED.get(self.divergence, 0.5)


def why_not(labels: LabelsSpec, loss: LossSpec) -> str | None:
    """Why a kind of labels cannot give a loss exactly, and what can; none where it can."""
    if isinstance(labels, HiddenLabels | DenseLabels):
        return None
    given = loss.temperature
    if given is not None and given != labels.temperature:
        what = "a ramp" if isinstance(given, Ramp) else f"{given:g}"
        return (
            f"temperature {what} differs from labels.temperature {labels.temperature:g}; {labels.kind} labels are made "
            f"at one T and cannot be re-tempered. Set labels.temperature, or use hidden or dense labels"
        )
    if isinstance(labels, SampledLabels) and loss.divergence != "forward_kl":
        return (
            f"divergence {loss.divergence} is not linear in the teacher's probabilities, so draws from them would give "
            f"it with a bias; sampled labels allow forward_kl. Use hidden or dense labels, or topk for its buckets"
        )
    if isinstance(labels, TopKLabels) and loss.divergence == "adaptive_kl":
        return (
            "divergence adaptive_kl weighs tokens by the gaps of each, which the tail bucket of topk labels hides; "
            "use hidden or dense labels"
        )
    return None
