"""Parameters are counted from the configuration alone, and odd proportions are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.loading import load_model, read_config
from cluster.sizes import TEACHER, Parameters, advice, count_parameters, size_lines
from cluster.spec import FamilySpec
from tests.tiny import tiny_family
from tests.tiny_types import write_tiny_type


@pytest.mark.parametrize(
    ("kind", "tied", "tables"), [("llama", False, 2), ("llama", True, 1), ("gpt2", True, 1), ("mixtral", False, 2)]
)
def test_the_count_is_that_of_the_loaded_model(kind: str, tied: bool, tables: int, tmp_path: Path) -> None:
    write_tiny_type(tmp_path, kind, tie_word_embeddings=tied)
    counted = count_parameters(read_config(tmp_path), "teacher.model")
    model = load_model(tmp_path, dtype=torch.float32)
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    assert counted.embeddings == tables * 64 * 32  # 64 tokens of width 32


def warnings(teacher: int, student: int, **loss: Any) -> list[str]:
    tree = tiny_family()
    tree["students"]["small"]["loss"] = loss
    sizes = {TEACHER: Parameters(teacher, 0), "student small": Parameters(student, 0)}
    return advice(FamilySpec.model_validate(tree), sizes)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (2_000_000, "no smaller"),
        (1_000_000, "no smaller"),
        (999_999, "1 times as many: little is saved"),
        (500_001, "2 times as many: little is saved"),
        (500_000, None),
        (400_000, None),
        (100_000, None),
        (99_999, "10 times as many: few students follow so far"),
        (1000, "student small has 1k parameters, its teacher 1M, 1e+03 times as many"),
    ],
)
def test_a_reduction_outside_2_to_10_is_told(student: int, said: str | None) -> None:
    found = warnings(1_000_000, student)
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and "2.5 is a good start" in found[0])


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({}, False),
        ({"hard": 0.01, "soft": 0.99}, False),
        ({"hard": 0.01, "soft": 1.0}, True),
        ({"hard": 0.0}, True),
        ({"hard": 0.05, "soft": {"start": 0.1, "end": 8.0}}, True),
        ({"hard": 1.0, "soft": 0.0}, False),
    ],
    ids=repr,
)
def test_a_loss_that_hardly_sees_the_truth_is_told(loss: dict[str, Any], told: bool) -> None:
    found = warnings(1_000_000, 400_000, **loss)
    assert [line.startswith("warning: students.small.loss.hard is ") for line in found] == [True] * told


def test_a_cut_that_keeps_its_embeddings_shows_it() -> None:
    sizes = {
        TEACHER: Parameters(1_777_088_000, 466_747_392),
        "student cut": Parameters(840_000_000, 466_747_392),
        "student own": Parameters(494_032_768, 136_134_656),
    }
    assert size_lines(sizes) == [
        "the teacher: 1.78B parameters, 467M of them in embeddings",
        "student cut: 840M parameters, 467M of them in embeddings; the teacher has 2.12 times as many",
        "student own: 494M parameters, 136M of them in embeddings; the teacher has 3.6 times as many",
    ]
