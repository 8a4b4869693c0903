"""What the spec refuses although each field by itself is allowed, and that every field is documented."""

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.spec import FamilySpec
from tests.tiny import tiny_family

SCRATCH = {"source": "scratch", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 64}


def family(**sections: Mapping[str, Any]) -> FamilySpec:
    return FamilySpec.model_validate(tiny_family(**sections))


def student(**fields: Any) -> FamilySpec:
    tree = tiny_family()
    tree["students"]["small"] |= fields
    return FamilySpec.model_validate(tree)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a revision of a local teacher": ({"teacher": {"revision": "main"}}, "allowed with an hf:// model only"),
    "a part of a GPU for one of several shards": (
        {"teacher": {"shards": 2, "gpus_per_shard": 0.5}},
        "must be 0 or 1 when shards > 1",
    ),
    "keep without every": ({"checkpoints": {"keep": 3}}, "no effect without every"),
    "an unknown tracking scheme": ({"tracking": {"uri": "file:///tmp/mlruns"}}, "allowed are http"),
    "no file": ({"corpus": {"paths": []}}, "at least 1 item"),
    "everything held out": ({"corpus": {"held_out": 1.0}}, "less than 1"),
    "no temperature": ({"labels": {"temperature": 0}}, "greater than 0"),
    "a boundless temperature": ({"labels": {"temperature": float("inf")}}, "finite"),
}


@pytest.mark.parametrize(("sections", "allowed"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradictory_section_is_refused(sections: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValidationError, match=allowed):
        family(**sections)


BAD_STUDENTS: dict[str, tuple[dict[str, Any], str]] = {
    "ranks that do not share out the batch": ({"ranks": 3}, r"ranks 3 x micro_batch 1 = 3 does not divide .* 4"),
    "a micro-batch above the batch": ({"micro_batch": 8}, r"= 8 does not divide corpus.batch_sequences 4"),
    "nothing to learn from": ({"loss": {"hard": 0, "soft": 0}}, "both 0"),
    "a final rate that stays": ({"schedule": {"kind": "constant", "final": 0.2}}, "no effect on a constant"),
    "a warm-up without an end": ({"schedule": {"warmup": 1.0}}, "less than 1"),
    "half a device": ({"gpus_per_rank": 0.5}, "0 or 1"),
    "a boundless learning rate": ({"lr": float("inf")}, "finite"),
    "falling layers": ({"init": {"source": "teacher", "layers": [3, 0]}}, "rising order"),
    "a layer twice": ({"init": {"source": "teacher", "layers": [0, 0]}}, "without repeats"),
    "an empty list of layers": ({"init": {"source": "teacher", "layers": []}}, "rising order"),
    "no layer": ({"init": {"source": "teacher", "layers": 0}}, "1 or more"),
    "a layer below the first": ({"init": {"source": "teacher", "layers": [-1, 2]}}, "from 0"),
    "an unknown source": ({"init": {"source": "thin air"}}, "'teacher', 'pretrained', 'scratch'"),
    "a revision of a local model": (
        {"init": {"source": "pretrained", "model": "/m", "revision": "v1"}},
        "hf:// model",
    ),
    "a width that the heads do not share": ({"init": {**SCRATCH, "hidden_size": 30}}, "divide by heads 4"),
    "heads that the kv heads do not share": ({"init": {**SCRATCH, "kv_heads": 3}}, "divide by kv_heads 3"),
}


@pytest.mark.parametrize(("fields", "allowed"), BAD_STUDENTS.values(), ids=BAD_STUDENTS)
def test_a_contradictory_student_is_refused(fields: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValidationError, match=allowed):
        student(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": {"kind": "constant"}},
        {"loss": {"hard": 0, "soft": 1}},
        {"ranks": 2, "micro_batch": 2},
        {"init": {"source": "teacher", "layers": [0, 3]}},
        {"init": {"source": "pretrained", "model": "hf://org/name", "revision": "v1"}},
        {"init": SCRATCH},
    ],
    ids=repr,
)
def test_the_nearest_allowed_thing_is_not_refused(fields: dict[str, Any]) -> None:
    assert student(**fields)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a/b", "a" * 41])
def test_a_name_that_would_not_make_a_folder_or_a_url_is_refused(name: str) -> None:
    for tree in ({**tiny_family(), "name": name}, tiny_family(students={name: tiny_family()["students"]["small"]})):
        with pytest.raises(ValidationError, match="pattern"):
            FamilySpec.model_validate(tree)


def test_a_spec_cannot_be_changed_once_it_is_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        family().students["small"].lr = 1.0


@pytest.mark.parametrize("fields", [{}, {"schedule": {"kind": "constant"}}, {"init": SCRATCH}], ids=repr)
def test_a_resolved_spec_that_was_written_down_can_be_read_again(fields: dict[str, Any]) -> None:
    spec = student(**fields)
    assert FamilySpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_batch_is_cut_so_that_every_student_s_ranks_share_it_out() -> None:
    shape = tiny_family()["students"]["small"]
    several = family(
        corpus={"batch_sequences": 12}, students={"two": {**shape, "ranks": 2}, "three": {**shape, "ranks": 3}}
    )
    assert several.blocks_per_batch == 6


def test_every_field_has_a_description() -> None:
    schema = FamilySpec.model_json_schema()
    sections = {"FamilySpec": schema, **schema["$defs"]}
    bare = [
        f"{section}.{name}"
        for section, content in sections.items()
        for name, field in content.get("properties", {}).items()
        # A field that is a section itself, and the tag that tells sections apart, are documented by the section.
        if not ("description" in field or "$ref" in field or "const" in field)
    ]
    assert bare == []
    assert [name for name, content in sections.items() if not content.get("description")] == []
