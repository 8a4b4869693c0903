"""What travels with a submitted job."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from cluster.specfile import load_spec
from jobs import submit
from tests.tiny import tiny_family, write_tiny_corpus


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("a text")
    tree = tiny_family("teacher", "corpus.jsonl")
    tree["corpus"]["paths"] = ["corpus.jsonl", "texts", "s3://bucket/b.jsonl"]
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_small_local_text_travels_and_is_found_on_the_other_side(spec_path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    spec = load_spec(spec_path, ["students.small.lr=3e-4"])
    size = submit.pack(spec, packed)
    there = load_spec(packed / submit.SPEC_FILE)
    *local, bucket = there.corpus.paths
    assert [Path(path).exists() for path in local] == [True, True]
    assert all(Path(path).is_relative_to(packed) for path in local)
    assert bucket == "s3://bucket/b.jsonl"
    assert (Path(local[1]) / "deep" / "a.txt").read_text() == "a text"
    assert there.students == spec.students
    assert there.teacher == spec.teacher
    assert size == sum(file.stat().st_size for file in packed.rglob("*") if file.is_file())


def test_too_much_text_is_refused_with_what_to_do(
    spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SHIPPED_LIMIT", 100)
    with pytest.raises(UserError, match="s3://"):
        submit.pack(load_spec(spec_path), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
