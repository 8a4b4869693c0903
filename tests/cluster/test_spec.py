"""What the spec refuses although each field by itself is allowed, and that every field is documented."""

from collections.abc import Mapping
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from cluster.spec import Divergence, FamilySpec, LabelsSpec, LossSpec, PromotionSpec, TopKLabels
from cluster.spec.loss import why_not
from tests.tiny import tiny_family

SCRATCH = {"source": "scratch", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 64}


def family(**sections: Mapping[str, Any]) -> FamilySpec:
    return FamilySpec.model_validate(tiny_family(**sections))


def labels_of(fields: dict[str, Any]) -> LabelsSpec:
    return TypeAdapter(LabelsSpec).validate_python(fields)  # type: ignore[no-any-return]


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
    "minutes beside every": ({"checkpoints": {"every": 5, "minutes": 3}}, "no effect with every"),
    "an unknown tracking scheme": ({"tracking": {"uri": "file:///tmp/mlruns"}}, "allowed are http"),
    "a latency that nothing measures": ({"promotion": {"latency": 0.1}}, "no effect without serving"),
    "a margin that asks for a better one": ({"promotion": {"kl": -0.1}}, "greater than or equal to 0"),
    "a margin for more than all tokens": ({"promotion": {"agreement": 1.1}}, "less than or equal to 1"),
    "a limit that no student keeps": ({"promotion": {"max_kl": 0.0}}, "greater than 0"),
    "a perplexity below that of certainty": ({"promotion": {"max_perplexity": 1.0}}, "greater than 1"),
    "a confidence below a coin's": ({"promotion": {"confidence": 0.4}}, "greater than or equal to 0.5"),
    "a certain confidence": ({"promotion": {"confidence": 1.0}}, "less than 1"),
    "a boundless margin": ({"promotion": {"perplexity": float("inf")}}, "finite"),
    "no labels": ({"labels": {"k": None}}, "valid integer"),
    "no file": ({"corpus": {"paths": []}}, "at least 1 item"),
    "everything held out": ({"corpus": {"held_out": 1.0}}, "less than 1"),
    "no temperature": ({"labels": {"temperature": 0}}, "greater than 0"),
    "a boundless temperature": ({"labels": {"temperature": float("inf")}}, "finite"),
}


@pytest.mark.parametrize(("sections", "allowed"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradictory_section_is_refused(sections: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValidationError, match=allowed):
        family(**sections)


KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 8, "temperature": 2.0},
    "sampled": {"kind": "sampled", "draws": 10, "temperature": 2.0},
    "hidden": {"kind": "hidden"},
    "dense": {"kind": "dense"},
}
DIVERGENCES = get_args(Divergence)
MIXED = {"jensen_shannon": 0.5, "skewed_kl": 0.1, "skewed_reverse_kl": 0.1}
# What a kind cannot give, and what the refusal says of it.
BIASED = "not linear in the teacher's probabilities"
NOT_GIVEN = {("sampled", divergence): BIASED for divergence in DIVERGENCES if divergence != "forward_kl"}
NOT_GIVEN["topk", "adaptive_kl"] = "which the tail bucket of topk labels hides"


def test_every_divergence_is_known_here() -> None:
    assert len(DIVERGENCES) == 7
    assert {*MIXED, "forward_kl", "reverse_kl", "adaptive_kl", "total_variation"} == set(DIVERGENCES)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_labels_gives_the_losses_that_it_can_give_without_a_bias(kind: str, divergence: str) -> None:
    reason = why_not(labels_of(KINDS[kind]), LossSpec.model_validate({"divergence": divergence}))
    wanted = NOT_GIVEN.get((kind, divergence))
    if wanted is None:
        assert reason is None
        return
    assert reason is not None
    assert wanted in reason
    assert divergence in reason
    assert "hidden or dense labels" in reason


def test_a_family_whose_labels_do_not_give_a_student_s_loss_is_refused() -> None:
    shape = tiny_family()["students"]["small"]
    students = {"fine": shape, "greedy": {**shape, "loss": {"divergence": "reverse_kl"}}}
    tree = {**tiny_family(students=students), "labels": {"kind": "sampled"}}
    with pytest.raises(ValidationError, match=r"students\.greedy\.loss: divergence reverse_kl is not linear"):
        FamilySpec.model_validate(tree)
    assert FamilySpec.model_validate(tree | {"labels": {"kind": "hidden"}})


