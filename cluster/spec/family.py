"""The family spec: the one place where a setting is declared, documented and validated.

A spec is data. It is read once (:mod:`cluster.specfile`), frozen, and never changed while a family runs. This
module imports pydantic and nothing heavier, so a laptop without torch can check a spec before it submits it.
What needs a model or a corpus to be looked at is checked in :mod:`cluster.preflight`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, field_validator, model_validator

from cluster.spec.base import Bytes, Name, Section, Share
from cluster.spec.labels import LabelsSpec, TopKLabels
from cluster.spec.limits import LimitsSpec
from cluster.spec.loss import why_not
from cluster.spec.notify import NotifySpec
from cluster.spec.promotion import PromotionSpec
from cluster.spec.store import StoreSpec
from cluster.spec.students import Pretrained, StudentSpec


class ReplicaRange(Section):
    """A number of replicas that follows the students: one more while they wait, one less while it has nothing to do."""

    min: PositiveInt
    """Replicas that the family starts with and never has fewer of."""
    max: PositiveInt
    """Replicas that it never has more of; they come where the cluster has room beside all students."""

    @model_validator(mode="after")
    def _in_order(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}; give min <= max")
        return self


def _number_or_range(given: Any) -> str:
    return "range" if isinstance(given, dict | ReplicaRange) else "number"


class TeacherSpec(Section):
    """The one large model, served by ``replicas`` whole copies of ``shards`` processes each."""

    model: str
    """A directory with a causal language model in safetensors, `models:/name@alias`, or `hf://org/name`."""
    revision: str | None = None
    """Branch, tag or commit of an `hf://` model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision that the teacher computes in. The softmax is always float32."""
    replicas: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[ReplicaRange, Tag("range")], Discriminator(_number_or_range)
    ] = 1
    """Whole copies of the teacher; they are interchangeable and share the batches. A number, or a range such as
    {min: 1, max: 4} in which the pool follows the students."""
    shards: PositiveInt = 1
    """Processes that hold one replica together (tensor parallel; gloo on CPU, NCCL on GPU)."""
    cpus_per_shard: PositiveFloat = 1.0
    """CPUs that one shard asks Ray for; also its number of torch threads, at least 1."""
    gpus_per_shard: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs that one shard asks Ray for; 0 runs it on CPU."""
    memory_per_shard: Bytes | None = None
    """Host memory that one shard asks Ray for, such as 6GiB; none means what `check` estimates."""
    tokens_per_chunk: PositiveInt = 128
    """Tokens whose logits exist at one time; the full [tokens, vocabulary] matrix never does."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times a replica that died is started again before the family gives up on it. The pool then continues without it;
    the family ends when no replica is left. One above `replicas.min` is not started again; the pool grows anew when
    there is room."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that a replica may take to be placed, to load and to answer its probe."""
    trust_remote_code: bool = False
    """Run Python that comes with the model (not with its tokenizer), also for students that are made of it. Leave off
    unless you have read it."""

    @model_validator(mode="after")
    def _revision_needs_hub(self) -> TeacherSpec:
        if self.revision is not None and not self.model.startswith("hf://"):
            raise ValueError(f"revision has no effect on {self.model!r}; it is allowed with an hf:// model only")
        if self.gpus_per_shard and self.gpus_per_shard != 1.0 and self.shards > 1:
            raise ValueError("gpus_per_shard must be 0 or 1 when shards > 1: each shard is one rank on one device")
        return self

    @property
    def min_replicas(self) -> int:
        """Replicas that there are from the start."""
        return self.replicas.min if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def max_replicas(self) -> int:
        """Replicas that there may be."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas


class CorpusSpec(Section):
    """The text. It becomes numbered batches: the same bytes on every machine, every night."""

    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders of files, or globs such as `s3://bucket/x/**/*.jsonl.gz`; local or `s3://`. Formats: .jsonl,
    .json and .txt, each also with .gz or .zst, and .parquet. Hidden files and other formats in a folder are skipped and
    counted, and so are empty files. May hold macros: `{{ ds }}` is `--ds` as YYYY-MM-DD, `{{ ds_nodash }}` the same
    without dashes, `{{ ds_add(ds, -1) }}` the day before."""
    upload: bool = True
    """Whether `submit` and `schedule add` upload the local files of `paths` as they are at that moment. `false`: local
    paths are paths on the cluster, read there when each run starts."""
    text_field: str = "text"
    """Field of a JSON or parquet row that holds its text. A .json file has a row per line or is one array of rows; a
    .txt file is one document."""
    special_tokens: Literal["text", "control"] = "text"
    """What becomes of a special token, such as `</s>`, that a document's text spells out: `text` encodes it like any
    other text, `control` as the special token. The end token behind each document is added in either case."""
    bos: Literal["never", "document", "sequence"] | None = None
    """Where the token that begins a text (BOS) goes: in front of each `document`, of each `sequence` of a batch, or
    `never`. None means as the teacher's tokenizer declares: `document` if it puts one in front of plain text, as those
    of Llama and Gemma do, else `never`. Documents in one sequence do not see each other, so with `sequence` only the
    first of them follows it."""
    max_bad_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Share of the rows that may be unusable: lines that are no JSON or are cut short, and text that is no string, is
    not UTF-8 or holds half of a surrogate pair. They are left out and counted; a larger share refuses the corpus. Other
    fields of a row may hold anything."""
    deduplicate: Literal["none", "exact"] = "none"
    """`exact` keeps one of the documents that have the same text. Repeats are counted in either case."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in one sequence."""
    batch_sequences: PositiveInt = 8
    """Sequences in one batch, over all ranks and accumulation steps. The same for every student."""
    max_batches: PositiveInt | None = None
    """Stop after this many batches; none means all that the corpus and `epochs` give."""
    epochs: PositiveInt = 1
    """Times the corpus is gone through, in a new order each time."""
    held_out: Share = 0.05
    """Share of the text that no student trains on; fidelity is measured there. Whole documents are held out, chosen by
    a hash of their text; only documents that are longer than this share are cut."""
    seed: int = 0
    """Decides the order, and what each student's dropout draws. Batch i is a function of (corpus, seed)."""


