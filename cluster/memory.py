"""Memory: how a process on a CPU keeps it, and how much each role of a family needs at its peak.

The estimates are sums of what is live at the moment that needs most, derived from the code that allocates it: this
package, DeepSpeed 0.19, and the layers of transformers. ``benchmarks/memory.py`` compares them with real processes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from cluster.spec import CorpusSpec, FamilySpec, HiddenLabels, LabelsSpec, StudentSpec, TeacherLayers, TeacherSpec

# glibc's names for what is set, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 1024**2
KEPT_BYTES = 1024**3

MIB, GIB = 1024**2, 1024**3
ITEM = {"float32": 4, "bfloat16": 2}
# Shared memory that Ray takes on a machine where Stillhouse starts it.
OBJECT_STORE_BYTES = 2 * GIB
# Resident memory of a process before it has a model, measured by benchmarks/memory.py --base: Python, Ray, torch and
# transformers; a rank has DeepSpeed and Ray Train too.
SHARD_BYTES, RANK_BYTES = 525 * MIB, 600 * MIB
ARM_BYTES = {"transformers": 550 * MIB, "vllm": 2900 * MIB, "echo": 250 * MIB}
# CUDA's context, and the libraries that it loads, in host memory and on the device.
CUDA_HOST_BYTES, CUDA_DEVICE_BYTES = 2 * GIB, 600 * MIB
# Elements: DeepSpeed's reduction bucket (cluster.students.zero), the bucket of its bfloat16 optimiser, and the whole
# parameters that ZeRO-3 keeps at most (stage3_max_live_parameters).
BUCKET, BF16_BUCKET, LIVE = 250_000_000, 500_000_000, 1_000_000_000
# Tokens and floats of logits at a time in cluster.students.losses.fused, and float32 copies of them.
LOSS_CHUNK, TILE_FLOATS, LOGIT_COPIES = 512, 1 << 19, 4
# What glibc's heap holds beyond what is live in it, as a share: blocks between others that are in use (mallinfo2).
HEAP_SLACK = 0.4
# Of an arm: tokens of a request that count, its default slots, and tokens that it scores at a time.
SERVED_TOKENS, ARM_SLOTS, SCORE_TOKENS = 2048, 8, 128


def keep_memory() -> None:
    """Let this process keep up to a gigabyte that it has freed, for its next tensors.

    By default glibc gives large blocks back at once, and the system clears every page again when it hands them out: a
    tenth of a forward pass on a CPU. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@dataclass(frozen=True)
class Shape:
    """What a model's memory depends on.

    Attributes:
        parameters: all of them; tied ones count once.
        vocabulary: rows of the head.
        attention: width of all query heads together, ``heads`` of them; ``kv``: of all key heads.
        intermediate: width of the feed-forward layers that one token goes through.
    """

    parameters: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    attention: int
    kv: int
    intermediate: int

    def layer_bytes(self, item: int, masked_length: int = 0) -> int:
        """Bytes that autograd keeps per token of one decoder layer, as transformers' Llama computes it.

        Two RMSNorms keep their float32 input, the normalised states and the output; attention keeps q, k and v (which
        are expanded to all query heads), its output and a float32 logsumexp per head; the gated feed-forward layer
        keeps gate, up, the activation and its product. Korthikanti et al. (2022, section 4.1) count 34 s b h for a
        layer with fused norms and without a gate.

        Args:
            item: bytes of a number.
            masked_length: sequence length where documents are packed: each layer then has its own copy of the mask
                [B, 1, S, S]. Otherwise 0.
        """
        norms = 2 * self.hidden * (4 + 2 * item)
        attention = 4 * item * self.attention + 4 * self.heads
        return norms + attention + 4 * item * self.intermediate + item * masked_length


