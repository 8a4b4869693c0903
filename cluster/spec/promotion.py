"""When a new student takes the champion's place by itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.spec.base import Section

Margin = Annotated[float, Field(ge=0.0)]


class PromotionSpec(Section):
    """By how much a new student may be worse than the present champion on the same held-out text, and yet replace it.

    All margins must be kept. An empty section, {}, asks for a student that is worse in nothing.
    """

    kl: Margin = 0.0
    """Share by which its held-out KL may be higher: 0.02 allows 1.02 times the champion's."""
    perplexity: Margin = 0.0
    """Share by which its held-out perplexity may be higher."""
    agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """How much lower its agreement with the teacher may be, as a share of all tokens: 0.01 allows 0.59 for 0.60."""
    latency: Margin | None = None
    """Share by which the median time of its whole answers may be higher, both served side by side; needs `serving`.
    None means that latency does not count."""
