"""What a run tells Prometheus: which run it is, and whether it needs a teacher at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import ray.util.metrics

from cluster.metrics import FamilyMetrics
from cluster.spec import FamilySpec
from cluster.stream.figures import StreamStats
from cluster.teacher.figures import PoolStats
from cluster.watch import Status, StudentStatus
from tests.tiny import tiny_family

STATS = replace(StreamStats.unstarted(10, None), read={0: 1, 1: 1}, delivered={"small": 2})


class Told:
    """In the place of Ray's metrics: every value that it is given, by name and labels."""

    values: dict[str, list[tuple[float, dict[str, str]]]]

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self.name, self.labels = name, labels

    def set(self, value: float, labels: dict[str, str]) -> None:
        assert tuple(labels) == self.labels
        self.values.setdefault(self.name, []).append((value, labels))

    inc = set


def told(monkeypatch: pytest.MonkeyPatch, stats: StreamStats) -> dict[str, list[tuple[float, dict[str, str]]]]:
    seen = type("Seen", (Told,), {"values": {}})
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(ray.util.metrics, kind, seen)
    student = StudentStatus("training", 2, {"kl": 0.5}, 0.0)
    spec = FamilySpec.model_validate(tiny_family())
    FamilyMetrics(spec, "tiny-1").publish(Status("distilling", {"small": student}, stats))
    values: Any = seen.values
    return dict(values)


def test_every_metric_says_whose_it_is_and_of_which_run(monkeypatch: pytest.MonkeyPatch) -> None:
    values = told(monkeypatch, STATS)
    labels = [labels for each in values.values() for _, labels in each]
    assert {(each["family"], each["run"]) for each in labels} == {("tiny", "tiny-1")}
    assert values["stillhouse_student_kl_nats"] == [
        (0.5, {"family": "tiny", "run": "tiny-1", "student": "small"}),
    ]


@pytest.mark.parametrize("started", [False, True])
def test_a_teacher_that_is_not_started_is_told_from_one_without_replicas(
    monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    values = told(monkeypatch, replace(STATS, pool=PoolStats(started=started)))
    assert values["stillhouse_replicas_ready"][0][0] == 0
    assert values["stillhouse_teacher_started"][0][0] == float(started)