@dataclass(frozen=True)
class Estimate:
    """One process at its peak.

    Attributes:
        parts: bytes by what takes them; on a CPU in host memory, on a GPU in the device's.
        host: bytes of host memory.
        gpu: whether the parts lie on a GPU.
    """

    parts: Mapping[str, int]
    host: int
    gpu: bool = False

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def device(self) -> int:
        """Bytes of the GPU's memory."""
        return self.total if self.gpu else 0


def _on(gpu: bool, process: int, parts: dict[str, int], loading: int) -> Estimate:
    """A process' estimate: on a GPU with CUDA's context beside the parts, and the model in host memory to be loaded."""
    if not gpu:
        return Estimate(parts := {"process": process, **parts}, sum(parts.values()))
    return Estimate({"process": CUDA_DEVICE_BYTES, **parts}, process + CUDA_HOST_BYTES + loading, gpu=True)


def shape_of(config: Any, field: str, trust_remote_code: bool = False) -> Shape:
    """The shape of the model that a transformers configuration describes.

    Raises:
        UserError: the model cannot be built; names the field.
    """
    from cluster.loading import meta_model

    model, text = meta_model(config, field, trust_remote_code), config.get_text_config()
    rows, hidden = model.get_output_embeddings().weight.shape
    heads, head_dim, kv_heads = _attention(text.to_dict(), hidden)
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=rows,
        hidden=hidden,
        layers=text.num_hidden_layers,
        heads=heads,
        attention=heads * head_dim,
        kv=kv_heads * head_dim,
        intermediate=_intermediate(text, hidden),
    )