class StreamSpec(Section):
    """The single pass from the teacher to all students."""

    window: PositiveInt = 8
    """Batches that may be ready ahead of the fastest student, or without a store of the slowest; bounds the memory."""


class EvaluationSpec(Section):
    """Fidelity to the teacher on held-out text, before and after training."""

    batches: PositiveInt = 4
    """Held-out batches that are measured; must not be more than `corpus.held_out` leaves."""
    angle_every: PositiveInt | None = 50
    """Batches between two estimates of the angle between the labels' gradient and the exact one; none means never."""


class CheckpointSpec(Section):
    """What a student keeps on the way, so that `--resume` can continue from it."""

    every: PositiveInt | None = None
    """Batches between checkpoints; none means by the clock, see `minutes`. More than the pass has keeps the finished
    student only."""
    minutes: PositiveFloat = 10.0
    """Minutes between checkpoints where `every` is not given. A crash costs at most twice that, as one checkpoint may
    still be on its way to the storage."""
    keep: PositiveInt = 2
    """Checkpoints that are kept per student while it trains. Once it has finished, only its model is."""

    @model_validator(mode="after")
    def _minutes_have_effect(self) -> CheckpointSpec:
        # Compared with the default, not with what was set, so that a resolved spec can be read back.
        if self.every is not None and self.minutes != type(self).model_fields["minutes"].default:
            raise ValueError("minutes has no effect with every; leave one of them out")
        return self


