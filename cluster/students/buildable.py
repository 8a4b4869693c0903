"""Builds a student on the meta device before anything starts, and refuses one that is not what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cluster.errors import UserError
from cluster.loading import meta_model
from cluster.spec import Scratch
from cluster.students.configs import KV_NAMES, WIDTH_NAMES, cut_config, own_names, scratch_config
from cluster.students.initial import layer_stack

_PLAIN = (bool, int, float, str, type(None))
_ATTENTION_OR_NORM = ("attn", "attention", "norm", "ln_")
_PROBE_TOKENS = 8


def check_cut(field: str, config: Any, layers: Sequence[int], trust_remote_code: bool = False) -> None:
    """Check that a student of these layers can take the teacher's weights and uses them as the teacher does.

    Layer i of the student must have the names, shapes, classes and settings of the teacher's layer ``layers[i]``, and
    everything outside the layers must have the teacher's names and shapes.

    Args:
        field: the spec's field, for the error.
        config: the teacher's configuration.

    Raises:
        UserError: names what differs.
    """
    kind = config.model_type
    if not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{field}: a {kind} model nests its layers in sub-models; init.source teacher cannot cut it")
    teacher = meta_model(config, "teacher.model", trust_remote_code)
    cut = _student_config(field, kind, cut_config, config, layers)
    student = meta_model(cut, field, trust_remote_code)
    theirs = _stack_of(field, teacher, config.num_hidden_layers)
    own = _stack_of(field, student, len(layers))
    position = {old: new for new, old in enumerate(layers)}
    for new, old in enumerate(layers):
        if difference := _difference(
            teacher.get_submodule(f"{theirs}.{old}"), student.get_submodule(f"{own}.{new}"), position
        ):
            raise UserError(
                f"{field}.layers: a {kind} model cannot be cut to layers {list(layers)}: as layer {new} of the "
                f"student, the teacher's layer {old} would differ in {difference}"
            )
    for name, values in _kinds(config).items():
        wanted, got = [values[old] for old in layers], list(getattr(cut, name, None) or ())
        if got != wanted:
            raise UserError(
                f"{field}.layers: a {kind} model cannot be cut to layers {list(layers)}: its {name} would be {got} "
                f"instead of {wanted}"
            )
    outside = [_shapes(model, but=stack) for model, stack in ((teacher, theirs), (student, own))]
    if outside[0] != outside[1]:
        changed = sorted(dict(outside[0].items() ^ outside[1].items()))
        raise UserError(
            f"{field}.layers: a {kind} model cannot be cut to {len(layers)} layers: its {changed[0]} depends on the "
            f"number of layers"
        )


def _student_config(field: str, kind: str, make: Any, *given: Any) -> Any:
    try:
        return make(*given)
    except Exception as error:  # configuration classes raise whatever their validation raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{field}: a {kind} model cannot be made in this size: {reason}") from None


def _stack_of(field: str, model: nn.Module, total: int) -> str:
    try:
        return layer_stack(model, total)
    except UserError as error:
        raise UserError(f"{field}.layers: {error}") from None


def _shapes(module: nn.Module, but: str | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that is saved of a module, except below one of its parts."""
    state = module.state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if but is None or not n.startswith(f"{but}.")}


def _difference(theirs: nn.Module, own: nn.Module, position: dict[int, int]) -> str | None:
    """The first thing in which two layers differ; None where they are the same.

    Args:
        position: the student's number of each teacher layer that it keeps: a setting may be either.
    """
    shapes = _shapes(theirs), _shapes(own)
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            return f"{name}: {shapes[1].get(name, 'absent')} instead of {shapes[0].get(name, 'absent')}"
    modules = dict(own.named_modules())
    for name, module in theirs.named_modules():
        other, where = modules.get(name), f"{name}." if name else ""
        if type(other) is not type(module):
            return f"the class of {name or 'the layer'}: {type(other).__name__} instead of {type(module).__name__}"
        for setting, value in vars(module).items():
            found = vars(other).get(setting)
            if not isinstance(value, _PLAIN) or found == value:
                continue
            if type(value) is int and position.get(value) == found:
                continue  # a layer's number
            return f"{where}{setting}: {found} instead of {value}"
    return None


def _kinds(config: Any) -> dict[str, list[Any]]:
    """A configuration's lists with one kind per layer."""
    names = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
    lists = {name: getattr(config, name, None) for name in names}
    total = config.num_hidden_layers
    return {name: list(value) for name, value in lists.items() if value is not None and len(value) == total}


