"""`explain` reads the schema alone: every field can be asked for, and a wrong path names the right one."""

from __future__ import annotations

import pytest

from cluster.errors import UserError
from cluster.spec import FamilySpec, LossSpec
from jobs import explain
from jobs.explain import fields_of, find, type_of


def test_a_section_shows_its_meaning_and_each_field_with_type_default_and_meaning() -> None:
    shown = explain.explain("students.loss")
    head, _, meaning, *rest = shown.splitlines()
    assert head == "students.loss: section, optional"
    assert meaning.strip() == " ".join((LossSpec.__doc__ or "").split())
    assert "  hard: number >= 0, default 0.1" in rest and "      Weight of the cross-entropy with the corpus." in rest
    assert "  soft: number >= 0 or section, default 0.9" in rest
    assert [line for line in rest if line.startswith("  divergence: one of forward_kl, reverse_kl, ")]


def test_every_field_of_the_spec_can_be_explained_and_says_what_it_means() -> None:
    """Also those that are added later."""
    paths = list(explain._paths(FamilySpec.model_json_schema()))
    assert len(paths) > 90 and "students.init.layers" in paths and "labels.k" in paths
    assert [path for path in paths if not explain.explain(path).startswith(path)] == []
    told_by_name = {"students.init.source", "labels.kind"}  # they only tell sections apart
    assert {path for path in paths if not all(field.about for field in find(path))} == told_by_name


def test_the_whole_spec_lists_every_section_and_what_is_required() -> None:
    shown = explain.explain("")
    assert all(f"\n  {name}: " in shown for name in FamilySpec.model_fields)
    required = {field.name for field in fields_of(find("")[0].schema) if field.required}
    assert required == {"name", "teacher", "corpus", "students"}


def test_a_field_of_several_variants_is_shown_for_each() -> None:
    shown = explain.explain("students.init.layers")
    assert "students.init.layers (with source: teacher): integer or list of integers, required" in shown
    assert "students.init.layers (with source: scratch): integer > 0, required" in shown
    assert "Fields with source: pretrained:" in explain.explain("students.init")


def test_a_student_s_name_may_stand_in_the_path() -> None:
    assert find("students.small.loss.soft") == find("students.loss.soft")
    assert type_of(find("students.optimizer.betas")[0].schema) == "[number > 0 and < 1, number > 0 and < 1]"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("students.los", "students.loss"),
        ("student.loss", "students.loss"),
        ("lr", "students.lr"),
        ("students.small.ranksx", "students.ranks"),
        ("tracking.url", "tracking.uri, store.uri"),
        ("name.first", "name"),
        ("teacher.", "teacher"),
    ],
)
def test_a_path_that_is_none_names_the_nearest_in_one_line(path: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        explain.explain(path)
    said = str(refused.value)
    assert said.startswith(f"explain: there is no field {path!r}; nearest: {near}") and "\n" not in said


def test_lists_of_choices_have_no_plural() -> None:
    assert type_of(find("notify.events")[0].schema) == "list of one of succeeded, failed, stopped, promoted"
    assert type_of(find("corpus.paths")[0].schema) == "list of strings"
