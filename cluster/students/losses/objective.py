"""What a student minimises at one batch: the spec's loss with its ramps resolved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.spec import Divergence, LabelsSpec, LossSpec, Ramp


@dataclass(frozen=True)
class Objective:
    """Loss per token: ``hard * CE(next, q_1) + soft * T^2 * D(p_T, q_T)``.

    Attributes:
        hard, soft: weights of this step.
        temperature: T of this step.
        divergence, mix: D, see :mod:`cluster.students.losses.divergences`.
    """

    hard: float
    soft: float
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    mix: float = 0.5


def _at(value: float | Ramp, batch: int, total: int) -> float:
    """A value of the spec at a batch, counted from 0."""
    if not isinstance(value, Ramp):
        return value
    done = min(1.0, batch / max(1.0, value.over * total - 1))
    share = done if value.shape == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return value.start + (value.end - value.start) * share


def objective_at(loss: LossSpec, labels: LabelsSpec, batch: int, total: int) -> Objective:
    """The objective of a student at batch ``batch`` of ``total``.

    The loss has the labels' T where they fix one; the spec refuses another.
    """
    temperature = getattr(labels, "temperature", None) or loss.temperature or 1.0
    return Objective(
        hard=loss.hard,
        soft=_at(loss.soft, batch, total),
        temperature=_at(temperature, batch, total),
        divergence=loss.divergence,
        mix=loss.mixture,
    )
