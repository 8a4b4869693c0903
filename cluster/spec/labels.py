"""The spec of the labels: the kind in which the teacher reports a token's distribution.

The defaults must never change: stored labels are addressed by the settings that differ from them, see
:func:`cluster.labels.wire.labels_hash`. A new optional setting is fine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag

from cluster.spec.base import Section

MAX_DRAWS = 1024
TEMPERATURE = "T, applied to the teacher's logits before they are cut or drawn from. The loss uses the same T."


class TopKLabels(Section):
    """K ids and log-probabilities and the log of the mass that is left: the tail is a bucket of its own."""

    kind: Literal["topk"] = "topk"
    k: PositiveInt = 64
    """Ids kept per token."""
    temperature: Annotated[PositiveFloat, Field(description=TEMPERATURE)] = 1.0


class SampledLabels(Section):
    """N systematic draws from the teacher's distribution: unbiased for the full divergence, and small."""

    kind: Literal["sampled"]
    draws: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """N, draws per token. About a third of them are different ids."""
    temperature: Annotated[PositiveFloat, Field(description=TEMPERATURE)] = 1.0


class HiddenLabels(Section):
    """The teacher's last hidden states; its head is shipped once. Exact over the whole vocabulary, at any T."""

    kind: Literal["hidden"]


class DenseLabels(Section):
    """All of the teacher's logits: exact, at any T, and as wide as the vocabulary. For small vocabularies."""

    kind: Literal["dense"]


def _kind(given: Any) -> str:
    """What tells the kinds apart; `topk` where nothing is said."""
    return str(given.get("kind", "topk")) if isinstance(given, dict) else str(getattr(given, "kind", "topk"))


LabelsSpec = Annotated[
    Annotated[TopKLabels, Tag("topk")]
    | Annotated[SampledLabels, Tag("sampled")]
    | Annotated[HiddenLabels, Tag("hidden")]
    | Annotated[DenseLabels, Tag("dense")],
    Discriminator(_kind),
]
