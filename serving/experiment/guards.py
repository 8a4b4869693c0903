"""The guards: what a candidate must not break, and how sure one must be that it did."""

from dataclasses import dataclass
from typing import Any

from serving.experiment.record import DEAD_AFTER, ArmRecord, bounds
from serving.experiment.sample import gain, gain_interval
from serving.experiment.sequences import share_difference
from serving.experiment.spec import ExperimentSpec

# A candidate whose quality is guarded is not promoted before the teacher has seen this many of its answers.
SCORED_NEEDED = 20


@dataclass(frozen=True)
class Alphas:
    """How the chance of a wrong decision, 1 - confidence, is shared out (Bonferroni's inequality).

    Each candidate gets an equal part. Half of it goes to the comparison with control, whose interval has two sides:
    promotion rests on one, the guard ``slower`` on the other. The other half is split equally among the guards on
    errors, KL and agreement that are set; without any, the comparison gets it too. Nothing is spent per look, for a
    confidence sequence holds at all of them. The rule for a dead arm is outside of this account: see DEAD_AFTER.
    """

    comparison: float
    guard: float

    @classmethod
    def of(cls, spec: ExperimentSpec) -> "Alphas":
        """The shares that a spec leads to."""
        each = (1 - spec.confidence) / len(spec.candidates)
        guards = sum(limit is not None for limit in (spec.guards.error_rate, spec.guards.kl, spec.guards.agreement))
        return cls(each / 2, each / 2 / guards) if guards else cls(each, each)


@dataclass(frozen=True)
class Breach:
    """A guard that an arm is past."""

    guard: str
    reason: str
    """What was found against what is allowed."""
    evidence: dict[str, Any]


def broken(spec: ExperimentSpec, candidate: ArmRecord, control: ArmRecord) -> Breach | None:
    """The first guard that the candidate surely breaks; None when all may hold."""
    alphas = Alphas.of(spec)
    if candidate.failed_in_a_row >= DEAD_AFTER and control.answered_at > candidate.failing_since:
        return Breach(
            "dead",
            f"its last {candidate.failed_in_a_row} requests all failed while control answered",
            {"guard": "dead", "failed_in_a_row": candidate.failed_in_a_row, "limit": DEAD_AFTER},
        )
    return (
        _more_errors(spec, candidate, control, alphas)
        or _worse(spec, candidate, alphas)
        or _slower(spec, candidate, control, alphas)
    )


def doubtful(spec: ExperimentSpec, candidate: ArmRecord, control: ArmRecord) -> bool:
    """Whether an estimate is past a guard's limit, or too little was scored to say: no time to promote."""
    guards = spec.guards
    increase = _rate(candidate) - _rate(control)
    if guards.error_rate is not None and increase > guards.error_rate:
        return True
    quality_matters = guards.kl is not None or guards.agreement is not None
    if quality_matters and len(candidate.scored["kl"]) < SCORED_NEEDED:
        return True
    if guards.kl is not None and candidate.score_mean("kl") > guards.kl:
        return True
    return guards.agreement is not None and candidate.score_mean("agreement") < guards.agreement


def _rate(arm: ArmRecord) -> float:
    return arm.errors / arm.requests if arm.requests else 0.0


def _more_errors(spec: ExperimentSpec, candidate: ArmRecord, control: ArmRecord, alphas: Alphas) -> Breach | None:
    limit = spec.guards.error_rate
    increase = _rate(candidate) - _rate(control)
    # An interval holds its estimate, so most looks need none.
    if limit is None or increase <= limit:
        return None
    interval = share_difference(candidate.errors, candidate.requests, control.errors, control.requests, alphas.guard)
    if interval[0] <= limit:
        return None
    return Breach(
        "error_rate",
        f"{candidate.errors} of {candidate.requests} requests failed against {control.errors} of {control.requests} of "
        f"control's: surely {interval[0]:.1%} more, {limit:.1%} is allowed",
        _evidence("error_rate", increase, interval, limit, alphas.guard),
    )


def _worse(spec: ExperimentSpec, candidate: ArmRecord, alphas: Alphas) -> Breach | None:
    for what, limit, sign in (("kl", spec.guards.kl, 1), ("agreement", spec.guards.agreement, -1)):
        if limit is None or sign * candidate.score_mean(what) <= sign * limit or not candidate.scored[what]:
            continue
        low, high = candidate.score_interval(what, alphas.guard)
        end, side, allowed = (low, "least", "most") if sign > 0 else (high, "most", "least")
        if sign * end > sign * limit:
            name = "KL to the teacher" if what == "kl" else "agreement with the teacher"
            return Breach(
                what,
                f"mean {name} over {len(candidate.scored[what])} answers is surely at {side} {end:.3g}, "
                f"at {allowed} {limit:g} is allowed",
                _evidence(what, candidate.score_mean(what), (low, high), limit, alphas.guard),
            )
    return None


def _slower(spec: ExperimentSpec, candidate: ArmRecord, control: ArmRecord, alphas: Alphas) -> Breach | None:
    limit = spec.guards.slower
    ours, theirs = candidate.samples[spec.metric], control.samples[spec.metric]
    estimate = gain(ours, theirs, spec.statistic)
    if limit is None or estimate is None or estimate >= -limit:
        return None
    interval = gain_interval(ours, theirs, spec.statistic, alphas.comparison)
    if interval[1] >= -limit:
        return None
    return Breach(
        "slower",
        f"{spec.statistic} of {spec.metric} is surely {-interval[1]:.1%} higher than control's, {limit:.1%} is allowed",
        _evidence("slower", estimate, interval, limit, alphas.comparison),
    )


def _evidence(guard: str, estimate: float, interval: tuple[float, float], limit: float, alpha: float) -> dict[str, Any]:
    found = {"estimate": estimate, "interval": bounds(interval), "limit": limit, "alpha": alpha}
    return {"guard": guard, **found}
