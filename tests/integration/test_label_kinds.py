"""Every kind of labels from the teacher to trained students, through ZeRO, bfloat16 and gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.board import Point
from tests.tiny import run_here, write_family

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.usefixtures("ray_cluster", "stillhouse_home"),
]

KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"kind": "sampled", "draws": 24},
    "hidden": {"kind": "hidden"},
    "dense": {"kind": "dense"},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "teacher-itself": {
        "init": {"source": "teacher", "layers": 4},
        "zero_stage": 3,
        "ranks": 2,
        "precision": "float32",
        "lr": 1e-9,
        "loss": {"hard": 0.0, "soft": 1.0},
    },
    "small": {
        "init": {"source": "teacher", "layers": 2},
        "zero_stage": 2,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "lr": 3e-3,
        "loss": {"soft": {"start": 0.5, "end": 1.0, "over": 0.5}},
    },
}


def curve(points: list[Point], student: str, metric: str) -> list[float]:
    return [point.metrics[metric] for point in points if point.student == student]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_teaches_and_the_teacher_itself_has_nothing_to_learn(kind: str, tiny: Path, tmp_path: Path) -> None:
    path = write_family(
        tmp_path,
        tiny,
        students=STUDENTS,
        labels=KINDS[kind],
        corpus={"max_batches": 40},
        evaluation={"angle_every": 20},
    )
    checked, result, _ = run_here(path)
    assert checked.spec.labels.kind == kind
    assert result.failed == {}
    assert set(result.stats.scored.values()) == {1}
    own = curve(result.points, "teacher-itself", "kl")
    # Draws are unbiased, not exact: only their mean over many tokens is near 0.
    assert abs(sum(own) / len(own)) < 0.05 if kind == "sampled" else max(map(abs, own)) < 1e-4
    assert result.students["teacher-itself"].after.kl < 1e-4
    assert result.students["teacher-itself"].after.agreement > 0.99
    small = result.students["small"]
    assert small.after.kl < 0.85 * small.before.kl
    # The teacher itself has no gradient that an angle could be measured to.
    small_points = [point.metrics for point in result.points if point.student == "small"]
    angles = [metrics["gradient_angle"] for metrics in small_points if "gradient_angle" in metrics]
    assert len(angles) == (2 if kind == "sampled" else 0)
    assert all(0.0 < angle < 90.0 for angle in angles)
    assert 0.0 <= small.after.calibration_error <= 1.0
