"""Everything that can be known to be wrong before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.corpus.files import find_files
from cluster.errors import UserError
from cluster.labels.store.store import LabelStore
from cluster.limits import Most, most_allowed
from cluster.models import (
    TeacherModel,
    load_config,
    load_tokenizer,
    local_model,
    model_fingerprint,
    tokenizer_fingerprint,
)
from cluster.spec import FamilySpec, Pretrained, Scratch, TeacherLayers, TopKLabels
from cluster.specfile import home

# Short of what a run waits for its store: before it, somebody may be looking at a wrong port.
STORE_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Checked:
    """A family that may start.

    Attributes:
        student_dirs: local directories of the pretrained students.
        tracking_uri: the spec's, or the embedded one.
        store: where labels are kept; none where they are not.
        most: what it may hold of the cluster at a time.
    """

    spec: FamilySpec
    teacher: TeacherModel
    student_dirs: dict[str, Path]
    tracking_uri: str
    store: str | None
    most: Most


def tracking_uri_of(spec: FamilySpec) -> str:
    """The spec's MLflow, or SQLite under the Stillhouse home."""
    return spec.tracking.uri or f"sqlite:///{home() / 'mlflow.db'}"


def store_of(spec: FamilySpec) -> str | None:
    """The spec's label store, or the one under the Stillhouse home; none where labels are not kept."""
    if not spec.store.enabled:
        return None
    return spec.store.uri or str(home() / "labels")


def preflight(spec: FamilySpec) -> Checked:
    """Check the teacher, its labels, the students and the corpus files; starts nothing.

    Raises:
        UserError: names the field, what was given and what is allowed.
        RunError: the label store cannot be reached.
    """
    uri = tracking_uri_of(spec)
    teacher = spec.teacher
    most = most_allowed(spec)
    folder = local_model(teacher.model, revision=teacher.revision, tracking_uri=uri, field="teacher.model")
    config = load_config(folder, "teacher.model", teacher.trust_remote_code)
    tokenizer = load_tokenizer(folder, "teacher.model")
    vocabulary = min(len(tokenizer), config.vocab_size)
    if isinstance(spec.labels, TopKLabels) and spec.labels.k > vocabulary:
        raise UserError(f"labels.k: got {spec.labels.k}; the teacher's vocabulary has {vocabulary} tokens")
    _check_length(spec, config, "the teacher")
    _check_shards(spec, config)
    dirs = {}
    for name, student in spec.students.items():
        field = f"students.{name}.init"
        _check_size(field, student.init, config)
        if isinstance(student.init, Pretrained):
            dirs[name] = _check_pretrained(field, student.init, spec, tokenizer, uri)
    find_files(spec.corpus.paths)
    if (store := store_of(spec)) is not None:
        LabelStore.open(store, STORE_PATIENCE_S)
    fingerprints = (model_fingerprint(folder), tokenizer_fingerprint(tokenizer))
    return Checked(spec, TeacherModel(str(folder), vocabulary, *fingerprints), dirs, uri, store, most)


def _check_shards(spec: FamilySpec, config: Any) -> None:
    shards = spec.teacher.shards
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if shards > 1 and (config.num_attention_heads % shards or kv_heads % shards):
        raise UserError(
            f"teacher.shards: got {shards}; the teacher's {config.num_attention_heads} attention heads and {kv_heads} "
            f"key-value heads must both divide by it"
        )


def _check_length(spec: FamilySpec, config: Any, who: str) -> None:
    length, longest = spec.corpus.sequence_length, getattr(config, "max_position_embeddings", None)
    if longest and length > longest:
        raise UserError(f"corpus.sequence_length: got {length}; {who} reads at most {longest} tokens")


def _check_size(field: str, init: TeacherLayers | Pretrained | Scratch, teacher_config: Any) -> None:
    """Whether a student can be made in the size that was asked for."""
    if isinstance(init, TeacherLayers):
        total = teacher_config.num_hidden_layers
        highest = init.layers[-1] + 1 if isinstance(init.layers, list) else init.layers
        if highest > total:
            raise UserError(f"{field}.layers: got {init.layers}; the teacher has {total} layers, 0 to {total - 1}")
    if isinstance(init, Scratch) and init.hidden_size // init.heads % 2:
        width = init.hidden_size // init.heads
        raise UserError(
            f"{field}: hidden_size {init.hidden_size} over heads {init.heads} makes heads of {width}; rotary position "
            f"embeddings need an even number"
        )


def _check_pretrained(field: str, init: Pretrained, spec: FamilySpec, tokenizer: Any, uri: str) -> Path:
    """Whether an existing model can learn from this teacher; returns its local directory."""
    folder = local_model(init.model, revision=init.revision, tracking_uri=uri, field=f"{field}.model")
    config = load_config(folder, f"{field}.model")
    own = load_tokenizer(folder, f"{field}.model")
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer) or config.vocab_size < len(tokenizer):
        raise UserError(
            f"{field}.model: {init.model} has another tokenizer ({len(own)} tokens) than the teacher "
            f"({len(tokenizer)} tokens); labels are distributions over the teacher's tokens, so both must be the same"
        )
    _check_length(spec, config, f"{field}.model")
    return folder
