"""Models that bring Python of their own: allowed by the spec, fetched with them, kept by their students."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from cluster.errors import UserError
from cluster.models import local_model
from cluster.preflight import Checked, preflight
from cluster.spec import FamilySpec
from cluster.students.champion import why_not_comparable
from cluster.students.initial import initial_student
from tests.cluster.students.test_champion import job_of
from tests.tiny import tiny_family, write_tiny_tokenizer
from tests.tiny_types import write_own_code

SIZES = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 64}
TRUSTED = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, own_code_cache: Path) -> Path:
    """A model of a type that transformers does not know. Not to be written to."""
    folder = tmp_path_factory.mktemp("own") / "model.v1"
    write_tiny_tokenizer(folder)
    return write_own_code(folder, vocab_size=320, max_position_embeddings=512)


@pytest.fixture
def check(own: Path, tiny_teacher: Path, tiny_corpus: Path, stillhouse_home: Path) -> Callable[..., Checked]:
    def run(teacher: Path, init: dict[str, Any], /, **sections: Any) -> Checked:
        tree = tiny_family(teacher, tiny_corpus, **sections)
        tree["students"]["small"]["init"] = init
        return preflight(FamilySpec.model_validate(tree))

    return run


@pytest.mark.parametrize(
    "init", [{"source": "teacher", "layers": 2}, {"source": "scratch", **SIZES}], ids=["layers", "scratch"]
)
def test_a_student_of_a_trusted_teacher_is_built_and_saved_with_its_code(
    check: Any, own: Path, tmp_path: Path, init: dict[str, Any]
) -> None:
    checked = check(own, init, teacher=TRUSTED)
    assert checked.packing == {"small": "exact"}  # the probe could build it too
    built = initial_student(
        checked.spec.students["small"].init,
        teacher_dir=own,
        student_dir=None,
        dtype=torch.float32,
        trust_remote_code=checked.spec.trusts_code("small"),
    )
    assert type(built).__name__ == "OwnForCausalLM"
    built.save_pretrained(tmp_path / "saved")
    assert {"modeling_own.py", "configuration_own.py"} <= {path.name for path in (tmp_path / "saved").iterdir()}


def test_a_pretrained_student_is_trusted_on_its_own(check: Any, own: Path, tiny_teacher: Path) -> None:
    init = {"source": "pretrained", "model": str(own)}
    assert check(tiny_teacher, {**init, **TRUSTED}).student_dirs == {"small": own}
    with pytest.raises(UserError, match=r"set students.small.init.trust_remote_code: true"):
        check(tiny_teacher, init, teacher=TRUSTED)


@pytest.mark.parametrize(("code", "fetched"), [(True, True), (False, False)])
def test_python_is_fetched_from_a_hub_where_it_may_run(
    code: bool, fetched: bool, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        names = [path.name for path in own.iterdir()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(own / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = local_model("hf://org/own", revision=None, tracking_uri="", field="teacher.model", code=code)
    assert (found / "model.safetensors").is_file() and (found / "tokenizer.json").is_file()
    assert (found / "modeling_own.py").is_file() is fetched


def test_a_known_type_is_served_without_the_code_beside_it(check: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    known = Path(shutil.copytree(tiny_teacher, tmp_path / "known"))
    tree = json.loads((known / "config.json").read_text())
    tree["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (known / "config.json").write_text(json.dumps(tree))
    assert check(known, {"source": "teacher", "layers": 2}, serving={}).sizes()


def test_a_champion_with_code_is_measured_where_the_family_trusts_it(own: Path, tiny_teacher: Path) -> None:
    trusted, other = FamilySpec.model_validate(tiny_family(tiny_teacher, teacher=TRUSTED)), job_of(tiny_teacher)
    assert why_not_comparable(own, dataclasses.replace(other, family=trusted)) is None
    assert "trust_remote_code" in (why_not_comparable(own, other) or "")