def check_scratch(field: str, config: Any, init: Scratch, trust_remote_code: bool = False) -> None:
    """Check that a student with random weights gets every size that was asked for, and can run.

    Args:
        field: the spec's field, for the error.
        config: the teacher's configuration.

    Raises:
        UserError: names the size that the type cannot have, and what it would get.
    """
    kind = config.model_type
    if not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{field}: a {kind} model nests its layers in sub-models; init.source scratch cannot size it")
    if not hasattr(config, "num_attention_heads"):
        raise UserError(f"{field}: a {kind} model has no attention heads; init.source scratch cannot size it")
    own = _student_config(field, kind, scratch_config, config, init)
    student = meta_model(own, field, trust_remote_code)
    stack = _stack_of(field, student, init.layers)
    got = student.get_input_embeddings().weight.shape[-1], own.num_attention_heads
    for name, asked, made in zip(("hidden_size", "heads"), (init.hidden_size, init.heads), got, strict=True):
        if made != asked:
            raise UserError(f"{field}.{name}: got {asked}; a {kind} model would have {made} instead")
    _check_kv_heads(field, config, init, trust_remote_code, student.get_submodule(stack))
    _check_width(field, config, init, trust_remote_code, student.get_submodule(stack))
    _check_runs(field, own, trust_remote_code)


def _check_kv_heads(field: str, config: Any, init: Scratch, trust_remote_code: bool, layers: nn.Module) -> None:
    """Whether every layer has the key-value heads that were asked for, as many as ``heads`` where none were."""
    kind, asked = config.model_type, init.kv_heads or init.heads
    modules = list(layers.modules())
    made = {n for module in modules for name in KV_NAMES if isinstance(n := getattr(module, name, None), int)}
    if not made:
        groups = {n for module in modules if isinstance(n := getattr(module, "num_key_value_groups", None), int) and n}
        made = {init.heads // n for n in groups}
        if asked != init.heads:
            full = init.model_copy(update={"kv_heads": init.heads})
            other = meta_model(_student_config(field, kind, scratch_config, config, full), field, trust_remote_code)
            if _shapes(other.get_submodule(layer_stack(other, init.layers))) == _shapes(layers):
                made = {init.heads}
    if others := sorted(made - {asked}):
        raise UserError(
            f"{field}.kv_heads: got {asked}; a {kind} model of this size would have {others[0]}; give "
            f"kv_heads: {others[0]}"
        )


def _check_width(field: str, config: Any, init: Scratch, trust_remote_code: bool, layers: nn.Module) -> None:
    """Whether ``intermediate_size`` is the width of the feed-forward network of every layer.

    A model of twice that size is built as well: what doubles with it is what the setting decides.
    """
    kind, asked = config.model_type, init.intermediate_size
    if own_names(config, WIDTH_NAMES):
        wide = init.model_copy(update={"intermediate_size": 2 * asked})
        other = meta_model(_student_config(field, kind, scratch_config, config, wide), field, trust_remote_code)
        twice = _shapes(other.get_submodule(layer_stack(other, init.layers)))
        widths = [set[int]() for _ in range(init.layers)]
        for name, shape in _shapes(layers).items():
            for one, two in zip(shape, twice.get(name, ()), strict=False):
                if one != two:
                    widths[int(name.split(".")[0])].add(one)
        # A gate and an up projection may share one matrix, and shared experts may lie side by side in one.
        for layer, found in enumerate(widths):
            if not {asked, 2 * asked} & found or any(width % asked for width in found):
                made = ", ".join(map(str, sorted(found))) or "a width that this setting does not decide"
                raise UserError(
                    f"{field}.intermediate_size: got {asked}; layer {layer} of a {kind} model would have {made}"
                )
        return
    fixed = max(_feed_forward_widths(layers, init.hidden_size), default=0)
    if fixed != asked:
        raise UserError(
            f"{field}.intermediate_size: got {asked}; a {kind} model has no such setting: its feed-forward layers are "
            f"{fixed} wide where hidden_size is {init.hidden_size}; give intermediate_size: {fixed}"
        )


def _feed_forward_widths(layers: nn.Module, hidden: int) -> set[int]:
    """The inner sizes of all matrices of the layers that are neither attention nor norms."""
    return {
        size
        for name, shape in _shapes(layers).items()
        if len(shape) > 1 and not any(part in name for part in _ATTENTION_OR_NORM)
        for size in shape
        if size != hidden
    }


def _check_runs(field: str, own: Any, trust_remote_code: bool) -> None:
    """Whether the shapes fit together: a forward pass over fake tensors, which have no memory.

    A type whose forward pass branches on its data cannot be tried this way and is let through.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
        UnsupportedOperatorException,
    )
    from transformers import AutoModelForCausalLM

    own._experts_implementation = "batched_mm"  # the others need real data, or bfloat16
    try:
        with _without_its_log(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model = AutoModelForCausalLM.from_config(own, trust_remote_code=trust_remote_code).eval()
            model(input_ids=torch.zeros(1, _PROBE_TOKENS, dtype=torch.long), use_cache=False)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        return  # this type looks at its data, which fake tensors do not have
    except Exception as error:  # layers raise whatever torch raises for shapes that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{field}: a {own.model_type} model of this size cannot run: {reason}") from None


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Fake tensors log a traceback before they raise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
