"""The spec of one student: where it starts, how it is sharded, and how it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from cluster.spec.base import Bytes, Section, Share
from cluster.spec.loss import LossSpec


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
    trust_remote_code: bool = False
    """Run Python that comes with the model (not with its tokenizer). Leave off unless you have read it."""

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
    """Width of the feed-forward layers; in a mixture of experts, of every expert."""
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


class StudentSpec(Section):
    """One student: its own Ray Train run with DeepSpeed ZeRO."""

    init: Annotated[TeacherLayers | Pretrained | Scratch, Field(discriminator="source")]
    """Where its first weights come from: `source: teacher`, `pretrained` or `scratch`."""
    warm_start: bool = False
    """Start from the family's champion of this student, `models:/FAMILY-STUDENT@champion`, whatever its size, and from
    `init` only where there is none yet. A resumed run keeps the version that it began with."""
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
    """GPUs that one rank asks Ray for; 0 trains it on CPU. A single rank may take a part of one, beside others."""
    memory_per_rank: Bytes | None = None
    """Host memory that one rank asks Ray for, such as 6GiB; none means what `check` estimates."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Times its ranks are started again from the last checkpoint before the student counts as failed. Failures at
    their start count too."""

    @model_validator(mode="after")
    def _one_device_each(self) -> StudentSpec:
        if self.gpus_per_rank > 1 or (self.ranks > 1 and self.gpus_per_rank not in (0.0, 1.0)):
            allowed = "0 or 1, as there are several ranks" if self.ranks > 1 else "0 to 1"
            raise ValueError(f"gpus_per_rank is {self.gpus_per_rank:g}; each rank drives one device: {allowed}")
        return self
