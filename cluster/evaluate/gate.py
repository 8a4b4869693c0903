"""Whether a new student takes the champion's place: figures and margins in, a verdict with its reason out.

No Ray, no MLflow, no torch: whatever is to be known has been measured before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.evaluate.figures import Fidelity
from cluster.spec.promotion import PromotionSpec

# What can become of a version; also the values of its tag in the registry.
PROMOTED, KEPT, ROLLED_BACK = "promoted", "kept", "rolled back"
SAID = {PROMOTED: "is champion", KEPT: "stays challenger", ROLLED_BACK: "was rolled back"}
# Two figures that differ by less than this share of them are the same: only their rounding differs.
ROUNDING = 1e-9
# Digits that a figure is shown with, and the most where two would look alike.
DIGITS, MOST_DIGITS = 3, 12


@dataclass(frozen=True)
class Figures:
    """What is looked at of the new student and of the champion.

    Attributes:
        kl, agreement, perplexity: on held-out text, see :class:`~cluster.evaluate.figures.Fidelity`.
        latency_ms: median time of a whole answer; None where it was not measured.
    """

    kl: float
    agreement: float
    perplexity: float
    latency_ms: float | None = None

    @classmethod
    def of(cls, fidelity: Fidelity, latency_ms: float | None) -> Figures:
        """Of what was measured."""
        return cls(fidelity.kl, fidelity.agreement, fidelity.student_perplexity, latency_ms)


@dataclass(frozen=True)
class Verdict:
    """What became of a new version, and why.

    Attributes:
        outcome: ``PROMOTED`` or ``KEPT``; ``ROLLED_BACK`` where somebody has taken it back since.
        reason: one line with the figures.
        against: the champion's version that it was compared with; None where there was none.
    """

    outcome: str
    reason: str
    against: int | None = None

    @property
    def promoted(self) -> bool:
        """Whether the new version takes the champion's place."""
        return self.outcome == PROMOTED

    def line(self, model: str, version: int) -> str:
        """The verdict as the terminal says it. Others read this line out of a job's log: it begins like this."""
        return f"promotion: {model} v{version} {SAID[self.outcome]}: {self.reason}"


@dataclass(frozen=True)
class _Gated:
    """One figure that counts: the new one, the champion's, and the worst that the margin allows."""

    name: str
    new: float | None
    champion: float | None
    allowed: float | None
    higher_is_better: bool = False
    scale: float = 1.0
    unit: str = ""

    @property
    def known(self) -> bool:
        return self.new is not None and math.isfinite(self.new)

    @property
    def kept(self) -> bool:
        """Whether the new figure keeps the margin. One of the champion that is no number sets no limit."""
        if not self.known:
            return False
        if self.allowed is None or not math.isfinite(self.allowed):
            return True
        assert self.new is not None
        slack = ROUNDING * max(abs(self.new), abs(self.allowed))
        over = self.allowed - self.new if self.higher_is_better else self.new - self.allowed
        return over <= slack

    def _number(self, value: float, digits: int) -> str:
        value *= self.scale
        if not math.isfinite(value) or abs(value) >= 1e6:
            return f"{value:.{digits}g}"
        whole = math.floor(math.log10(abs(value))) if value else 0
        return f"{value:.{max(0, digits - 1 - whole)}f}"

    def alone(self) -> str:
        if self.new is None:
            return f"{self.name} was not measured"
        return f"{self.name} {self._number(self.new, DIGITS)}{self.unit}"

    def against(self, version: int) -> str:
        """The figures in words, with as many digits as it takes to see that a margin is not kept."""
        if self.new is None or self.champion is None or self.allowed is None:
            return f"{self.name} was not measured" + (f" of champion v{version}" if self.new is not None else "")
        digits = DIGITS
        while not self.kept and digits < MOST_DIGITS and self._same(digits):
            digits += 1
        new, champion, allowed = (self._number(each, digits) for each in (self.new, self.champion, self.allowed))
        return f"{self.name} {new}{self.unit} against {champion}{self.unit} of champion v{version}, allowed {allowed}"

    def _same(self, digits: int) -> bool:
        assert self.new is not None and self.allowed is not None
        return self._number(self.new, digits) == self._number(self.allowed, digits)


def decide(margins: PromotionSpec, new: Figures, champion: Figures | None, against: int | None) -> Verdict:
    """Whether a new student takes the champion's place. A pure function.

    Args:
        new, champion: measured on the same held-out batches and, where latency counts, served side by side. Without a
            champion the new one is promoted, unless one of its figures is no finite number or was not measured.
        against: the champion's version; None exactly where there is no champion.
    """
    gated = _gated(margins, new, champion)
    if champion is None or against is None:
        if bad := [each.alone() for each in gated if not each.known]:
            return Verdict(KEPT, f"{'; '.join(bad)}; a champion needs finite figures")
        return Verdict(PROMOTED, f"there was no champion; {'; '.join(each.alone() for each in gated)}")
    worse = [each for each in gated if not each.kept or each.champion is None]
    shown = "; ".join(each.against(against) for each in worse or gated)
    return Verdict(KEPT if worse else PROMOTED, shown, against)


def _gated(margins: PromotionSpec, new: Figures, champion: Figures | None) -> list[_Gated]:
    def rising(name: str, field: str, margin: float, unit: str = "") -> _Gated:
        value = None if champion is None else getattr(champion, field)
        allowed = None if value is None else value + margin * abs(value)
        return _Gated(name, getattr(new, field), value, allowed, unit=unit)

    agreement = None if champion is None else champion.agreement
    lowest = None if agreement is None else agreement - margins.agreement
    figures = [
        rising("KL", "kl", margins.kl),
        rising("perplexity", "perplexity", margins.perplexity),
        _Gated("agreement", new.agreement, agreement, lowest, higher_is_better=True, scale=100.0, unit=" %"),
    ]
    if margins.latency is not None:
        figures.append(rising("answer p50", "latency_ms", margins.latency, " ms"))
    return figures
