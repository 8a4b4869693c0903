"""Everything that can be known to be wrong before anything is started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.corpus.files import find_files, skipped_line
from cluster.errors import UserError
from cluster.fingerprint import teacher_fingerprint, tokenizer_fingerprint
from cluster.footprint import machine, memory_report
from cluster.labels.store.store import LabelStore
from cluster.limits import Most, most_allowed
from cluster.loading import check_weights
from cluster.memory import Estimate, family_estimates, shape_of, with_memory
from cluster.models import Packing, TeacherModel, load_config, load_tokenizer, local_model
from cluster.registry import champion_of, fetch_model
from cluster.spec import FamilySpec, Pretrained, Scratch, TeacherLayers, TopKLabels
from cluster.specfile import home

# Short of what a run waits for its store: before it, somebody may be looking at a wrong port.
STORE_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Checked:
    """A family that may start.

    Attributes:
        student_dirs: local directories of the students that start from an existing model: their champion, or the
            pretrained one that ``init`` names.
        tracking_uri: the spec's, or the embedded one.
        store: where labels are kept; none where they are not.
        champions: per student with a warm start the version that it starts from; none where there is no champion yet.
        most: what it may hold of the cluster at a time.
        skipped: files in the corpus' folders and globs that are not read, by reason.
        packing: how each student keeps packed documents apart; ``teacher`` knows it of the teacher. All are
            ``unpacked`` where one is, for all read the same batches.
        unpacked_because: per model that cannot keep packed documents apart the reason.
        estimates: the peak memory of one process of each role, see :func:`cluster.memory.family_estimates`.
    """

    spec: FamilySpec
    teacher: TeacherModel
    student_dirs: dict[str, Path]
    tracking_uri: str
    store: str | None
    most: Most
    champions: dict[str, int | None] = dataclasses.field(default_factory=dict)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    packing: dict[str, Packing] = dataclasses.field(default_factory=dict)
    unpacked_because: dict[str, str] = dataclasses.field(default_factory=dict)
    estimates: dict[str, Estimate] = dataclasses.field(default_factory=dict)

    @property
    def sized(self) -> FamilySpec:
        """The spec with the memory that each process asks Ray for."""
        return with_memory(self.spec, self.estimates)

    @property
    def packed(self) -> bool:
        """Whether documents are packed end to end into sequences, or each sequence holds one document and padding."""
        return not self.unpacked_because

    def packing_notices(self) -> list[str]:
        """Why documents are not packed, one line each; empty where they are."""
        return [
            f"documents are not packed, each sequence holds one and padding: {who}: {reason}"
            for who, reason in self.unpacked_because.items()
        ]

    def champion(self, student: str) -> str | None:
        """The registered version that a student starts from, such as ``demo-small v3``; none where from its init."""
        version = self.champions.get(student)
        return None if version is None else f"{self.spec.model_name(student)} v{version}"

    def notices(self) -> list[str]:
        """What a person should know before the start, a line each."""
        skipped = skipped_line(self.skipped)
        return [*([f"corpus: {skipped}"] if skipped else []), *self.warm_starts(), *self.packing_notices()]

    def memory_report(self) -> list[str]:
        """See :func:`cluster.footprint.memory_report`; for this machine, unless ``RAY_ADDRESS`` names a cluster."""
        return memory_report(self.sized, self.estimates, machine(), elsewhere=bool(os.environ.get("RAY_ADDRESS")))

    def warm_starts(self) -> list[str]:
        """What each student with a warm start starts from, one line each."""
        return [
            f"{name} starts from {self.champion(name) or f'its init: {self.spec.model_name(name)} has no champion yet'}"
            for name in self.champions
        ]


def tracking_uri_of(spec: FamilySpec) -> str:
    """The spec's MLflow, or SQLite under the Stillhouse home."""
    return spec.tracking.uri or f"sqlite:///{home() / 'mlflow.db'}"


def store_of(spec: FamilySpec) -> str | None:
    """The spec's label store, or the one under the Stillhouse home; none where labels are not kept."""
    if not spec.store.enabled:
        return None
    return spec.store.uri or str(home() / "labels")


