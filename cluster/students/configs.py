"""Configurations of students: the teacher's with fewer layers, or in another size.

transformers has no common description of what differs from layer to layer. Some types list a kind per layer, some
list layer numbers, some give a rule (the first three layers, every second one). The tables here translate what the
installed version has; :mod:`cluster.students.buildable` verifies the result on the meta device and refuses the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from cluster.spec import Scratch

# Lists of layer numbers, counted from 0.
_NUMBERS = {
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
}
# One entry per layer without "layer" in the name. Other lists may have that length by chance, such as eos_token_id.
_PER_LAYER = {"activation_sparsity_pattern", "indexer_types", "intermediate_size"}
# "The first n layers" and "the last n layers".
_LEADING = {"first_k_dense_replace", "max_window_layers", "num_dense_layers"}
_TRAILING = {"num_kv_shared_layers"}

# A type's own names of the width of its feed-forward networks; in a mixture of experts, of every expert.
WIDTH_NAMES = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "dff",
    "dim_ff",
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "intermediate_size_mlp",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
KV_NAMES = ("num_key_value_heads", "num_kv_heads")


def own_names(config: Any, names: Sequence[str]) -> list[str]:
    """Those of these names that are settings of the configuration's class, by the names that the class itself uses.

    A configuration also keeps unknown keys of its file as attributes; they have no effect on the model.
    """
    declared = {*getattr(config, "__dataclass_fields__", ()), *inspect.signature(type(config).__init__).parameters}
    mapped = dict.fromkeys(config.attribute_map.get(name, name) for name in names)
    return [name for name in mapped if name in declared]


def cut_config(config: Any, layers: Sequence[int]) -> Any:
    """The teacher's configuration with these of its layers only."""
    fields = _with_layers(config, layers)
    return type(config).from_dict(fields)


def _with_layers(config: Any, source: Sequence[int]) -> dict[str, Any]:
    """A configuration's fields for a model whose layer i is of the kind of layer ``source[i]``."""
    fields, total = config.to_dict(), config.num_hidden_layers
    for key, value in list(fields.items()):
        if key.startswith("mtp_"):  # layers for multi-token prediction, which are not loaded
            continue
        if key in _NUMBERS and isinstance(value, list | tuple):
            fields[key] = [new for new, old in enumerate(source) if old in value]
        elif key == "ple_layer_ids" and value:  # counted from 1
            fields[key] = [new + 1 for new, old in enumerate(source) if old + 1 in value]
        elif key in _LEADING and isinstance(value, int):
            fields[key] = _leading([old < value for old in source])
        elif key in _TRAILING and isinstance(value, int):
            fields[key] = _leading([old >= total - value for old in reversed(source)])
        elif isinstance(value, list | tuple) and len(value) == total and ("layer" in key or key in _PER_LAYER):
            fields[key] = [value[old] for old in source]
    fields.update(_rules(config, fields, source))
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(source)
    return fields


def _leading(holds: list[bool]) -> int:
    """How many layers there are at the start for all of which something holds."""
    return [*holds, False].index(False)


def _rules(config: Any, fields: dict[str, Any], source: Sequence[int]) -> dict[str, Any]:
    """Settings that give each layer's kind by a rule over its number, restated for the kept layers."""
    if (step := fields.get("decoder_sparse_step")) is not None:  # Qwen MoE: every n-th layer, except those listed
        dense = set(config.mlp_only_layers or ())
        kept = [new for new, old in enumerate(source) if old in dense or (old + 1) % step]
        return {"decoder_sparse_step": 1, "mlp_only_layers": kept}
    if "moe_layer_interval" in fields:  # Ernie 4.5 MoE: every n-th layer of a range
        first, last, step = (fields[f"moe_layer_{name}"] for name in ("start_index", "end_index", "interval"))
        last = config.num_hidden_layers - 1 if last == -1 else last
        moe = [new for new, old in enumerate(source) if first <= old <= last and (old + 1) % step == 0]
        first, last = (moe[0], moe[-1]) if moe else (len(source), len(source) - 1)
        return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}
    if "attn_layer_period" in fields and "expert_layer_period" in fields:  # Jamba
        rules: dict[str, Any] = {}
        for what in ("attn", "expert"):
            period, offset = fields[f"{what}_layer_period"], fields[f"{what}_layer_offset"]
            rules.update(_period(what, [old % period == offset for old in source]))
        return rules
    if "attention_types" in fields:  # GPT-Neo
        return {"attention_types": [[[config.attention_layers[old] for old in source], 1]]}
    if "block_types" in fields:  # RecurrentGemma
        return {"block_types": [config.layers_block_type[old] for old in source]}
    return {}


def _period(what: str, holds: list[bool]) -> dict[str, int]:
    """A period and an offset that hold at these layers only; nothing where there are none."""
    for period in range(1, len(holds) + 2):
        for offset in range(period):
            if [new % period == offset for new in range(len(holds))] == holds:
                return {f"{what}_layer_period": period, f"{what}_layer_offset": offset}
    return {}


def scratch_config(config: Any, init: Scratch) -> Any:
    """The teacher's configuration in the student's own size; its kinds of layers follow the teacher's in order."""
    heads, kv_heads, head_dim = init.heads, init.kv_heads or init.heads, init.hidden_size // init.heads
    fields = _with_layers(config, [i % config.num_hidden_layers for i in range(init.layers)])
    old_heads, old_size = config.num_attention_heads, config.hidden_size
    old_head_dim = getattr(config, "head_dim", None) or old_size // old_heads
    sizes = {("hidden_size",): init.hidden_size, ("num_attention_heads",): heads, KV_NAMES: kv_heads}
    for names, value in sizes.items():
        fields.update(dict.fromkeys(own_names(config, names), value))
    for name in own_names(config, WIDTH_NAMES):
        if name == "intermediate_size" and isinstance(fields.get(name), list):
            fields[name] = [init.intermediate_size] * init.layers
        else:
            fields[name] = init.intermediate_size
    # With latent attention (DeepSeek) head_dim is the rotary part only, which stays the teacher's.
    if "qk_rope_head_dim" not in fields:
        fields.update(dict.fromkeys(own_names(config, ["head_dim"]), head_dim))
    if fields.get("word_embed_proj_dim") == old_size:  # OPT
        fields["word_embed_proj_dim"] = init.hidden_size
    if fields.get("query_pre_attn_scalar") == old_head_dim:  # Gemma 2 and 3 scale by it instead of by head_dim
        fields["query_pre_attn_scalar"] = head_dim
    if fields.get("rotary_dim"):  # GPT-J
        fields["rotary_dim"] = min(fields["rotary_dim"], head_dim)
    if isinstance(fields.get("num_attention_heads_per_layer"), list):
        fields["num_attention_heads_per_layer"] = [heads] * init.layers
    fields.pop("quantization_config", None)  # of the teacher's weights
    return type(config).from_dict(fields)