def _attention(text: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Query heads, the width of one, and key-value heads, by the names of a configuration's file."""
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    return heads, text.get("head_dim") or hidden // heads, text.get("num_key_value_heads") or heads


def _intermediate(text: Any, hidden: int) -> int:
    """The width of the feed-forward layers that one token goes through, in a mixture of experts of all its experts."""
    dense = next((v for name in ("intermediate_size", "ffn_dim", "n_inner") if (v := getattr(text, name, None))), None)
    widest = max(dense) if isinstance(dense, list) else dense or 4 * hidden
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    return max(widest, chosen * (getattr(text, "moe_intermediate_size", None) or widest))


def states(parameters: int, student: StudentSpec) -> dict[str, int]:
    """What a rank holds from step to step under ZeRO (Rajbhandari et al., 2020, section 5), in bytes.

    AdamW's master weights and moments are float32 and shared out at every stage; gradients are summed in float32
    (``grad_accum_dtype``) and shared out from stage 2, weights from stage 3. The optimiser of stage 1 in bfloat16 keeps
    the last micro-batch's gradients too. Stage 3 keeps the weights that it has gathered until the step ends, up to
    ``LIVE``, and in float32 it uses the weights themselves as master weights.
    """
    item, ranks, stage = ITEM[student.precision], student.ranks, student.zero_stage
    masters = 2 if stage == 3 and item == 4 else 3
    gathered = item * min(parameters, LIVE) if stage == 3 and ranks > 1 else 0
    return {
        "weights": item * parameters // (ranks if stage == 3 else 1) + gathered,
        "optimizer": 4 * masters * parameters // ranks,
        "gradients": 4 * parameters // (ranks if stage > 1 else 1) + (2 * parameters if (stage, item) == (1, 2) else 0),
    }


def buckets(parameters: int, student: StudentSpec) -> int:
    """Bytes of DeepSpeed's buffers in which gradients are reduced at the end of a backward pass."""
    item, ranks, stage = ITEM[student.precision], student.ranks, student.zero_stage
    if (stage, item) == (1, 2):
        # BF16_Optimizer flattens all gradients to reduce them; see cluster.students.zero.reduce_nothing for one rank.
        return 4 * min(parameters, BF16_BUCKET) if ranks > 1 else 0
    # A GPU's bucket is there as a whole, twice where the reduction overlaps; on a CPU only written pages count.
    filled = min(parameters, BUCKET)
    held, overlap = (BUCKET, 2) if student.gpus_per_rank else (filled, 1)
    if stage == 3:
        # The bucket in float32; what is in it as one flat tensor, and the parts that come out of the reduction.
        return 4 * held + 2 * 4 * filled
    # The bucket in the model's precision; a flat copy, and a float32 one where that is another precision.
    return item * (overlap * held + filled) + (4 * filled if item == 2 else 0)


def student_estimate(
    shape: Shape,
    student: StudentSpec,
    corpus: CorpusSpec,
    source: Shape | None = None,
    teacher_head: int = 0,
    keeps_head: bool = False,
    packed: bool = True,
) -> Estimate:
    """The peak of one rank of a student: while it is made, at the end of a forward or of a backward pass.

    Args:
        source: the model whose layers it takes over, which is loaded beside it.
        teacher_head: bytes of the teacher's head, which a rank has while it measures: Ray's copy and its own.
        keeps_head: whether it keeps its own all the time, as labels that are hidden states want.
    """
    item, tokens, gpu = ITEM[student.precision], student.micro_batch * corpus.sequence_length, student.gpus_per_rank > 0
    per_layer = tokens * shape.layer_bytes(item, corpus.sequence_length if packed else 0)
    activations = shape.layers * per_layer
    if student.gradient_checkpointing:
        activations = shape.layers * tokens * shape.hidden * item + per_layer
    chunk = min(tokens, LOSS_CHUNK)
    tile = chunk * shape.vocabulary if gpu else max(TILE_FLOATS, shape.vocabulary)
    # The fused loss: the head's gradient in float32, one chunk's product, hidden states and their gradient.
    logits = 4 * shape.vocabulary * shape.hidden + item * chunk * shape.vocabulary
    logits += 2 * item * tokens * shape.hidden + LOGIT_COPIES * 4 * tile
    loading = item * (shape.parameters + (source.parameters if source else 0))
    held = {**states(shape.parameters, student), "teacher head": teacher_head * keeps_head}
    after = {"buckets": buckets(shape.parameters, student)}
    if (measured := 2 * teacher_head) > after["buckets"] + teacher_head * keeps_head:
        after = {"teacher head": measured}
    phases = [{**held, "activations": activations, "logits": logits}, {**held, **after}]
    if not gpu:
        phases.append({"loading": loading})
        if tokens * item * max(shape.intermediate, shape.hidden) < LARGEST_MMAP_THRESHOLD:
            # Blocks of the heap are not given back: what the forward pass took stays beside the buckets.
            # So does the room of the weights as they were loaded, which DeepSpeed copies, for stage 3 twice.
            loaded = item * shape.parameters * (2 if student.zero_stage == 3 else 1)
            phases.append({**phases[0], **after, "heap": int(HEAP_SLACK * activations) + loaded})
    return _on(gpu, RANK_BYTES, max(phases, key=lambda parts: sum(parts.values())), loading)


def teacher_estimate(
    shape: Shape, teacher: TeacherSpec, corpus: CorpusSpec, labels: LabelsSpec | None = None
) -> Estimate:
    """The peak of one shard of the teacher: its weights, and of a batch one layer, one chunk of logits and the labels.

    Under tensor parallelism the layers and the head are shared out and the embedding is not.

    Args:
        labels: the kind; those that are no hidden states or logits weigh little.
    """
    item, tokens = ITEM[teacher.dtype], corpus.batch_sequences * corpus.sequence_length
    embedding = shape.vocabulary * shape.hidden
    weights = item * (embedding + max(0, shape.parameters - embedding) // teacher.shards)
    widest = max(8 * shape.hidden, 4 * item * shape.attention, 3 * item * shape.intermediate) // teacher.shards
    parts = {
        "weights": weights,
        "activations": tokens * (3 * item * shape.hidden + widest),
        "logits": min(tokens, teacher.tokens_per_chunk) * shape.vocabulary * (item + 4),
    }
    width = {"hidden": shape.hidden, "dense": shape.vocabulary}.get(labels.kind, 0) if labels else 0
    # In host memory: the columns of the whole batch, and the blocks that they are encoded into.
    columns = 2 * item * tokens * width
    gpu = teacher.gpus_per_shard > 0
    return _on(gpu, SHARD_BYTES, parts if gpu else {**parts, "labels": columns}, columns)


def arm_estimate(
    weights: int, kv_token: int, vocabulary: int, context: int, slots: int, gpu: bool, engine: str = "transformers"
) -> Estimate:
    """The peak of one replica of a serving arm.

    Keys and values count for ``SERVED_TOKENS`` in each slot. The engine may take more, up to a quarter of what is free
    when it starts (:mod:`serving.engines.model`), so they are no reason to refuse an arm.

    Args:
        weights: bytes of all of them; ``kv_token``: of one token's keys and values.
        context: tokens of the longest text.
    """
    parts = {
        "weights": weights,
        "keys and values": slots * min(context, SERVED_TOKENS) * kv_token,
        "logits": 2 * 4 * max(slots, SCORE_TOKENS) * vocabulary,
    }
    return _on(gpu, ARM_BYTES[engine], parts, 0)


def served_estimate(folder: Path, dtype: str, slots: int, gpu: bool, engine: str) -> Estimate:
    """:func:`arm_estimate` of a model directory, read off its config.json and the sizes of its weight files."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config") or config
    stored = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "float32")
    item, own = (4 if name == "float32" else 2 for name in (stored if dtype == "auto" else dtype, stored))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) * item // own
    hidden = text.get("hidden_size") or text.get("n_embd") or 0
    _, head_dim, kv_heads = _attention(text, hidden)
    kv_token = 2 * (text.get("num_hidden_layers") or text.get("n_layer") or 0) * kv_heads * head_dim * item
    context = text.get("max_position_embeddings") or text.get("n_positions") or SERVED_TOKENS
    return arm_estimate(weights, kv_token, text.get("vocab_size") or 0, context, slots, gpu, engine)


def family_estimates(
    spec: FamilySpec, teacher: Shape, students: Mapping[str, Shape], packed: bool
) -> dict[str, Estimate]:
    """The peak of one process of each role of a family, by the names of :class:`cluster.capacity.Need`."""
    found = {"the teacher": teacher_estimate(teacher, spec.teacher, spec.corpus, spec.labels)}
    head, keeps = ITEM[spec.teacher.dtype] * teacher.vocabulary * teacher.hidden, isinstance(spec.labels, HiddenLabels)
    for name, student in spec.students.items():
        source = teacher if isinstance(student.init, TeacherLayers) else None
        found[f"student {name}"] = student_estimate(students[name], student, spec.corpus, source, head, keeps, packed)
    if spec.serving is not None:
        served = [(students[name], ITEM[student.precision]) for name, student in spec.students.items()]
        served += [(teacher, ITEM[spec.teacher.dtype])] * spec.serving.include_teacher
        arms = [
            arm_estimate(
                item * shape.parameters,
                2 * item * shape.layers * shape.kv,
                shape.vocabulary,
                SERVED_TOKENS,
                ARM_SLOTS,
                spec.serving.gpus_per_arm > 0,
            )
            for shape, item in served
        ]
        found["serving"] = max(arms, key=lambda arm: (arm.total, arm.host))
    return found


def with_memory(spec: FamilySpec, estimates: Mapping[str, Estimate]) -> FamilySpec:
    """The spec with every ``memory_per_...`` that it leaves open filled in, as what is started reads it."""
    if not estimates:
        return spec

    def filled(section: Any, field: str, role: str) -> Any:
        if getattr(section, field) is not None:
            return section
        return section.model_copy(update={field: ByteSize(estimates[role].host)})

    changes = {
        "teacher": filled(spec.teacher, "memory_per_shard", "the teacher"),
        "students": {n: filled(s, "memory_per_rank", f"student {n}") for n, s in spec.students.items()},
        "serving": spec.serving and filled(spec.serving, "memory_per_arm", "serving"),
    }
    return spec.model_copy(update=changes)
