"""A student's first weights: the teacher's own layers, an existing model, or random ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.errors import UserError
from cluster.loading import load_model, read_config
from cluster.spec import Pretrained, Scratch, TeacherLayers
from cluster.students.configs import cut_config, scratch_config


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


def layer_stack(model: nn.Module, total: int) -> str:
    """Name of the list of modules that holds a model's ``total`` layers.

    Lists inside a layer do not count, nor do those without weights, such as GraniteSWA's rotary tables.

    Raises:
        UserError: there is none, or more than one.
    """
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    }
    outer = {name: size for name, size in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    whole = [name for name, size in outer.items() if size == total]
    if len(whole) != 1:
        found = ", ".join(f"{name} ({size})" for name, size in outer.items()) or "none"
        raise UserError(f"{type(model).__name__} has no single list of {total} layers; its lists of modules: {found}")
    return whole[0]


def _cut_layers(teacher: PreTrainedModel, layers: list[int], dtype: torch.dtype) -> PreTrainedModel:
    """A new model of the teacher's class whose layer i holds the teacher's layer ``layers[i]``."""
    student = type(teacher)._from_config(cut_config(teacher.config, layers), dtype=dtype)
    stack = layer_stack(teacher, teacher.config.num_hidden_layers)
    layer = re.compile(rf"^{re.escape(stack)}\.(\d+)\.")
    position = {old: new for new, old in enumerate(layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        found = layer.match(name)
        if not found:
            state[name] = tensor
        elif int(found[1]) in position:
            state[layer.sub(f"{stack}.{position[int(found[1])]}.", name)] = tensor
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
        trust_remote_code: run Python that comes with the teacher or with the existing model.

    Raises:
        UserError: the directory's weights are not those of its model, or its layers cannot be told.
    """
    if student_dir is not None:
        return load_model(student_dir, dtype=dtype, trust_remote_code=trust_remote_code)
    assert not isinstance(init, Pretrained), "it comes with its directory"
    if isinstance(init, Scratch):
        config = scratch_config(read_config(teacher_dir, trust_remote_code), init)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init.seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    teacher = load_model(teacher_dir, dtype=dtype, trust_remote_code=trust_remote_code)
    return _cut_layers(teacher, chosen_layers(init, teacher.config.num_hidden_layers), dtype)
