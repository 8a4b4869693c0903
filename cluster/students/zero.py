"""DeepSpeed's configuration for one student, and the few places where ZeRO must be asked for whole weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.spec import ScheduleSpec, StudentSpec


def use_plain_gloo() -> None:
    """Keep DeepSpeed on CPU from building its shared-memory all-reduce.

    The op needs a compiler and up to a minute at the first start, and a rank that is killed leaves its segment in
    /dev/shm and its peers spinning on it. Call before ``deepspeed.initialize``.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_config(student: StudentSpec, batch_sequences: int, load_universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a student whose global batch holds ``batch_sequences``.

    Args:
        load_universal: what is loaded was saved by another number of ranks, see :mod:`cluster.students.elastic`.
    """
    return {
        "train_batch_size": batch_sequences,
        "train_micro_batch_size_per_gpu": student.micro_batch,
        "gradient_accumulation_steps": batch_sequences // (student.ranks * student.micro_batch),
        "gradient_clipping": student.optimizer.clip,
        "bf16": {"enabled": student.precision == "bfloat16"},
        # Left alone, DeepSpeed sums a bfloat16 student's micro-batches in float32 and rounds the sum to bfloat16 to
        # reduce it over the ranks. The bucket then holds as many bytes as its own default does in bfloat16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": student.zero_stage,
            "reduce_bucket_size": 250_000_000,
            "overlap_comm": student.gpus_per_rank > 0,
        },
        "checkpoint": {"load_universal": load_universal},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def reduce_nothing(engine: Any) -> None:
    """Let the only rank of a student keep its gradients as they are.

    DeepSpeed's bfloat16 optimiser gathers all of them, sums them over the ranks and copies them back even where there
    is one rank, which changes no bit of a float32 sum. Its other optimisers sort gradients in the same sweep and need
    it.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(engine.optimizer, BF16_Optimizer):
        engine.enable_backward_allreduce = False


def adamw(module: nn.Module, student: StudentSpec) -> torch.optim.AdamW:
    """AdamW over a module; vectors (norms, biases) are not decayed."""
    options = student.optimizer
    named = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=student.lr, betas=options.betas, eps=options.eps, fused=True)


def rate(schedule: ScheduleSpec, batch: int, total: int) -> float:
    """The learning rate at a batch as a share of ``lr``.

    Rises linearly over the warm-up, then falls along a half cosine or a line to ``final``, or stays.
    """
    warmup = schedule.warmup * total
    if batch < warmup:
        return (batch + 1) / (warmup + 1)
    done = min(1.0, (batch - warmup) / max(1.0, total - 1 - warmup))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule.kind]
    return schedule.final + (1 - schedule.final) * shape


def schedule_of(student: StudentSpec, total: int) -> Callable[[torch.optim.Optimizer], Any]:
    """A factory that DeepSpeed calls with its wrapped optimiser; stepped once per batch."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda batch: rate(student.schedule, batch, total)
    )


def gathered_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """A model's ``state_dict``, whole, on the CPU; one weight at a time is gathered under ZeRO-3.

    Buffers that are not part of it, such as rotary tables, are left out: loaders would report them as unexpected.
    All ranks must call it; only the one with ``keep`` gets the weights, the others an empty mapping.
    """
    import deepspeed

    shared = {id(p): p for p in model.parameters()}
    state: dict[str, Tensor] = {}
    whole: dict[int, Tensor] = {}
    for identity, parameter in shared.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                whole[identity] = parameter.detach().cpu().clone()
    if keep:
        saved = model.state_dict().keys()
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            if name in saved:
                state[name] = whole.get(id(tensor), tensor.detach().cpu())
    return state
