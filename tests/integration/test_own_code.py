"""A teacher that brings Python of its own, through the pool, a student, the registry and a warm start."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.registry import Models, fetch_model
from tests.tiny import run_here, write_family, write_tiny_tokenizer
from tests.tiny_types import write_own_code

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.usefixtures("ray_cluster", "stillhouse_home", "own_code_cache"),
]


def test_a_student_of_a_teacher_with_its_own_python_is_registered_and_started_from_again(
    tiny: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    write_tiny_tokenizer(teacher)
    write_own_code(teacher, vocab_size=320, max_position_embeddings=512)

    def family(warm_start: bool) -> Path:
        student = {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "warm_start": warm_start}
        return write_family(
            tmp_path,
            tiny,
            students={"small": student},
            teacher={"model": str(teacher), "trust_remote_code": True},
            corpus={"max_batches": 4},
        )

    checked, first, _ = run_here(family(warm_start=False))
    assert first.trouble == []
    saved = fetch_model("models:/tiny-small/1", checked.tracking_uri)
    assert {"modeling_own.py", "configuration_own.py"} <= {path.name for path in saved.iterdir()}
    Models(checked.tracking_uri).point("tiny-small", "champion", 1, "the first")
    warm, second, _ = run_here(family(warm_start=True))
    assert (warm.champions, second.trouble) == ({"small": 1}, [])
    # It begins where the champion ended.
    assert second.students["small"].before.kl == pytest.approx(first.students["small"].after.kl, rel=1e-3)