def preflight(spec: FamilySpec, begun: Mapping[str, int | None] | None = None, text_is_kept: bool = False) -> Checked:
    """Check the teacher, its labels, the students and the corpus files; starts nothing.

    Args:
        begun: the champions that a run which is to be resumed began with, see :class:`cluster.runs.Run`.
        text_is_kept: the corpus has been read before, and its files are not needed any more.

    Raises:
        UserError: names the field, what was given and what is allowed.
        RunError: the label store, or a registry that should know a champion, cannot be reached.
    """
    _check_secret(spec)
    uri = tracking_uri_of(spec)
    teacher = spec.teacher
    most_allowed(spec)  # before any model is looked at
    folder = local_model(teacher.model, revision=teacher.revision, tracking_uri=uri, field="teacher.model")
    config = load_config(folder, "teacher.model", teacher.trust_remote_code)
    tokenizer = load_tokenizer(folder, "teacher.model")
    vocabulary = min(len(tokenizer), config.vocab_size)
    if isinstance(spec.labels, TopKLabels) and spec.labels.k > vocabulary:
        raise UserError(f"labels.k: got {spec.labels.k}; the teacher's vocabulary has {vocabulary} tokens")
    _check_length(spec, config, "the teacher")
    _check_shards(spec, config)
    _check_tokens(tokenizer, vocabulary, folder)
    check_weights(folder, config, "teacher.model", teacher.trust_remote_code)
    decided = {"the teacher": _packing_of(config, "teacher.model", teacher.trust_remote_code)}
    champions = {
        name: begun[name] if begun and name in begun else champion_of(spec.model_name(name), uri)
        for name, student in spec.students.items()
        if student.warm_start
    }
    dirs, of_students = _check_students(spec, config, tokenizer, vocabulary, uri, champions)
    decided |= of_students
    estimates = _estimates(spec, config, dirs, packed=not any(packing == "unpacked" for packing, _ in decided.values()))
    most = most_allowed(with_memory(spec, estimates))
    skipped = {} if text_is_kept else find_files(spec.corpus.paths).skipped
    if (store := store_of(spec)) is not None:
        LabelStore.open(store, STORE_PATIENCE_S)
    unpacked = {who: reason for who, (packing, reason) in decided.items() if packing == "unpacked"}
    teacher_packing, *packings = ["unpacked" if unpacked else packing for packing, _ in decided.values()]
    fingerprint = teacher_fingerprint(folder, teacher, vocabulary, teacher_packing)
    return Checked(
        spec,
        TeacherModel(str(folder), vocabulary, fingerprint, tokenizer_fingerprint(tokenizer), teacher_packing),
        dirs,
        uri,
        store,
        most,
        champions,
        skipped,
        dict(zip(spec.students, packings, strict=True)),
        unpacked,
        estimates,
    )


def _check_students(
    spec: FamilySpec,
    config: Any,
    tokenizer: Any,
    vocabulary: int,
    uri: str,
    champions: Mapping[str, int | None],
) -> tuple[dict[str, Path], dict[str, tuple[Packing, str]]]:
    """Check each student against the teacher's configuration, tokenizer and vocabulary.

    Returns:
        The local directories of those that start from an existing model, and how each keeps packed documents apart.
    """
    dirs: dict[str, Path] = {}
    decided: dict[str, tuple[Packing, str]] = {}
    for name, student in spec.students.items():
        place, init, code = f"students.{name}", student.init, spec.teacher.trust_remote_code
        _check_size(f"{place}.init", init, config, code)
        if isinstance(init, Pretrained):
            place = f"students.{name}.init.model"
            dirs[name] = local_model(init.model, revision=init.revision, tracking_uri=uri, field=place)
            own, code = _check_existing(place, init.model, dirs[name], spec, tokenizer, vocabulary), False
        else:
            own = _student_config(init, config)
        if (version := champions.get(name)) is not None:
            model, place = spec.model_name(name), f"students.{name}.warm_start"
            dirs[name] = fetch_model(f"models:/{model}/{version}", uri)
            champion = f"the champion {model} v{version}"
            own, code = _check_existing(place, champion, dirs[name], spec, tokenizer, vocabulary), False
        _check_layerdrop(f"students.{name}", student.ranks, own)
        decided[f"student {name}"] = _packing_of(own, place, code)
    return dirs, decided


def _estimates(spec: FamilySpec, config: Any, dirs: Mapping[str, Path], packed: bool) -> dict[str, Estimate]:
    """The peak memory of each role; the directories are those of students that start from an existing model."""
    code, shapes = spec.teacher.trust_remote_code, {}
    for name, student in spec.students.items():
        field = f"students.{name}"
        own = load_config(dirs[name], field) if name in dirs else _student_config(student.init, config)
        shapes[name] = shape_of(own, field, code and name not in dirs)
    return family_estimates(spec, shape_of(config, "teacher.model", code), shapes, packed)


def _packing_of(config: Any, field: str, trust_remote_code: bool) -> tuple[Packing, str]:
    """How an architecture keeps packed documents apart, and why; refuses one with another head than losses compute."""
    # Imported here, for both load torch.
    from cluster.heads import probe_config
    from cluster.packing import architecture_packing

    decided = architecture_packing(config, field, trust_remote_code)
    probe_config(config, field, trust_remote_code)
    return decided


