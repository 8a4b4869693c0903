"""What `/metrics` says of experiments."""

from __future__ import annotations

from serving.control.metrics import Metrics
from serving.plan import Plan


def running(metrics: Metrics, plan: Plan) -> dict[str, float]:
    lines = [line for line in metrics.text(plan).splitlines() if line.startswith("stillhouse_experiment_running{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def test_an_experiment_that_ended_between_two_looks_is_seen_all_the_same() -> None:
    metrics = Metrics()
    assert running(metrics, Plan()) == {}
    metrics.begun("short")
    assert running(metrics, Plan()) == {"short": 0.0}
    metrics.begun("long")
    assert running(metrics, Plan(experiment="long")) == {"short": 0.0, "long": 1.0}
    assert running(metrics, Plan()) == {"short": 0.0, "long": 0.0}
