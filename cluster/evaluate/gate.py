"""Whether a new student takes the champion's place: figures and margins in, a verdict with its reason out.

No Ray, no MLflow, no torch: whatever is to be known has been measured before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.evaluate.checks import AGREEMENT, KL, LATENCY, PERPLEXITY, Check, Metric, compared, limited
from cluster.evaluate.figures import Fidelity
from cluster.spec import LossSpec, PromotionSpec, Ramp

# What can become of a version; also the values of its tag in the registry.
PROMOTED, KEPT, ROLLED_BACK = "promoted", "kept", "rolled back"
SAID = {PROMOTED: "is champion", KEPT: "stays challenger", ROLLED_BACK: "was rolled back"}


@dataclass(frozen=True)
class Measured:
    """What is looked at of the new student and of the champion.

    Attributes:
        fidelity: on held-out text.
        latency_ms: median time of a whole answer; None where it was not measured, or not of every request.
    """

    fidelity: Fidelity
    latency_ms: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a new version, and why.

    Attributes:
        outcome: ``PROMOTED`` or ``KEPT``; ``ROLLED_BACK`` where somebody has taken it back since.
        reason: one line with the figures.
        against: the champion's version that it was compared with; None where there was none.
        unclear: it was kept because the held-out text is too small to tell, and not because a figure is worse.
    """

    outcome: str
    reason: str
    against: int | None = None
    unclear: bool = False

    @property
    def promoted(self) -> bool:
        """Whether the new version takes the champion's place."""
        return self.outcome == PROMOTED

    def line(self, model: str, version: int) -> str:
        """The verdict as the terminal says it. Others read this line out of a job's log: it begins like this."""
        return f"promotion: {model} v{version} {SAID[self.outcome]}: {self.reason}"


def learnt(loss: LossSpec) -> Metric:
    """The figure that a student must better: its distance from the teacher, unless it learns from the text alone."""
    soft = loss.soft
    never = soft.start == soft.end == 0 if isinstance(soft, Ramp) else soft == 0
    return PERPLEXITY if never else KL


def decide(
    margins: PromotionSpec,
    new: Measured,
    initial: Fidelity,
    champion: Measured | None,
    against: int | None,
    metric: Metric = KL,
) -> Verdict:
    """Whether a new student takes the champion's place. A pure function.

    It does where each condition is shown at ``margins.confidence``: it is better than its own initial weights, worse
    than the champion by no more than the margins, and within the absolute limits. All must hold, so that one that
    breaks any of them is promoted no more often than if there were no others (Berger, 1982, "Multiparameter hypothesis
    testing and acceptance sampling"). The median latencies are compared as they were measured, without an interval.

    Args:
        new, initial, champion: measured on the same held-out batches and, where latency counts, served side by side.
        against: the champion's version; None exactly where there is no champion.
        metric: the figure in which it must be better than its initial weights, see :func:`learnt`.
    """
    figures = [(each, each.of(new.fidelity)) for each in (KL, PERPLEXITY, AGREEMENT)]
    if bad := [each.alone(value) for each, value in figures if not math.isfinite(value)]:
        return Verdict(KEPT, f"{'; '.join(bad)}; a champion needs finite figures", against)
    start = compared(metric, new.fidelity, initial, "its initial weights", margins.confidence, None)
    checks = [start, *_limits(margins, new.fidelity)]
    if champion is not None:
        checks = [*_against(margins, new, champion, f"champion v{against}"), *checks]
    elif margins.latency is not None:
        # There is nothing to compare it with, but it must be known.
        checks.append(Check(LATENCY, new.latency_ms, None, math.inf, "no champion's"))
    if failed := [each for each in checks if not each.passed]:
        unclear = all(each.unclear for each in failed)
        # Of one that is worse, it does not matter what else is too close to call.
        shown = [each.words() for each in failed if unclear or not each.unclear]
        return Verdict(KEPT, "; ".join(shown), against, unclear)
    if champion is not None:
        return Verdict(PROMOTED, "; ".join(each.words() for each in checks), against)
    shown = [each.words() for each in checks if each.metric is not LATENCY]
    shown += [each.alone(value) for each, value in figures if each is not metric]
    if margins.latency is not None:
        shown.append(LATENCY.alone(new.latency_ms))
    return Verdict(PROMOTED, "; ".join(["there was no champion", *shown]))


def _against(margins: PromotionSpec, new: Measured, champion: Measured, who: str) -> list[Check]:
    """That it is worse than the champion by no more than the margins."""
    checks = [
        compared(metric, new.fidelity, champion.fidelity, who, margins.confidence, margin)
        for metric, margin in ((KL, margins.kl), (PERPLEXITY, margins.perplexity), (AGREEMENT, margins.agreement))
    ]
    if margins.latency is not None:
        value = champion.latency_ms
        allowed = None if value is None else value + margins.latency * abs(value)
        checks.append(Check(LATENCY, new.latency_ms, value, allowed, who))
    return checks


def _limits(margins: PromotionSpec, new: Fidelity) -> list[Check]:
    """That it keeps the absolute limits."""
    limits = {"max_kl": KL, "max_perplexity": PERPLEXITY, "min_agreement": AGREEMENT}
    given = [(metric, name, getattr(margins, name)) for name, metric in limits.items()]
    return [
        limited(metric, new, limit, f"promotion.{name}", margins.confidence)
        for metric, name, limit in given
        if limit is not None
    ]
