"""Everything that can be known to be wrong before anything is started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.corpus.sample import check_corpus
from cluster.errors import UserError
from cluster.evaluate.notices import before_start
from cluster.fingerprint import teacher_fingerprint, tokenizer_fingerprint
from cluster.footprint import machine, memory_report
from cluster.labels.store.store import LabelStore
from cluster.limits import Most, most_allowed
from cluster.loading import check_weights
from cluster.memory import Estimate, family_estimates, shape_of, with_memory
from cluster.models import (
    Packing,
    TeacherModel,
    check_quantization,
    load_config,
    load_tokenizer,
    local_model,
    needs_own_code,
    quantization_of,
)
from cluster.registry import champion_of, check_experiment, default_tracking_uri, fetch_model
from cluster.sizes import TEACHER, Parameters, advice, count_parameters, size_lines, student_key
from cluster.spec import FamilySpec, Pretrained, Scratch, TeacherLayers, TopKLabels
from cluster.specfile import home
from cluster.vocabulary import check_student_vocabulary, check_tokens, embedding_rows, vocabulary_of

# Short of what a run waits for its store: before it, somebody may be looking at a wrong port.
STORE_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Checked:
    """A family that may start.

    Attributes:
        student_dirs: local directories of the students that start from an existing model: their champion, or the
            pretrained one that ``init`` names.
        tracking_uri: the spec's, or the default one.
        store: where labels are kept; none where they are not.
        champions: per student with a warm start the version that it starts from; none where there is no champion yet.
        most: what it may hold of the cluster at a time.
        corpus: what the check of its files found, a line each: files that are not read, rows that cannot be used.
        packing: how each student keeps packed documents apart; ``teacher`` knows it of the teacher. All are
            ``unpacked`` where one is, for all read the same batches.
        unpacked_because: per model that cannot keep packed documents apart the reason.
        experiment_unknown: why it is not known whether MLflow takes the runs; None where it is.
        parameters: of the teacher and of each student, by :data:`cluster.sizes.TEACHER` and
            :func:`cluster.sizes.student_key`.
        estimates: the peak memory of one process of each role, see :func:`cluster.memory.family_estimates`.
    """

    spec: FamilySpec
    teacher: TeacherModel
    student_dirs: dict[str, Path]
    tracking_uri: str
    store: str | None
    most: Most
    champions: dict[str, int | None] = dataclasses.field(default_factory=dict)
    corpus: list[str] = dataclasses.field(default_factory=list)
    packing: dict[str, Packing] = dataclasses.field(default_factory=dict)
    unpacked_because: dict[str, str] = dataclasses.field(default_factory=dict)
    experiment_unknown: str | None = None
    parameters: dict[str, Parameters] = dataclasses.field(default_factory=dict)
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
        away = [self.experiment_unknown] if self.experiment_unknown else []
        return [
            *(f"corpus: {line}" for line in self.corpus),
            *away,
            *self.warm_starts(),
            *self.packing_notices(),
            *advice(self.spec, self.parameters),
            *before_start(self.spec),
        ]

    def sizes(self) -> list[str]:
        """The parameters of each model, one line each."""
        return size_lines(self.parameters)

    def memory_report(self, elsewhere: bool) -> list[str]:
        """See :func:`cluster.footprint.memory_report`; of this machine."""
        return memory_report(self.sized, self.estimates, machine(), elsewhere)

    def warm_starts(self) -> list[str]:
        """What each student with a warm start starts from, one line each."""
        return [
            f"{name} starts from {self.champion(name) or f'its init: {self.spec.model_name(name)} has no champion yet'}"
            for name in self.champions
        ]


def tracking_uri_of(spec: FamilySpec) -> str:
    """The spec's MLflow, or the default one."""
    return spec.tracking.uri or default_tracking_uri()


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
        RunError: the label store, or a registry that should know a champion, cannot be reached; or MLflow refuses.
    """
    _check_secret(spec)
    uri = tracking_uri_of(spec)
    teacher = spec.teacher
    most_allowed(spec)  # before any model is looked at
    code = teacher.trust_remote_code
    folder = local_model(teacher.model, revision=teacher.revision, tracking_uri=uri, field="teacher.model", code=code)
    config = load_config(folder, "teacher.model", code)
    check_quantization(config, folder, "teacher.model", on_gpu=teacher.gpus_per_shard > 0)
    tokenizer = load_tokenizer(folder, "teacher.model")
    vocabulary = vocabulary_of(tokenizer, config, "teacher.model")
    if isinstance(spec.labels, TopKLabels) and spec.labels.k > vocabulary:
        raise UserError(f"labels.k: got {spec.labels.k}; the teacher's vocabulary has {vocabulary} tokens")
    _check_length(spec, config, "the teacher")
    _check_shards(spec, config)
    check_tokens(tokenizer, vocabulary, folder)
    check_weights(folder, config, "teacher.model", code)
    decided = {TEACHER: _packing_of(config, "teacher.model", code)}
    champions = {
        name: begun[name] if begun and name in begun else champion_of(spec.model_name(name), uri)
        for name, student in spec.students.items()
        if student.warm_start
    }
    parameters = {TEACHER: count_parameters(config, "teacher.model", code)}
    _check_served(spec, TEACHER, config)
    dirs, of_students, of_models = _check_students(spec, config, tokenizer, vocabulary, uri, champions)
    decided |= of_students
    estimates = _estimates(spec, config, dirs, packed=not any(packing == "unpacked" for packing, _ in decided.values()))
    most = most_allowed(with_memory(spec, estimates))
    parameters |= of_models
    of_corpus = [] if text_is_kept else check_corpus(spec.corpus, tokenizer, vocabulary)
    experiment_unknown = check_experiment(uri, spec.tracking.experiment or spec.name)
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
        of_corpus,
        dict(zip(spec.students, packings, strict=True)),
        unpacked,
        experiment_unknown,
        parameters,
        estimates,
    )


def _check_students(
    spec: FamilySpec,
    config: Any,
    tokenizer: Any,
    vocabulary: int,
    uri: str,
    champions: Mapping[str, int | None],
) -> tuple[dict[str, Path], dict[str, tuple[Packing, str]], dict[str, Parameters]]:
    """Check each student against the teacher's configuration, tokenizer and vocabulary.

    Returns:
        The local directories of those that start from an existing model, how each keeps packed documents apart, and
        its parameters.
    """
    dirs: dict[str, Path] = {}
    decided: dict[str, tuple[Packing, str]] = {}
    parameters: dict[str, Parameters] = {}
    for name, student in spec.students.items():
        place, init, code = f"students.{name}", student.init, spec.trusts_code(name)
        _check_size(f"{place}.init", init, config, code)
        if isinstance(init, Pretrained):
            place = f"students.{name}.init.model"
            dirs[name] = local_model(init.model, revision=init.revision, tracking_uri=uri, field=place, code=code)
            own = _check_existing(place, name, init.model, dirs[name], spec, tokenizer, vocabulary)
        else:
            own = _student_config(init, config)
        if (version := champions.get(name)) is not None:
            model, place = spec.model_name(name), f"students.{name}.warm_start"
            dirs[name] = fetch_model(f"models:/{model}/{version}", uri)
            champion = f"the champion {model} v{version}"
            own = _check_existing(place, name, champion, dirs[name], spec, tokenizer, vocabulary)
        _check_layerdrop(f"students.{name}", student.ranks, own)
        who = student_key(name)
        _check_served(spec, who, own)
        decided[who] = _packing_of(own, place, code)
        parameters[who] = count_parameters(own, place, code)
    return dirs, decided, parameters


def _check_served(spec: FamilySpec, who: str, config: Any) -> None:
    """Whether the endpoint that the family ends with can load a model: it runs no Python that comes with one."""
    served = spec.serving is not None and (who != TEACHER or spec.serving.include_teacher)
    if served and needs_own_code(config.model_type, vars(config)):
        advice = "set serving.include_teacher: false" if who == TEACHER else "leave out serving"
        raise UserError(f"serving: {who} needs Python of its own, which endpoints never run; {advice}")


def _estimates(spec: FamilySpec, config: Any, dirs: Mapping[str, Path], packed: bool) -> dict[str, Estimate]:
    """The peak memory of each role; the directories are those of students that start from an existing model."""
    shapes = {}
    for name, student in spec.students.items():
        field, code = f"students.{name}", spec.trusts_code(name)
        own = load_config(dirs[name], field, code) if name in dirs else _student_config(student.init, config)
        shapes[name] = shape_of(own, field, code)
    teacher = shape_of(config, "teacher.model", spec.teacher.trust_remote_code)
    return family_estimates(spec, teacher, shapes, packed)


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
    if not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"teacher.shards: got {shards}; a {config.model_type} model has no attention heads to share out; use "
            f"shards: 1"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not heads or heads % shards or kv_heads % shards:
        raise UserError(
            f"teacher.shards: got {shards}; the teacher's {heads} attention heads and {kv_heads} "
            f"key-value heads must both divide by it"
        )


def _check_length(spec: FamilySpec, config: Any, who: str) -> None:
    length, longest = spec.corpus.sequence_length, getattr(config, "max_position_embeddings", None)
    if longest and 0 < longest < length:  # XLNet gives -1
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


def _check_size(
    field: str, init: TeacherLayers | Pretrained | Scratch, teacher_config: Any, trust_remote_code: bool
) -> None:
    """Whether a student can be made in the size that was asked for."""
    if isinstance(init, Pretrained):
        return
    from cluster.students.buildable import check_cut, check_scratch
    from cluster.students.initial import chosen_layers

    if isinstance(init, TeacherLayers):
        if (quantized := quantization_of(teacher_config)) is not None:
            raise UserError(
                f"{field}: the teacher's weights are quantized ({quantized.get('quant_method')}), so a student cannot "
                f"take over its layers; use source: pretrained or scratch, or a teacher without quantization"
            )
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


def _check_existing(
    field: str, name: str, model: str, folder: Path, spec: FamilySpec, tokenizer: Any, vocabulary: int
) -> Any:
    """Whether an existing model can be a student of this teacher; its configuration."""
    init, code = spec.students[name].init, spec.trusts_code(name)
    own = f"students.{name}.init" if isinstance(init, Pretrained) else "teacher"
    config = load_config(folder, field, code, f"{own}.trust_remote_code")
    if (quantized := quantization_of(config)) is not None:
        raise UserError(
            f"{field}: the weights of {model} are quantized ({quantized.get('quant_method')}) and cannot be trained; "
            f"give the model without quantization"
        )
    check_student_vocabulary(
        load_tokenizer(folder, field), embedding_rows(config, field), tokenizer, vocabulary, model=model, field=field
    )
    _check_length(spec, config, field)
    check_weights(folder, config, field, code)
    return config
