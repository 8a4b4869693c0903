"""A student's first weights: the teacher's own layers, an existing model, or random ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cluster.errors import UserError
from cluster.spec import Pretrained, Scratch, TeacherLayers


def evenly_spaced(keep: int, total: int) -> list[int]:
    """``keep`` of ``total`` layers, evenly spaced, with the first and the last among them (one layer: the first)."""
    if keep == 1:
        return [0]
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def chosen_layers(init: TeacherLayers, total: int) -> list[int]:
    """The teacher's layers that a student takes over.

    Raises:
        UserError: more layers, or a higher one, than the teacher has.
    """
    layers = init.layers if isinstance(init.layers, list) else evenly_spaced(min(init.layers, total), total)
    asked = len(layers) if isinstance(init.layers, list) else init.layers
    if asked > total or layers[-1] >= total:
        raise UserError(f"init.layers {init.layers} asks for more than the teacher's {total} layers (0 to {total - 1})")
    return layers


def cut_config(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    """The teacher's configuration with these layers only; lists that hold one entry per layer are cut alike.

    Those are the ones with "layer" in their name, such as ``layer_types``; other lists may have that length by chance.
    """
    fields = config.to_dict()
    total = config.num_hidden_layers
    for key, value in fields.items():
        if "layer" in key and isinstance(value, list) and len(value) == total:
            fields[key] = [value[i] for i in layers]
    fields["num_hidden_layers"] = len(layers)
    return type(config).from_dict(fields)


def scratch_config(config: PretrainedConfig, init: Scratch) -> PretrainedConfig:
    """The teacher's configuration in the student's own size."""
    fields = config.to_dict()
    fields.update(
        num_hidden_layers=init.layers,
        hidden_size=init.hidden_size,
        num_attention_heads=init.heads,
        num_key_value_heads=init.kv_heads or init.heads,
        intermediate_size=init.intermediate_size,
        head_dim=init.hidden_size // init.heads,
    )
    fields.pop("layer_types", None)
    return type(config).from_dict(fields)


def _cut_layers(teacher: PreTrainedModel, layers: list[int], dtype: torch.dtype) -> PreTrainedModel:
    """A new model of the teacher's class whose layer i holds the teacher's layer ``layers[i]``."""
    student = type(teacher)._from_config(cut_config(teacher.config, layers), dtype=dtype)
    total = teacher.config.num_hidden_layers
    stacks = [name for name, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        raise UserError(f"init.source teacher cannot tell which modules of {type(teacher).__name__} are its layers")
    layer = re.compile(rf"^{re.escape(stacks[0])}\.(\d+)\.")
    position = {old: new for new, old in enumerate(layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        found = layer.match(name)
        if not found:
            state[name] = tensor
        elif int(found[1]) in position:
            state[layer.sub(f"{stacks[0]}.{position[int(found[1])]}.", name)] = tensor
    student.load_state_dict(state)
    student.generation_config = teacher.generation_config
    return student


def initial_student(
    init: TeacherLayers | Pretrained | Scratch,
    *,
    teacher_dir: str | Path,
    student_dir: str | Path | None,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a student before training. Deterministic: every rank builds the same one.

    Args:
        teacher_dir: local directory of the teacher.
        student_dir: local directory of an existing model, which counts instead of ``init``: the one that
            :class:`Pretrained` names, or the champion of a warm start.
        trust_remote_code: run Python that comes with the teacher.
    """
    if student_dir is not None:
        return AutoModelForCausalLM.from_pretrained(student_dir, dtype=dtype, use_safetensors=True)
    assert not isinstance(init, Pretrained), "it comes with its directory"
    if isinstance(init, Scratch):
        config = scratch_config(AutoConfig.from_pretrained(teacher_dir, trust_remote_code=trust_remote_code), init)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init.seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    teacher = AutoModelForCausalLM.from_pretrained(
        teacher_dir, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return _cut_layers(teacher, chosen_layers(init, teacher.config.num_hidden_layers), dtype)