class TrackingSpec(Section):
    """Where MLflow keeps the runs and the registered models."""

    uri: str | None = None
    """Tracking and registry URI; none means `MLFLOW_TRACKING_URI` where the run starts, else SQLite under the
    Stillhouse home."""
    experiment: str | None = None
    """MLflow experiment; none means the family's name."""

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str | None) -> str | None:
        if uri is not None and not re.match(r"^(https?|sqlite|postgresql|mysql)(\+\w+)?://", uri):
            raise ValueError("allowed are http(s)://, sqlite:///, postgresql:// and mysql://")
        return uri


class ServingSpec(Section):
    """After training, put the students behind one endpoint and compare them."""

    include_teacher: bool = True
    """Serve the teacher as one more arm, for reference."""
    requests: PositiveInt = 24
    """Requests per arm."""
    concurrency: PositiveInt = 1
    """Requests under way at a time."""
    max_tokens: PositiveInt = 32
    """Tokens asked for per request."""
    cpus_per_arm: PositiveFloat = 0.5
    """CPUs that one arm asks Ray for."""
    gpus_per_arm: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs that one arm asks Ray for."""
    memory_per_arm: Bytes | None = None
    """Host memory that one arm asks Ray for, such as 6GiB; none means what `check` estimates for the largest."""


class FamilySpec(Section):
    """One teacher, several students, one run."""

    name: Name
    """Names the family, its MLflow runs and, with the student's name, its registered models."""
    teacher: TeacherSpec
    corpus: CorpusSpec
    labels: LabelsSpec = TopKLabels()
    """What the teacher says of each token, by `kind`: `topk`, `sampled`, `hidden` or `dense`."""
    stream: StreamSpec = StreamSpec()
    store: StoreSpec = StoreSpec()
    students: Annotated[dict[Name, StudentSpec], Field(min_length=1)]
    """The students by name; all learn at the same time from the one pass."""
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    serving: ServingSpec | None = None
    """Leave out to end after the registry."""
    notify: NotifySpec | None = None
    """Leave out to tell nobody."""
    promotion: PromotionSpec | None = None
    """When a new student takes the champion's place. Leave out to promote by hand only; it stays `challenger` then."""
    limits: LimitsSpec = LimitsSpec()
    patience_s: PositiveFloat = 600.0
    """Seconds that a run waits for room on its disk, for a place on the cluster, or for its students' last commits,
    before it stops for `--resume`. MLflow is waited for at least an hour after all students have ended."""

    @model_validator(mode="after")
    def _batches_divide(self) -> FamilySpec:
        size = self.corpus.batch_sequences
        for name, student in self.students.items():
            step = student.ranks * student.micro_batch
            if size % step:
                raise ValueError(
                    f"students.{name}: ranks {student.ranks} x micro_batch {student.micro_batch} = {step} does not "
                    f"divide corpus.batch_sequences {size}"
                )
        return self

    @model_validator(mode="after")
    def _labels_give_the_losses(self) -> FamilySpec:
        for name, student in self.students.items():
            if reason := why_not(self.labels, student.loss):
                raise ValueError(f"students.{name}.loss: {reason}")
        return self

    @model_validator(mode="after")
    def _latency_is_measured(self) -> FamilySpec:
        if self.promotion is not None and self.promotion.latency is not None and self.serving is None:
            raise ValueError(
                "promotion.latency has no effect without serving, which measures it; add a serving section, or leave "
                "latency out"
            )
        return self

    @property
    def blocks_per_batch(self) -> int:
        """Blocks a batch is cut into, so that every student's ranks can share it out evenly."""
        return math.lcm(*(student.ranks for student in self.students.values()))

    def trusts_code(self, student: str) -> bool:
        """Whether Python that comes with a student's model may run: its ``init`` decides, or the teacher it is made of.

        The same holds for the champion that it starts from or is compared with.
        """
        init = self.students[student].init
        return init.trust_remote_code if isinstance(init, Pretrained) else self.teacher.trust_remote_code

    def model_name(self, student: str) -> str:
        """Name under which a student is registered."""
        return f"{self.name}-{student}"
