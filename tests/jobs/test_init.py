"""A new family file: what is given is in it, what is commented out is the default, and `check` takes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.specfile import load_spec
from jobs.init import CORPUS, TEACHER, write_family


def test_a_file_from_options_holds_them_and_nothing_is_left_to_fill_in(tmp_path: Path, tiny_teacher: Path) -> None:
    path = tmp_path / "nightly.yaml"
    students = ["cut=3", f"own={tiny_teacher}"]
    assert write_family(path, str(tiny_teacher), ["a.jsonl", "s3://bucket/b/"], students, None) == []
    spec = load_spec(path)
    assert (spec.name, spec.teacher.model) == ("nightly", str(tiny_teacher))
    assert spec.corpus.paths == [str(Path("a.jsonl").absolute()), "s3://bucket/b/"]
    inits = {name: student.init.model_dump(exclude={"source", "revision"}) for name, student in spec.students.items()}
    assert inits == {"cut": {"layers": 3}, "own": {"model": str(tiny_teacher), "trust_remote_code": False}}


def test_without_options_the_paths_are_left_to_fill_in_and_a_known_teacher_is_halved(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    assert write_family(tmp_path / "My File.yaml", None, [], [], None) == ["teacher.model", "corpus.paths"]
    spec = load_spec(tmp_path / "My File.yaml")
    assert (spec.name, spec.teacher.model, spec.corpus.paths) == ("family", TEACHER, [CORPUS])
    assert write_family(tmp_path / "b.yaml", str(tiny_teacher), [], [], "b") == ["corpus.paths"]
    assert 'init: {"source": "teacher", "layers": 2}' in (tmp_path / "b.yaml").read_text()


def test_sequences_are_no_longer_than_the_teacher_reads(tmp_path: Path) -> None:
    for number, config in enumerate(({"max_position_embeddings": 256, "num_hidden_layers": 6}, {"n_positions": 1024})):
        teacher = tmp_path / f"{number}"
        teacher.mkdir()
        (teacher / "config.json").write_text(json.dumps(config))
        write_family(tmp_path / f"{number}.yaml", str(teacher), [], [], "a")
    short, long = (load_spec(tmp_path / f"{number}.yaml").corpus.sequence_length for number in range(2))
    assert (short, long) == (256, 512)


def test_every_default_that_is_commented_out_is_the_default(tmp_path: Path) -> None:
    write_family(tmp_path / "a.yaml", None, [], [], "a")
    text = (tmp_path / "a.yaml").read_text()
    bare, count = re.subn(r"^( *)#(?=\w)", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "b.yaml").write_text(bare)
    assert count > 40
    assert load_spec(tmp_path / "b.yaml") == load_spec(tmp_path / "a.yaml")


def test_names_that_yaml_takes_for_something_else_stay_names(tmp_path: Path) -> None:
    names = ["on", "1", "null", "2026-11-24", "y", "small"]
    write_family(tmp_path / "a.yaml", None, [], [f"{name}=2" for name in names], "a")
    assert list(load_spec(tmp_path / "a.yaml").students) == names
    assert "\n  small:" in (tmp_path / "a.yaml").read_text()


def test_a_variable_in_a_path_is_expanded_before_the_path_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    write_family(tmp_path / "a.yaml", "$MODELS/teacher", ["$MODELS/*/"], [], "a")
    spec = load_spec(tmp_path / "a.yaml")
    assert (spec.teacher.model, spec.corpus.paths) == (f"{tmp_path}/teacher", [f"{tmp_path}/*/"])


def test_a_number_that_python_cannot_read_is_a_models_name(tmp_path: Path) -> None:
    write_family(tmp_path / "a.yaml", None, [], ["small=\N{SUPERSCRIPT TWO}"], "a")
    assert load_spec(tmp_path / "a.yaml").students["small"].init.source == "pretrained"


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "family.yaml"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"family\.yaml is there already and is not overwritten"):
        write_family(path, None, [], [], None)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("students", "name", "says"),
    [
        (["small"], None, "--student: got 'small'; give NAME=LAYERS"),
        (["a=1", "a=2"], None, "--student: a name is given twice"),
        (["Large=1"], None, "students.Large"),
        (["small=0"], None, "students.small.init.layers"),
        ([], "No Name", "name: got 'No Name'"),
    ],
)
def test_an_option_that_cannot_be_used_leaves_nothing(
    tmp_path: Path, students: list[str], name: str | None, says: str
) -> None:
    with pytest.raises(UserError) as refused:
        write_family(tmp_path / "family.yaml", None, [], students, name)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent/a.yaml: cannot be written: No such file or directory; give a file in"):
        write_family(tmp_path / "absent" / "a.yaml", None, [], [], None)