RAMP = {"start": 1.0, "end": 2.0}


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize(("given", "shown"), [(3.0, "temperature 3 differs"), (RAMP, "temperature a ramp differs")])
def test_labels_that_were_made_at_one_temperature_give_no_other(kind: str, given: Any, shown: str) -> None:
    reason = why_not(labels_of(KINDS[kind]), LossSpec(temperature=given))
    assert reason is not None
    assert shown in reason
    assert "labels.temperature 2;" in reason
    assert f"{kind} labels" in reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_that_says_nothing_new_is_allowed(kind: str) -> None:
    assert why_not(labels_of(KINDS[kind]), LossSpec()) is None
    assert why_not(labels_of(KINDS[kind]), LossSpec(temperature=2.0)) is None


@pytest.mark.parametrize("kind", ["hidden", "dense"])
@pytest.mark.parametrize("given", [0.5, 7.0, RAMP], ids=repr)
def test_labels_that_hold_everything_give_any_temperature(kind: str, given: Any) -> None:
    assert why_not(labels_of(KINDS[kind]), LossSpec(temperature=given)) is None


@pytest.mark.parametrize("given", [0.0, -1.0, {"start": 0.0, "end": 1.0}, {"start": 1.0, "end": 0.0}], ids=repr)
def test_a_temperature_of_the_loss_is_above_0_all_the_way(given: Any) -> None:
    with pytest.raises(ValidationError, match=r"greater than 0|above 0"):
        LossSpec(temperature=given)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_mixture_is_allowed_where_it_has_an_effect(divergence: Any) -> None:
    assert LossSpec(divergence=divergence).mixture == MIXED.get(divergence, 0.5)
    if divergence in MIXED:
        assert LossSpec(divergence=divergence, mix=0.3).mixture == 0.3
        return
    with pytest.raises(ValidationError, match=f"no effect on {divergence}; it is allowed with jensen_shannon, skewed"):
        LossSpec(divergence=divergence, mix=0.3)


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.1, float("nan")])
def test_a_mixture_of_one_side_only_is_refused(mix: float) -> None:
    with pytest.raises(ValidationError):
        LossSpec(divergence="jensen_shannon", mix=mix)


BAD_RAMPS: dict[str, tuple[dict[str, Any], str]] = {
    "no end": ({"start": 1.0}, "required"),
    "no start": ({"end": 1.0}, "required"),
    "below 0": ({"start": -1.0, "end": 1.0}, "greater than or equal to 0"),
    "over nothing": ({**RAMP, "over": 0.0}, "greater than 0"),
    "over more than there is": ({**RAMP, "over": 1.1}, "less than or equal to 1"),
    "an unknown shape": ({**RAMP, "shape": "step"}, "'linear' or 'cosine'"),
    "an unknown field": ({**RAMP, "until": 3}, "not permitted"),
    "a boundless end": ({"start": 1.0, "end": float("inf")}, "finite"),
}


@pytest.mark.parametrize("field", ["soft", "temperature"])
@pytest.mark.parametrize(("ramp", "allowed"), BAD_RAMPS.values(), ids=BAD_RAMPS)
def test_a_ramp_that_leads_nowhere_is_refused(field: str, ramp: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValidationError, match=allowed):
        LossSpec.model_validate({field: ramp})


@pytest.mark.parametrize("ramp", [RAMP, {**RAMP, "over": 1.0, "shape": "cosine"}, {"start": 2, "end": 1, "over": 0.1}])
def test_a_ramp_may_rise_or_fall_over_any_share(ramp: dict[str, Any]) -> None:
    assert LossSpec.model_validate({"soft": ramp, "temperature": ramp})


@pytest.mark.parametrize(("start", "end", "hard", "allowed"), [(0, 0, 0, False), (0, 1, 0, True), (0, 0, 1, True)])
def test_a_loss_without_any_weight_is_refused_be_it_a_ramp(
    start: float, end: float, hard: float, allowed: bool
) -> None:
    fields = {"hard": hard, "soft": {"start": start, "end": end}}
    if allowed:
        assert LossSpec.model_validate(fields)
        return
    with pytest.raises(ValidationError, match="both 0"):
        LossSpec.model_validate(fields)


