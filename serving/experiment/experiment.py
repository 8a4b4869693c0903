"""The experiment itself: it is told what was seen, looks when it is asked to, and decides by declared rules.

At each look, in this order:

1. A candidate that surely breaks a guard is rolled back (:mod:`serving.experiment.guards`).
2. Of the candidates that are surely better than control by more than ``gain``, with ``min_requests`` answers on both
   sides and no guard in doubt, the one with the best lower end of its interval is promoted.
3. After ``max_requests`` the experiment ends without a winner.

"Surely" means: by an interval that holds at all looks at once, for all candidates and guards together, with the spec's
confidence (how it is shared out: :class:`serving.experiment.guards.Alphas`). The intervals that the snapshot shows
per arm are each for itself at that confidence; in ``comparisons`` the one of the spec's statistic decides, and the
others are made with the same share.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from serving.experiment.decision import Decision
from serving.experiment.guards import Alphas, broken, doubtful
from serving.experiment.history import Traffic, add_thinned
from serving.experiment.observation import Observation, Quality
from serving.experiment.record import ArmRecord, bounds
from serving.experiment.sample import STATISTICS, gain, gain_interval
from serving.experiment.spec import ExperimentSpec


class Experiment:
    """One run of an experiment. Not for several threads at once.

    ``environment`` is what the figures must be read with (machine, versions); it goes into the record as it is.
    """

    def __init__(self, spec: ExperimentSpec, started: float, environment: Mapping[str, str] | None = None) -> None:
        self.spec = spec
        self.started = started
        self.ended: float | None = None
        self.environment = dict(environment or {})
        self.events: list[dict[str, Any]] = []
        self._alphas = Alphas.of(spec)
        self._arms = {arm: ArmRecord("candidate") for arm in spec.arms}
        self._arms[spec.control].state = "control"
        self._traffic = Traffic(started)
        self._timeline: list[dict[str, Any]] = []
        self._news = False  # whether anything came in since the last look
        self.note(started, "started", f"{', '.join(spec.candidates)} against {spec.control}")

    @property
    def candidates(self) -> list[str]:
        """Those that are still in it."""
        return [arm for arm, record in self._arms.items() if record.state == "candidate"]

    def observe(self, seen: Iterable[Observation]) -> None:
        """Take in requests. What comes after the end is not counted, so that the record stays what was decided on.

        Raises:
            ValueError: an arm that the experiment does not have, or a time that is no finite number.
        """
        for each in seen:
            record = self._record(each.arm)
            if self.ended is None:
                record.observe(each)
                self._traffic.count(each.arm, each.at)
                self._news = True

    def score(self, scored: Iterable[Quality]) -> None:
        """Take in what the teacher says about answers; as with :meth:`observe`.

        Raises:
            ValueError: an arm that the experiment does not have, or a score that is no finite number.
        """
        for each in scored:
            record = self._record(each.arm)
            if self.ended is None:
                record.score(each)
                self._news = True

    def note(self, at: float, what: str, text: str, evidence: Mapping[str, Any] | None = None) -> None:
        """Put an event into the record, such as ``weights`` or ``arm_out``."""
        self.events.append({"at": at, "what": what, "text": text, "evidence": dict(evidence or {})})

    def check(self, now: float) -> Decision | None:
        """Look, and decide if it is time to. Costs nothing when nothing came in since the last look.

        After a rollback, ask again: another candidate may have to go as well.
        """
        if self.ended is not None or not self._news:
            return None
        self._news = False
        add_thinned(self._timeline, self._entry(now))
        return self._rollback(now) or self._promotion(now) or self._exhausted(now)

    def stop(self, now: float, reason: str = "stopped by hand") -> Decision:
        """End it without a winner.

        Raises:
            ValueError: it has ended already.
        """
        if self.ended is not None:
            raise ValueError(f"experiment {self.spec.name!r} has ended already")
        return self._end(Decision("stopped", None, reason, now, {"comparisons": self._comparisons()}))

    def _record(self, arm: str) -> ArmRecord:
        if arm not in self._arms:
            raise ValueError(f"experiment {self.spec.name!r} has no arm {arm!r}; it has {', '.join(self._arms)}")
        return self._arms[arm]

    def _rollback(self, now: float) -> Decision | None:
        for arm in self.candidates:
            breach = broken(self.spec, self._arms[arm], self._arms[self.spec.control])
            if breach is None:
                continue
            self._arms[arm].state, self._arms[arm].ended = "rolled_back", now
            self._news = True  # the look is not over: the next may be due as well
            decision = Decision("rollback", arm, f"{arm} is rolled back: {breach.reason}.", now, breach.evidence)
            return self._decided(decision) if self.candidates else self._end(decision)
        return None

    def _promotion(self, now: float) -> Decision | None:
        spec, control = self.spec, self._arms[self.spec.control]
        lows: dict[str, float] = {}
        for arm in self.candidates:
            answers = min(len(self._arms[name].samples[spec.metric]) for name in (arm, spec.control))
            if answers < spec.min_requests or doubtful(spec, self._arms[arm], control):
                continue
            estimate = gain(self._arms[arm].samples[spec.metric], control.samples[spec.metric], spec.statistic)
            if estimate is None or estimate <= spec.gain:  # an interval does not lie above its estimate
                continue
            low = self._gain_interval(arm, spec.statistic)[0]
            # More than, not at least: between arms that give the same few values a gain of 0 is soon certain.
            if low > spec.gain:
                lows[arm] = low
        if not lows:
            return None
        winner = max(lows, key=lambda arm: lows[arm])
        self._arms[winner].state = "winner"
        found = self._comparison(winner, spec.statistic)
        reason = (
            f"{winner} is promoted: its {spec.statistic} of {spec.metric} is {found['gain']:.1%} lower than "
            f"{spec.control}'s, surely more than {lows[winner]:.1%} ({spec.gain:.1%} was asked for), and no guard is "
            "broken."
        )
        evidence = {**found, "statistic": spec.statistic, "metric": spec.metric, "limit": spec.gain}
        counts = {name: record.requests for name, record in self._arms.items()}
        return self._end(
            Decision("promote", winner, reason, now, {**evidence, "alpha": self._alphas.comparison, "requests": counts})
        )

    def _exhausted(self, now: float) -> Decision | None:
        requests = sum(record.requests for record in self._arms.values())
        if requests < self.spec.max_requests:
            return None
        reason = (
            f"no candidate was surely more than {self.spec.gain:.1%} better in {requests} requests "
            f"({self.spec.max_requests} at most)."
        )
        return self._end(Decision("no_winner", None, reason, now, {"comparisons": self._comparisons()}))

    def _decided(self, decision: Decision) -> Decision:
        evidence = {**decision.evidence, "outcome": decision.outcome, "arm": decision.arm}
        self.note(decision.at, "decision", decision.reason, evidence)
        return decision

    def _end(self, decision: Decision) -> Decision:
        self.ended = decision.at
        return self._decided(decision)

    def _gain_interval(self, arm: str, statistic: str) -> tuple[float, float]:
        metric, control = self.spec.metric, self._arms[self.spec.control]
        return gain_interval(
            self._arms[arm].samples[metric], control.samples[metric], statistic, self._alphas.comparison
        )

    def _comparison(self, arm: str, statistic: str) -> dict[str, Any]:
        metric, control = self.spec.metric, self._arms[self.spec.control]
        return {
            "gain": gain(self._arms[arm].samples[metric], control.samples[metric], statistic),
            "interval": bounds(self._gain_interval(arm, statistic)),
        }

    def _comparisons(self) -> dict[str, dict[str, Any]]:
        return {
            arm: {statistic: self._comparison(arm, statistic) for statistic in STATISTICS}
            for arm in self.spec.candidates
        }

    def _entry(self, now: float) -> dict[str, Any]:
        alpha, metric = 1 - self.spec.confidence, self.spec.metric
        arms = {}
        for arm, record in self._arms.items():
            sample = record.samples[metric]
            shown = {name: [sample.estimate(name), *bounds(sample.interval(name, alpha))] for name in STATISTICS}
            arms[arm] = {"requests": record.requests, **shown}
        comparisons = {arm: self._comparison(arm, self.spec.statistic) for arm in self.candidates}
        return {"at": now, "arms": arms, "comparisons": comparisons}

    def _cost(self, arm: str, now: float) -> float | None:
        if arm not in self.spec.cost_per_hour:
            return None
        ends = [end for end in (self._arms[arm].ended, self.ended) if end is not None]
        return self.spec.cost_per_hour[arm] * max(0.0, min(ends, default=now) - self.started) / 3600

    def snapshot(self, now: float | None = None, values: bool = False) -> dict[str, Any]:
        """All there is to know, JSON-able; what ``status``, the record on disk and the report read.

        Args:
            now: until when running replicas are charged; None charges until the last look.
            values: with every single value, from which :meth:`restore` goes on.
        """
        if now is None:
            now = self._timeline[-1]["at"] if self._timeline else self.started
        alpha = 1 - self.spec.confidence
        return {
            "spec": self.spec.model_dump(mode="json"),
            "started": self.started,
            "ended": self.ended,
            "environment": dict(self.environment),
            "arms": {arm: record.summary(alpha, self._cost(arm, now), values) for arm, record in self._arms.items()},
            "comparisons": self._comparisons(),
            "timeline": list(self._timeline),
            "traffic": self._traffic.as_list(),
            "traffic_bucket_s": self._traffic.span_s(),
            "events": list(self.events),
            "news": self._news,
        }

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> "Experiment":
        """Go on from a snapshot with values, as if nothing had been.

        Raises:
            ValueError: the snapshot was taken without values.
        """
        if not all("values" in arm for arm in snapshot["arms"].values()):
            raise ValueError("this snapshot has no values to go on from; take one with snapshot(values=True)")
        spec = ExperimentSpec.model_validate(snapshot["spec"])
        experiment = cls(spec, snapshot["started"], snapshot["environment"])
        experiment.ended = snapshot["ended"]
        experiment.events = list(snapshot["events"])
        experiment._arms = {arm: ArmRecord.restored(snapshot["arms"][arm]) for arm in spec.arms}
        experiment._traffic = Traffic.restored(snapshot["started"], snapshot["traffic_bucket_s"], snapshot["traffic"])
        experiment._timeline = list(snapshot["timeline"])
        experiment._news = snapshot["news"]
        return experiment
