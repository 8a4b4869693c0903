"""The family spec: the one place where a setting is declared, documented and validated.

A spec is data. It is read once (:mod:`cluster.specfile`), frozen, and never changed while a family runs. This
module imports pydantic and nothing heavier, so a laptop without torch can check a spec before it submits it.
What needs a model or a corpus to be looked at is checked in :mod:`cluster.preflight`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
Name = Annotated[
    str, Field(pattern=NAME_PATTERN, description="lower-case letters, digits and dashes, at most 40 characters")
]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the spec: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class TeacherSpec(Section):
    """The one large model, served by ``replicas`` whole copies of ``shards`` processes each."""

    model: str
    """A directory with a causal language model in safetensors, `models:/name@alias`, or `hf://org/name`."""
    revision: str | None = None
    """Branch, tag or commit of an `hf://` model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision that the teacher computes in. The softmax is always float32."""
    replicas: PositiveInt = 1
    """Whole copies of the teacher; they are interchangeable and share the batches."""
    shards: PositiveInt = 1
    """Processes that hold one replica together (tensor parallel; gloo on CPU, NCCL on GPU)."""
    cpus_per_shard: PositiveFloat = 1.0
    """CPUs that one shard asks Ray for; also its number of torch threads, at least 1."""
    gpus_per_shard: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs that one shard asks Ray for; 0 runs it on CPU."""
    tokens_per_chunk: PositiveInt = 128
    """Tokens whose logits exist at one time; the full [tokens, vocabulary] matrix never does."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times a replica that died is started again before the family gives up on it."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that a replica may take to be placed, to load and to answer its probe."""
    trust_remote_code: bool = False
    """Run Python that comes with the model (not with its tokenizer). Leave off unless you have read it."""

    @model_validator(mode="after")
    def _revision_needs_hub(self) -> TeacherSpec:
        if self.revision is not None and not self.model.startswith("hf://"):
            raise ValueError(f"revision has no effect on {self.model!r}; it is allowed with an hf:// model only")
        if self.gpus_per_shard and self.gpus_per_shard != 1.0 and self.shards > 1:
            raise ValueError("gpus_per_shard must be 0 or 1 when shards > 1: each shard is one rank on one device")
        return self


class CorpusSpec(Section):
    """The text. It becomes numbered batches: the same bytes on every machine, every night."""

    paths: Annotated[list[str], Field(min_length=1)]
    """Files, or folders of files, ending in .jsonl, .parquet or .txt; local or `s3://`."""
    text_field: str = "text"
    """Field of a jsonl or parquet row that holds its text. A .txt file is one document."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in one sequence."""
    batch_sequences: PositiveInt = 8
    """Sequences in one batch, over all ranks and accumulation steps. The same for every student."""
    max_batches: PositiveInt | None = None
    """Stop after this many batches; none means all that the corpus and `epochs` give."""
    epochs: PositiveInt = 1
    """Times the corpus is gone through, in a new order each time."""
    held_out: Share = 0.05
    """Share of the sequences that no student trains on; fidelity is measured there."""
    seed: int = 0
    """Decides the order. Batch i is a function of (corpus, seed)."""


class LabelsSpec(Section):
    """What the teacher says about a batch."""

    kind: Literal["topk"] = "topk"
    """`topk`: K ids and log-probabilities and the log of the mass that is left (the tail is a bucket)."""
    k: PositiveInt = 64
    """Ids kept per token."""
    temperature: PositiveFloat = 1.0
    """T, applied to the logits before truncation. The loss uses the same T, for top-k cannot be re-tempered."""


class StreamSpec(Section):
    """The single pass from the teacher to all students."""

    window: PositiveInt = 8
    """Batches that may be scored ahead of the slowest student. Bounds the memory the labels take."""


class TeacherLayers(Section):
    """A student made of the teacher's own layers."""

    source: Literal["teacher"]
    layers: int | list[int]
    """How many layers, evenly spaced with the first and the last among them, or which (counted from 0)."""

    @field_validator("layers")
    @classmethod
    def _some_and_distinct(cls, layers: int | list[int]) -> int | list[int]:
        if isinstance(layers, int) and layers < 1:
            raise ValueError("a number of layers must be 1 or more")
        if isinstance(layers, list) and (not layers or sorted(set(layers)) != layers or layers[0] < 0):
            raise ValueError("a list of layers must be in rising order from 0 without repeats, such as [0, 4, 9]")
        return layers


class Pretrained(Section):
    """A student that starts from an existing model with the teacher's tokenizer."""

    source: Literal["pretrained"]
    model: str
    """A directory, `models:/name@alias` or `hf://org/name`."""
    revision: str | None = None
    """Branch, tag or commit of an `hf://` model."""

    @model_validator(mode="after")
    def _revision_needs_hub(self) -> Pretrained:
        if self.revision is not None and not self.model.startswith("hf://"):
            raise ValueError(f"revision has no effect on {self.model!r}; it is allowed with an hf:// model only")
        return self


