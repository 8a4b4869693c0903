"""When a new student takes the champion's place by itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from cluster.spec.base import Section

Margin = Annotated[float, Field(ge=0.0)]


class PromotionSpec(Section):
    """By how much a new student may be worse than the present champion on the same held-out text, and yet replace it.

    All margins and limits but that of the latency must be kept surely: by the bound of a confidence interval over the
    held-out documents, not by the mean alone. An empty section, {}, asks for a student that is worse in nothing. One
    that is not better than its own initial weights is never promoted, champion or not. Margins add up over runs: each
    champion may be worse than the one before it.
    """

    kl: Margin = 0.0
    """Share by which its held-out KL may be higher: 0.02 allows 1.02 times the champion's."""
    perplexity: Margin = 0.0
    """Share by which its held-out perplexity may be higher."""
    agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How much lower its agreement with the teacher may be, as a share of all tokens: 0.01 allows 0.59 for 0.60."""
    latency: Margin | None = None
    """Share by which the median time of its whole answers may be higher, both served side by side; needs `serving`.
    The medians are compared as they were measured: give a margin, and raise `serving.requests` for a narrow one. A
    student that did not answer every request is not promoted. None means that latency does not count."""
    max_kl: PositiveFloat | None = None
    """Highest held-out KL that a champion may have, in nats per token, also the first one."""
    max_perplexity: Annotated[float, Field(gt=1.0)] | None = None
    """Highest held-out perplexity that it may have."""
    min_agreement: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Lowest agreement with the teacher that it may have, as a share of all tokens."""
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.95
    """How sure it must be that a margin or limit is kept: one that is not is promoted with a probability of about
    1 - confidence in each run, and of up to three times as much where a few documents are far worse than all others.
    0.5 compares the figures as they were measured."""
