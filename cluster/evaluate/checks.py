"""One condition of the gate: a figure, what it is held against, how sure that is, and the words for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.evaluate.figures import Fidelity
from cluster.evaluate.interval import LEAST_BLOCKS, Bound, upper_bound

# Two figures that differ by less than this share of them are the same: only their rounding differs.
ROUNDING = 1e-9
# Digits that a figure is shown with, and the most where two would look alike.
DIGITS, MOST_DIGITS = 3, 12


@dataclass(frozen=True)
class Metric:
    """A figure that counts, and how it is shown.

    Attributes:
        field: of a Fidelity; ``column`` of its blocks. Empty and 0 for one that is not measured on text.
        logarithmic: the blocks have the logarithm's sums.
    """

    name: str
    field: str = ""
    column: int = 0
    higher_is_better: bool = False
    logarithmic: bool = False
    scale: float = 1.0
    unit: str = ""

    def of(self, fidelity: Fidelity) -> float:
        """Its value in a Fidelity."""
        value: float = getattr(fidelity, self.field)
        return value

    def number(self, value: float, digits: int = DIGITS) -> str:
        """A value as it is shown, without its unit."""
        value *= self.scale
        if not math.isfinite(value) or abs(value) >= 1e6:
            return f"{value:.{digits}g}"
        whole = math.floor(math.log10(abs(value))) if value else 0
        return f"{value:.{max(0, digits - 1 - whole)}f}"

    def alone(self, value: float | None) -> str:
        """The figure in words, compared with nothing."""
        return f"{self.name} was not measured" if value is None else f"{self.name} {self.number(value)}{self.unit}"


KL = Metric("KL", "kl", 1)
PERPLEXITY = Metric("perplexity", "student_perplexity", 3, logarithmic=True)
AGREEMENT = Metric("agreement", "agreement", 2, higher_is_better=True, scale=100.0, unit=" %")
LATENCY = Metric("answer p50", unit=" ms")


@dataclass(frozen=True)
class Check:
    """One condition on a new student.

    Attributes:
        new: its figure; ``other`` the one it is compared with, None for an absolute limit.
        allowed: the worst that passes; with ``strict`` that does not pass either.
        against: whose the other figure is, or the limit's name.
        bound: by how much it is worse than allowed, per token (of a perplexity's logarithm); None where that is not
            known.
        confidence: of the bound.
    """

    metric: Metric
    new: float | None
    other: float | None
    allowed: float | None
    against: str
    bound: Bound | None = None
    confidence: float = 0.5
    strict: bool = False

    def _within(self, excess: float) -> bool:
        """Whether an excess over what is allowed is none."""
        assert self.new is not None and self.allowed is not None
        relative = self.metric.logarithmic or self.metric.higher_is_better
        slack = ROUNDING * (1.0 if relative else max(abs(self.new), abs(self.allowed)))
        return excess < -slack if self.strict else excess <= slack

    @property
    def passed(self) -> bool:
        """Whether it is shown to hold. A figure of the other that is no number sets no limit."""
        if self.new is None or not math.isfinite(self.new) or self.allowed is None:
            return False
        if not math.isfinite(self.allowed):
            return True
        if self.metric is LATENCY:
            return self._within(self.new - self.allowed)
        return self.bound is not None and self._within(self.bound.upper)

    @property
    def unclear(self) -> bool:
        """Whether the figure itself is good enough, and only its bound is not."""
        return not self.passed and self.bound is not None and self._within(self.bound.mean)

    @property
    def _limit(self) -> float:
        """The bound in the figure's own unit: the worst that it is at the confidence, where ``allowed`` is allowed."""
        assert self.bound is not None and self.allowed is not None
        if self.metric.logarithmic:
            return self.allowed * math.exp(min(self.bound.upper, 700.0))
        return self.allowed - self.bound.upper if self.metric.higher_is_better else self.allowed + self.bound.upper

    def words(self) -> str:
        """The figures in words, with as many digits as it takes to see that a limit is not kept."""
        if self.new is None or self.allowed is None:
            missing = f"{self.metric.name} was not measured" + (f" of {self.against}" if self.new is not None else "")
            return missing + (": not every request was answered" if self.metric is LATENCY else "")
        if self.bound is None and self.metric is not LATENCY:
            return f"{self._figures(DIGITS)}, and not measured on the same blocks of text"
        digits = DIGITS
        while not self.passed and digits < MOST_DIGITS and self._look_alike(digits):
            digits += 1
        return self._figures(digits) + (self._sureness(digits) if self.passed or self.unclear else "")

    def _look_alike(self, digits: int) -> bool:
        assert self.new is not None and self.allowed is not None
        judged = self._limit if self.unclear else self.new
        return self.metric.number(judged, digits) == self.metric.number(self.allowed, digits)

    def _figures(self, digits: int) -> str:
        assert self.new is not None and self.allowed is not None
        metric, allowed = self.metric, self.metric.number(self.allowed, digits)
        shown = f"{metric.name} {metric.number(self.new, digits)}{metric.unit}"
        if self.other is None:
            return f"{shown}, {self.against} is {allowed}"
        shown += f" against {metric.number(self.other, digits)}{metric.unit} of {self.against}"
        if self.strict:
            return shown if self.passed else f"{shown}, must be better"
        return f"{shown}, allowed {allowed}"

    def _sureness(self, digits: int) -> str:
        if self.bound is None or self.confidence == 0.5 or math.isnan(self.bound.upper):
            return ""
        if math.isinf(self.bound.upper):
            return (
                f": cannot be decided on {self.bound.tokens:,} held-out tokens, which are of fewer than "
                f"{LEAST_BLOCKS:g} documents, or mostly of one"
            )
        bound = f", {100 * self.confidence:g} % bound {self.metric.number(self._limit, digits)}"
        if self.passed:
            return bound
        too_close = f"{bound}: too close to call on {self.bound.tokens:,} held-out tokens"
        needed = self.bound.tokens_for(-self.bound.mean)
        if math.isinf(needed):
            return f"{too_close}, and on any number of them: it is exactly as bad as allowed"
        return f"{too_close}, about {float(f'{needed:.2g}'):,.0f} are needed for such a difference"


def compared(
    metric: Metric, new: Fidelity, other: Fidelity, against: str, confidence: float, margin: float | None
) -> Check:
    """A figure against that of another model on the same held-out text, paired by block.

    Args:
        margin: by how much it may be worse, a share of the other's, of an agreement a share of all tokens; None asks
            for a better one.
    """
    value, room = metric.of(other), margin or 0.0
    factor, shift = 1.0, room
    if metric.higher_is_better:
        allowed = value - room
    else:
        allowed = value + room * abs(value)
        factor, shift = (1.0, math.log1p(room)) if metric.logarithmic else (1.0 + math.copysign(room, value), 0.0)
    bound, sign = None, -1.0 if metric.higher_is_better else 1.0
    tokens_K = [block[0] for block in new.blocks]
    if tokens_K and tokens_K == [block[0] for block in other.blocks]:
        pairs = zip(new.blocks, other.blocks, strict=True)
        excess_K = [sign * (a[metric.column] - factor * b[metric.column]) - shift * a[0] for a, b in pairs]
        bound = upper_bound(excess_K, tokens_K, confidence)
    return Check(metric, metric.of(new), value, allowed, against, bound, confidence, strict=margin is None)


def limited(metric: Metric, new: Fidelity, limit: float, name: str, confidence: float) -> Check:
    """A figure against an absolute limit.

    Args:
        name: of the limit.
    """
    sign, edge = -1.0 if metric.higher_is_better else 1.0, math.log(limit) if metric.logarithmic else limit
    tokens_K = [block[0] for block in new.blocks]
    excess_K = [sign * (block[metric.column] - edge * block[0]) for block in new.blocks]
    bound = upper_bound(excess_K, tokens_K, confidence) if tokens_K else None
    return Check(metric, metric.of(new), None, limit, name, bound, confidence)