def _student_config(init: TeacherLayers | Pretrained | Scratch, teacher_config: Any) -> Any:
    """The configuration of a student that is made from the teacher's, see :mod:`cluster.students.initial`."""
    from cluster.students.configs import cut_config, scratch_config
    from cluster.students.initial import chosen_layers

    if isinstance(init, Scratch):
        return scratch_config(teacher_config, init)
    assert isinstance(init, TeacherLayers), "a pretrained one comes with its directory"
    return cut_config(teacher_config, chosen_layers(init, teacher_config.num_hidden_layers))


def _check_secret(spec: FamilySpec) -> None:
    """Whether what the webhook is told can be signed."""
    name = spec.notify and spec.notify.secret_env
    if name and not os.environ.get(name):
        raise UserError(
            f"notify.secret_env: {name} is not set here; set it to the webhook's secret (for a job by submit --env "
            f"{name}), or leave secret_env out"
        )


def _check_shards(spec: FamilySpec, config: Any) -> None:
    shards = spec.teacher.shards
    if shards == 1:
        return
    heads = getattr(config, "num_attention_heads", 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not heads or heads % shards or kv_heads % shards:
        raise UserError(
            f"teacher.shards: got {shards}; the teacher's {heads} attention heads and {kv_heads} "
            f"key-value heads must both divide by it"
        )


def _check_length(spec: FamilySpec, config: Any, who: str) -> None:
    length, longest = spec.corpus.sequence_length, getattr(config, "max_position_embeddings", None)
    if longest and length > longest:
        raise UserError(f"corpus.sequence_length: got {length}; {who} reads at most {longest} tokens")


def _check_layerdrop(field: str, ranks: int, config: Any) -> None:
    """Whether all ranks of a student run the same layers: each draws its own, and they would wait in different ones."""
    dropped = {name: rate for name in ("layerdrop", "decoder_layerdrop") if (rate := getattr(config, name, None))}
    if ranks > 1 and dropped:
        given = ", ".join(f"{name} {rate:g}" for name, rate in dropped.items())
        raise UserError(
            f"{field}.ranks: got {ranks}; {config.model_type} with {given} leaves out layers at random, and "
            f"ranks that leave out different ones wait for each other; use ranks: 1, or a model with layerdrop 0"
        )


def _check_tokens(tokenizer: Any, vocabulary: int, folder: Path) -> None:
    """Whether the embedding has a row for every token that text becomes.

    Special tokens behind its end, such as an added padding token, do no harm: no batch is padded with them.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = (special | set(tokenizer.all_special_ids)) - {tokenizer.eos_token_id}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocabulary and i not in special}
    if beyond:
        number = min(beyond)
        raise UserError(
            f"teacher.model: the tokenizer of {folder} gives {beyond[number]!r} the id {number}; ids must be below "
            f"{vocabulary}, the smaller of the tokenizer's size and the model's embedding"
        )


def _check_size(
    field: str, init: TeacherLayers | Pretrained | Scratch, teacher_config: Any, trust_remote_code: bool
) -> None:
    """Whether a student can be made in the size that was asked for."""
    if isinstance(init, Pretrained):
        return
    from cluster.students.buildable import check_cut, check_scratch
    from cluster.students.initial import chosen_layers

    if isinstance(init, TeacherLayers):
        total = getattr(teacher_config, "num_hidden_layers", 0)
        highest = init.layers[-1] + 1 if isinstance(init.layers, list) else init.layers
        if 0 < total < highest:
            raise UserError(f"{field}.layers: got {init.layers}; the teacher has {total} layers, 0 to {total - 1}")
        layers = chosen_layers(init, total) if total else []
        check_cut(field, teacher_config, layers, trust_remote_code)
        return
    if init.hidden_size // init.heads % 2:
        width = init.hidden_size // init.heads
        raise UserError(
            f"{field}: hidden_size {init.hidden_size} over heads {init.heads} makes heads of {width}; rotary position "
            f"embeddings need an even number"
        )
    check_scratch(field, teacher_config, init, trust_remote_code)


def _check_existing(field: str, model: str, folder: Path, spec: FamilySpec, tokenizer: Any, vocabulary: int) -> Any:
    """Whether an existing model can learn from this teacher; its configuration."""
    config = load_config(folder, field)
    own = load_tokenizer(folder, field)
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer) or config.vocab_size < vocabulary:
        raise UserError(
            f"{field}: {model} has another tokenizer ({len(own)} tokens) than the teacher "
            f"({len(tokenizer)} tokens); labels are distributions over the teacher's tokens, so both must be the same"
        )
    _check_length(spec, config, field)
    check_weights(folder, config, field)
    return config
