"""What the doors go by: one small value that the control hands to all of them, each change a new version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Plan:
    """The traffic as it is to go now.

    Attributes:
        version: grows with every change; doors wait for one above theirs.
        weights: of every arm its share of the split.
        routes: of every arm the Serve application that answers for it; a roll changes it.
        sources: of every arm the model behind it, by its version; the control's own, doors do not look at it.
        addresses: of these applications, where their processes listen.
        gone: addresses of processes that have not been heard of for long; what they have is lost.
        out: arms that have failed and get no split traffic, with the reason.
        shadow: of arms that get copies, which share of the split traffic.
        sample: share of the split traffic whose answers the teacher is to score.
        experiment: name of the experiment that is under way; "" for none.
    """

    version: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    routes: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    out: Mapping[str, str] = field(default_factory=dict)
    shadow: Mapping[str, float] = field(default_factory=dict)
    sample: float = 0.0
    experiment: str = ""

    def next(self, **changes: Any) -> Plan:
        """The plan after a change."""
        return replace(self, version=self.version + 1, **changes)

    def out_without(self, arm: str) -> dict[str, str]:
        """The arms that are out, but for this one."""
        return {name: reason for name, reason in self.out.items() if name != arm}


@dataclass(frozen=True)
class Ramp:
    """Weights that take each other's place by themselves: ``after_s`` seconds from its start, these."""

    started: float
    steps: tuple[tuple[float, Mapping[str, float]], ...]

    def at(self, now: float) -> Mapping[str, float] | None:
        """The weights that hold at this moment; None before the first step."""
        due = [weights for after_s, weights in self.steps if now - self.started >= after_s]
        return due[-1] if due else None

    def is_over(self, now: float) -> bool:
        """Whether the last step holds."""
        return all(now - self.started >= after_s for after_s, _ in self.steps)