class Scratch(Section):
    """A student with the teacher's architecture in another size and random weights."""

    source: Literal["scratch"]
    layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream; must divide by `heads`."""
    heads: PositiveInt
    """Attention heads; must divide by `kv_heads`."""
    kv_heads: PositiveInt | None = None
    """Key-value heads; none means as many as `heads`."""
    intermediate_size: PositiveInt
    """Width of the feed-forward layer."""
    seed: int = 0
    """Decides the random weights."""

    @model_validator(mode="after")
    def _divisible(self) -> Scratch:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide by heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} does not divide by kv_heads {self.kv_heads}")
        return self


class OptimizerSpec(Section):
    """AdamW (Loshchilov and Hutter, 2019)."""

    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay."""
    clip: PositiveFloat = 1.0
    """Largest norm of the whole gradient; a longer one is scaled down."""


class ScheduleSpec(Section):
    """The learning rate over the run: a linear warm-up, then the kind's shape down to `final`."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the batches over which the rate rises from 0."""
    final: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """The last rate as a share of `lr`. Has no meaning for `constant`."""

    @model_validator(mode="after")
    def _final_has_effect(self) -> ScheduleSpec:
        # Held against the default, not against what was set, so that a resolved spec can be read back.
        if self.kind == "constant" and self.final != type(self).model_fields["final"].default:
            raise ValueError("final has no effect on a constant schedule; leave it out")
        return self


class LossSpec(Section):
    """Loss per token: hard * CE(next token, q) + soft * T^2 * KL(p_T || q_T), p teacher, q student."""

    hard: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the cross-entropy with the corpus."""
    soft: Annotated[float, Field(ge=0.0)] = 0.9
    """Weight of the divergence from the teacher."""

    @model_validator(mode="after")
    def _not_both_zero(self) -> LossSpec:
        if self.hard == 0 and self.soft == 0:
            raise ValueError("hard and soft are both 0, so nothing would be learnt; give at least one a weight")
        return self


class StudentSpec(Section):
    """One student: its own Ray Train run with DeepSpeed ZeRO."""

    init: Annotated[TeacherLayers | Pretrained | Scratch, Field(discriminator="source")]
    """Where its first weights come from: `source: teacher`, `pretrained` or `scratch`."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed shares out over the ranks: 1 optimiser state, 2 also gradients, 3 also weights."""
    ranks: PositiveInt = 1
    """Processes that train it together."""
    micro_batch: PositiveInt = 1
    """Sequences that one rank takes through the model at a time."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of its forward and backward pass. Optimiser state is always float32."""
    lr: PositiveFloat = 3e-4
    """Highest learning rate."""
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    loss: LossSpec = LossSpec()
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    cpus_per_rank: PositiveFloat = 1.0
    """CPUs that one rank asks Ray for; also its number of torch threads, at least 1."""
    gpus_per_rank: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs that one rank asks Ray for; 0 trains it on CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Times its ranks are started again from the last checkpoint before the student counts as failed."""

    @field_validator("gpus_per_rank")
    @classmethod
    def _one_device_each(cls, gpus: float) -> float:
        if gpus not in (0.0, 1.0):
            raise ValueError("each rank drives one device: 0 or 1")
        return gpus


class EvaluationSpec(Section):
    """Fidelity to the teacher on held-out text, before and after training."""

    batches: PositiveInt = 4
    """Held-out batches that are measured; must not be more than `corpus.held_out` leaves."""


class CheckpointSpec(Section):
    """What a student keeps on the way, so that `--resume` can go on from it."""

    every: PositiveInt | None = None
    """Batches between checkpoints; none means only the finished student is kept."""
    keep: PositiveInt = 2
    """Checkpoints that are kept per student."""

    @model_validator(mode="after")
    def _keep_has_effect(self) -> CheckpointSpec:
        if self.every is None and self.keep != type(self).model_fields["keep"].default:
            raise ValueError("keep has no effect without every; set checkpoints.every or leave keep out")
        return self


class TrackingSpec(Section):
    """Where MLflow keeps the runs and the registered models."""

    uri: str | None = None
    """Tracking and registry URI; none means SQLite under the Stillhouse home."""
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


class FamilySpec(Section):
    """One teacher, several students, one run."""

    name: Name
    """Names the family, its MLflow runs and, with the student's name, its registered models."""
    teacher: TeacherSpec
    corpus: CorpusSpec
    labels: LabelsSpec = LabelsSpec()
    stream: StreamSpec = StreamSpec()
    students: Annotated[dict[Name, StudentSpec], Field(min_length=1)]
    """The students by name; all learn at the same time from the one pass."""
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    serving: ServingSpec | None = None
    """Leave out to end after the registry."""

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

    @property
    def blocks_per_batch(self) -> int:
        """Blocks a batch is cut into, so that every student's ranks can share it out evenly."""
        return math.lcm(*(student.ranks for student in self.students.values()))

    def model_name(self, student: str) -> str:
        """Name under which a student is registered."""
        return f"{self.name}-{student}"
