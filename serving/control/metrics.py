"""What `/metrics` says: counted once for all doors, from what they report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.experiment.decision import Outcome
from serving.plan import Plan
from serving.records import Record

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Prometheus metrics of an endpoint. Keys are named, never shown, and no prompt is in them."""

    def __init__(self) -> None:
        self._registry = on = CollectorRegistry()
        arm = ["arm"]
        self._requests = Counter(
            "stillhouse_requests", "Requests by arm and outcome.", ["arm", "kind", "status", "key"], registry=on
        )
        self._first = Histogram(
            "stillhouse_first_token_seconds", "Time to the first token.", arm, buckets=_SECONDS, registry=on
        )
        self._whole = Histogram("stillhouse_latency_seconds", "Whole answers.", arm, buckets=_SECONDS, registry=on)
        self._tokens = Counter("stillhouse_tokens", "Tokens by arm.", ["arm", "side"], registry=on)
        self._weight = Gauge("stillhouse_arm_weight", "Share of the split, relative to the others.", arm, registry=on)
        self._experiment = Gauge(
            "stillhouse_experiment_running", "1 while the experiment is under way.", ["experiment"], registry=on
        )
        self._decisions = Counter(
            "stillhouse_experiment_decisions", "What experiments decided.", ["experiment", "outcome"], registry=on
        )
        self._begun: set[str] = set()
        self._out = Gauge("stillhouse_arm_out", "1 while the arm has failed and is left out.", arm, registry=on)

    def count(self, records: Iterable[Record]) -> None:
        """Add what doors have answered."""
        for record in records:
            kind = "shadow" if record.shadow else "split" if record.split else "named"
            status = "gone" if record.gone else str(record.status)
            self._requests.labels(record.arm, kind, status, record.key).inc()
            self._tokens.labels(record.arm, "prompt").inc(record.prompt_tokens)
            self._tokens.labels(record.arm, "completion").inc(record.completion_tokens)
            if record.latency_ms is not None and not record.shadow:
                self._whole.labels(record.arm).observe(record.latency_ms / 1000)
                if record.first_token_ms is not None:
                    self._first.labels(record.arm).observe(record.first_token_ms / 1000)

    def begun(self, experiment: str) -> None:
        """Count the decisions of an experiment from 0: one that appears with the first of them has not risen."""
        self._begun.add(experiment)
        for outcome in get_args(Outcome):
            self._decisions.labels(experiment, outcome)

    def decided(self, experiment: str, outcome: str) -> None:
        """Count a decision."""
        self._decisions.labels(experiment, outcome).inc()

    def text(self, plan: Plan) -> str:
        """All of them in Prometheus' text format."""
        for arm in plan.routes:
            self._weight.labels(arm).set(plan.weights.get(arm, 0.0))
            self._out.labels(arm).set(arm in plan.out)
        # One that is over is there still, for it may be over before anybody has asked.
        for name in self._begun:
            self._experiment.labels(name).set(name == plan.experiment)
        return generate_latest(self._registry).decode()
