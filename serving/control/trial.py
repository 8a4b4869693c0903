"""The experiment that is under way, between the doors' records and the decisions on its traffic."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from serving.experiment import Decision, Experiment, ExperimentSpec, Observation, Quality
from serving.plan import Ramp
from serving.records import ARM_CODES, Record


class Trial:
    """One experiment on live traffic."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        steps = tuple((step.after_s, step.weights) for step in self.spec.ramp)
        self.ramp = Ramp(experiment.started, steps) if steps else None

    @classmethod
    def begin(cls, spec: ExperimentSpec, environment: Mapping[str, str]) -> Trial:
        """Start one now."""
        return cls(Experiment(spec, time.time(), environment))

    @property
    def spec(self) -> ExperimentSpec:
        """What was declared."""
        return self.experiment.spec

    @property
    def is_over(self) -> bool:
        """Whether it has been decided or stopped."""
        return self.experiment.ended is not None

    def observe(self, records: Iterable[Record]) -> None:
        """Take in the requests whose arm was drawn for this experiment, and no others."""
        arms = set(self.spec.arms)
        mine = [each for each in records if each.split and each.experiment == self.spec.name and each.arm in arms]
        self.experiment.observe(
            Observation(
                arm=record.arm,
                at=record.at,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                first_token_ms=None if record.code else record.first_token_ms,
                latency_ms=record.latency_ms,
                error=record.code if record.code in ARM_CODES else None,
            )
            for record in mine
            # A caller's own mistake says nothing of the arm.
            if record.code is None or record.code in ARM_CODES
        )

    def score(self, scored: Iterable[Quality]) -> None:
        """Take in what the teacher says."""
        self.experiment.score(scored)

    def decisions(self, now: float) -> list[Decision]:
        """Look; all that is to be done now, in order."""
        found = []
        while (decision := self.experiment.check(now)) is not None:
            found.append(decision)
        return found

    def weights_after(self, decision: Decision, weights: Mapping[str, float]) -> dict[str, float]:
        """The split's weights once a decision holds; arms outside the experiment keep theirs.

        A winner takes the traffic of all the experiment's arms; without one, control does. One that is rolled back
        gives its own to control.
        """
        new = dict(weights)
        if decision.outcome == "rollback" and decision.arm is not None:
            new[self.spec.control] += new[decision.arm]
            new[decision.arm] = 0.0
            if not self.is_over:
                return new
        heir = decision.arm if decision.outcome == "promote" and decision.arm else self.spec.control
        whole = sum(new[arm] for arm in self.spec.arms) or 1.0
        return {**new, **dict.fromkeys(self.spec.arms, 0.0), heir: whole}

    def without_lost(self, weights: Mapping[str, float]) -> dict[str, float]:
        """A ramp's weights with those of rolled-back arms given to control."""
        new = dict(weights)
        for arm in self.spec.candidates:
            if arm not in self.experiment.candidates:
                new[self.spec.control] += new[arm]
                new[arm] = 0.0
        return new

    def snapshot(self, values: bool = False) -> dict[str, Any]:
        """See :meth:`serving.experiment.Experiment.snapshot`."""
        return self.experiment.snapshot(time.time(), values)
