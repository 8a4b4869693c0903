"""The experiment that is under way, between the doors' records and the decisions on its traffic."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from serving.experiment import Decision, Experiment, ExperimentSpec, Observation, Quality
from serving.plan import Ramp
from serving.records import ARM_CODES, OVERLOADED, Record

# A full queue is no failure to the breaker, which would take an arm out for being asked much. Callers it fails: an arm
# that refuses most requests must not win by how fast it answers the others.
_ERRORS = ARM_CODES | {OVERLOADED}


class Trial:
    """One experiment on live traffic.

    Args:
        carried_out: how many of its decisions have been.
    """

    def __init__(self, experiment: Experiment, carried_out: int = 0) -> None:
        self.experiment = experiment
        self._carried_out = carried_out
        steps = tuple((step.after_s, step.weights) for step in self.spec.ramp)
        self.ramp = Ramp(experiment.started, steps) if steps else None

    @classmethod
    def begin(cls, spec: ExperimentSpec, environment: Mapping[str, str]) -> Trial:
        """Start one now."""
        return cls(Experiment(spec, time.time(), environment))

    @classmethod
    def restored(cls, record: Mapping[str, Any]) -> Trial:
        """The trial of a :meth:`record`.

        Raises:
            KeyError, TypeError, ValueError: this is none.
        """
        experiment = Experiment.restore(record)
        # Records of earlier versions do not say; theirs were carried out before they were kept.
        return cls(experiment, record.get("carried_out", len(_decided(experiment))))

    @property
    def spec(self) -> ExperimentSpec:
        """What was declared."""
        return self.experiment.spec

    @property
    def is_over(self) -> bool:
        """Whether it has been decided or stopped."""
        return self.experiment.ended is not None

    @property
    def pending(self) -> Decision | None:
        """The first decision that is still to be carried out."""
        return next(iter(_decided(self.experiment)[self._carried_out :]), None)

    @property
    def is_under_way(self) -> bool:
        """Whether something is still to be decided or carried out."""
        return not self.is_over or self.pending is not None

    def carried_out(self) -> None:
        """The decision that was :attr:`pending` is done."""
        self._carried_out += 1

    def give_up(self, now: float, reason: str) -> None:
        """End it as it is; what is pending is not carried out."""
        if self.is_over:
            self.experiment.note(now, "given_up", f"what was decided is not carried out: {reason}")
        else:
            self.experiment.stop(now, reason)
        self._carried_out = len(_decided(self.experiment))

    def has(self, record: Record) -> bool:
        """Whether a request was meant for this experiment: doors go by an old plan for a moment."""
        return record.experiment == self.spec.name and record.arm in self.spec.arms

    def observe(self, records: Iterable[Record]) -> None:
        """Take in the requests whose arm was drawn for this experiment, and no others."""
        mine = [each for each in records if each.split and self.has(each)]
        self.experiment.observe(
            Observation(
                arm=record.arm,
                at=record.at,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                first_token_ms=None if record.code else record.first_token_ms,
                latency_ms=record.latency_ms,
                error=record.code if record.code in _ERRORS else None,
            )
            for record in mine
            # A caller's own mistake says nothing of the arm.
            if record.code is None or record.code in _ERRORS
        )

    def score(self, scored: Iterable[Quality]) -> None:
        """Take in what the teacher says."""
        self.experiment.score(scored)

    def look(self, now: float) -> None:
        """Decide what is to be decided now; it is :attr:`pending` then."""
        while self.experiment.check(now) is not None:
            pass

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

    def record(self) -> dict[str, Any]:
        """All that :meth:`restored` needs."""
        return {**self.snapshot(values=True), "carried_out": self._carried_out}


def _decided(experiment: Experiment) -> list[Decision]:
    """The decisions of an experiment, in order, as its record has them."""
    return [
        Decision(event["evidence"]["outcome"], event["evidence"]["arm"], event["text"], event["at"], event["evidence"])
        for event in experiment.events
        if event["what"] == "decision"
    ]
