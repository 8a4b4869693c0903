"""What makes a champion one that cannot be compared, on real models and tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.fingerprint import tokenizer_fingerprint
from cluster.models import TeacherModel, load_tokenizer
from cluster.spec import FamilySpec
from cluster.students.champion import why_not_comparable
from cluster.students.job import StudentJob
from tests.tiny import POSITIONS, VOCABULARY, tiny_family


def job_of(teacher: Path, **sections: Any) -> StudentJob:
    """A student of the tiny family; it needs no running family to be asked for its teacher and its corpus."""
    tokenizer = tokenizer_fingerprint(load_tokenizer(teacher, "teacher"))
    nobody: Any = None
    return StudentJob(
        name="small",
        family=FamilySpec.model_validate(tiny_family(teacher, **sections)),
        teacher=TeacherModel(str(teacher), VOCABULARY, "0" * 16, tokenizer),
        student_dir=None,
        batches=1,
        stream=nobody,
        board=nobody,
        storage="",
    )


@pytest.fixture
def champion(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher that a test may change."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "champion"))


def set_in(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_model_with_the_teacher_s_tokenizer_can_be_compared(tiny_teacher: Path, champion: Path) -> None:
    # However it is padded, and whatever its size.
    set_in(champion / "config.json", vocab_size=VOCABULARY, num_hidden_layers=2)
    assert why_not_comparable(champion, job_of(tiny_teacher)) is None


def test_another_tokenizer_cannot(tiny_teacher: Path, champion: Path) -> None:
    tokenizer = json.loads((champion / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Q" * 9] = vocabulary.pop(next(token for token, number in vocabulary.items() if number == 10))
    (champion / "tokenizer.json").write_text(json.dumps(tokenizer))
    reason = why_not_comparable(champion, job_of(tiny_teacher))
    assert reason is not None and reason.startswith("it has another tokenizer than the teacher: id 10 is 'QQQQQQQQQ'")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": VOCABULARY - 1}, "its embedding has 299 rows, the teacher's vocabulary 300 tokens"),
        ({"max_position_embeddings": 16}, "it reads at most 16 tokens, corpus.sequence_length is 32"),
        ({"final_logit_softcapping": 30.0}, "LlamaForCausalLM computes other logits"),  # a Llama does not read it
        ({"model_type": "thin-air"}, "model_type thin-air"),
    ],
    ids=repr,
)
def test_nor_can_a_model_that_cannot_say_what_is_asked(
    tiny_teacher: Path, champion: Path, fields: dict[str, Any], says: str
) -> None:
    set_in(champion / "config.json", **fields)
    reason = why_not_comparable(champion, job_of(tiny_teacher))
    assert reason is not None and says in reason


def test_the_longest_sequence_that_it_reads_is_not_too_long(tiny_teacher: Path, champion: Path) -> None:
    for length, comparable in ((POSITIONS, True), (POSITIONS + 1, False)):
        reason = why_not_comparable(champion, job_of(tiny_teacher, corpus={"sequence_length": length}))
        assert (reason is None) is comparable