@pytest.mark.parametrize("fields", [{}, {"k": 64}, {"kind": "topk"}, {"temperature": 1.0}], ids=repr)
def test_labels_are_top_k_where_nothing_is_said(fields: dict[str, Any]) -> None:
    assert labels_of(fields) == TopKLabels()
    assert FamilySpec.model_validate({**tiny_family(), "labels": fields}).labels == TopKLabels()
    assert TopKLabels().kind == "topk"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told_by_its_name_and_survives_being_validated_again(kind: str) -> None:
    labels = labels_of(KINDS[kind])
    assert labels.kind == kind
    assert labels_of(labels) == labels  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"kind": "sampled", "draws": 0}, "greater than or equal to 1"),
        ({"kind": "sampled", "draws": 1025}, "less than or equal to 1024"),
        ({"kind": "sampled", "k": 8}, "not permitted"),
        ({"kind": "topk", "draws": 8}, "not permitted"),
        ({"kind": "hidden", "temperature": 2.0}, "not permitted"),
        ({"kind": "dense", "temperature": 2.0}, "not permitted"),
        ({"kind": "topk", "temperature": 0.0}, "greater than 0"),
        ({"kind": "logits"}, "'topk', 'sampled', 'hidden', 'dense'"),
        ({"kind": None}, "'topk', 'sampled', 'hidden', 'dense'"),
    ],
    ids=repr,
)
def test_a_field_of_another_kind_is_refused(fields: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValidationError, match=allowed):
        labels_of(fields)


LOSSES = [
    {},
    {"soft": {"start": 0.0, "end": 1.0, "over": 0.5, "shape": "cosine"}},
    {"temperature": 2.0},
    {"temperature": {"start": 4.0, "end": 1.0}},
    {"divergence": "skewed_kl", "mix": 0.2},
]


GIVEN = [
    (kind, loss)
    for kind in KINDS
    for loss in LOSSES
    if why_not(labels_of(KINDS[kind]), LossSpec.model_validate(loss)) is None
]


@pytest.mark.parametrize(("kind", "loss"), GIVEN, ids=repr)
def test_a_spec_of_any_kind_comes_back_from_json(kind: str, loss: dict[str, Any]) -> None:
    shape = tiny_family()["students"]["small"] | {"loss": loss}
    tree = {**tiny_family(students={"small": shape}), "labels": KINDS[kind]}
    spec = FamilySpec.model_validate(tree)
    assert FamilySpec.model_validate(spec.model_dump(mode="json")) == spec
    assert FamilySpec.model_validate_json(spec.model_dump_json()) == spec


BAD_STUDENTS: dict[str, tuple[dict[str, Any], str]] = {
    "ranks that do not share out the batch": ({"ranks": 3}, r"ranks 3 x micro_batch 1 = 3 does not divide .* 4"),
    "a micro-batch above the batch": ({"micro_batch": 8}, r"= 8 does not divide corpus.batch_sequences 4"),
    "nothing to learn from": ({"loss": {"hard": 0, "soft": 0}}, "both 0"),
    "a final rate that stays": ({"schedule": {"kind": "constant", "final": 0.2}}, "no effect on a constant"),
    "a warm-up without an end": ({"schedule": {"warmup": 1.0}}, "less than 1"),
    "half a device each": ({"gpus_per_rank": 0.5, "ranks": 2}, "0 or 1"),
    "two devices": ({"gpus_per_rank": 2.0}, "0 to 1"),
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


@pytest.mark.parametrize(
    ("given", "least", "most"), [(3, 3, 3), ({"min": 1, "max": 4}, 1, 4), ({"min": 2, "max": 2}, 2, 2)]
)
def test_replicas_are_a_number_or_a_range(given: Any, least: int, most: int) -> None:
    spec = family(teacher={"replicas": given})
    assert (spec.teacher.min_replicas, spec.teacher.max_replicas) == (least, most)
    assert FamilySpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("sections", "latency"),
    [
        ({"promotion": {}}, None),
        ({"promotion": {"latency": 0.1}, "serving": {}}, 0.1),
        ({"promotion": {}, "serving": {}}, None),
    ],
    ids=repr,
)
def test_promotion_is_asked_for_by_an_empty_section_and_counts_latency_only_when_told(
    sections: dict[str, Any], latency: float | None
) -> None:
    assert family().promotion is None
    spec = family(**sections)
    assert spec.promotion is not None
    assert spec.promotion == PromotionSpec(kl=0.0, perplexity=0.0, agreement=0.0, latency=latency, confidence=0.95)
    assert spec.promotion.max_kl is spec.promotion.max_perplexity is spec.promotion.min_agreement is None
    assert FamilySpec.model_validate_json(spec.model_dump_json()) == spec


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
