"""A model's architecture in small: the same class and the same kinds of layers, at a width that any CPU can afford.

What depends on the architecture alone (which token attends to which, what its head computes) is probed on such a model
before a real one is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, WINDOW, POSITIONS, LAYERS = 128, 8, 32, 256, 8, 512, 4
# A model with more parameters than this is not built.
MOST_PARAMETERS = 100_000_000

_TOKENS = r".*token_(id|index|ids)"
_HIDDEN_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim")
_TOTAL_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_DEPTHS = (
    r"num_hidden_layers|n_layers?|num_layers|num_blocks|(encoder|decoder)_layers|num_(encoder|decoder|global)_layers"
    r"|conf_num_hidden_layers|depth|max_window_layers|num_layers_per_stack"
)
# Fields that decide which layers are of which kind. Enough layers are kept for each kind to appear.
_LAYER_PATTERNS = r".*(period|interval|pattern|offset|every|first_k|dense_layers|_step|start_index).*"
_HEAD_COUNTS = (
    r"(.*_)?(num_heads|(num_)?attention_heads|n_heads?|(num_)?(key|value)_heads)(_per_layer)?|num_query_groups"
)
_KV_HEAD_COUNTS = r"(.*_)?(num_)?(key_value|kv)_heads|kv_n_heads|n_head_kv"
# Sizes by field name; the first pattern that matches the whole name counts. A value that is smaller stays as it is.
_SIZES: dict[str, int] = {
    r".*type_vocab_size": 8,
    r".*vocab_size.*|.*_vocab": VOCABULARY,
    r"num_position_embeddings|(n|max)_positions|max_(position_embeddings|seq_len|sequence_length)": POSITIONS,
    r"max_(target|source)_positions|n_ctx|context_length": POSITIONS,
    r".*(sliding_window(_size)?|(attention|keep)_window_size|attention_chunk_size|local_attention)|window_size": WINDOW,
    r"(mamba_)?chunk_size|block_size|(local|lsh)_attn_chunk_length": 2 * WINDOW,
    r"index_topk(_blocks)?": WINDOW,
    r"index_block_size|split_ngram_parts": WINDOW // 2,
}
# The same for widths, which belong together: they are changed only where the hidden size is.
_WIDTHS: dict[str, int] = {
    r"mamba_d_ssm": 2 * HIDDEN,
    r"qk_head_dim": 2 * HEAD_DIM,
    r"rotary_dim": HEAD_DIM // 2,
    r"(.*_)?(head_(dim|size)|d_head|dim_head)|kv_channels": HEAD_DIM,
    r"(.*_)?(rank|d_state|state_size)|d_rel|router_hidden_size|.*_lowrank": HEAD_DIM // 2,
    r"(.*_)?(n_routed_experts|num_local_experts|num_experts|expert_num)": 4,
    r".*experts_per_tok(en)?|moe_top_?k|moe_k": 2,
    r"n_group|topk_group|num_expert_group|mamba_n_?groups|n_groups|o_groups": 1,
    r"(.*_)?(hidden_size(_global|_per_layer_input)?|d_model|n_embd|embed(ding)?_(dim|size))": HIDDEN,
    r"(.*_)?(emb_dim|dim|model_dim|lru_width|proj_dim)|query_pre_attn_scalar": HIDDEN,
    r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|feed_forward_size|mlp_dim)": 2 * HIDDEN,
    r"(.*_)?(d_ff|dff|d_inner|n_inner|dim_ff)": 2 * HIDDEN,
}


def shrunk(config: Any) -> Any:
    """A configuration of the same class whose model has the same kinds of layers and about a million parameters.

    Windows and chunks become short enough that 48 tokens reach past several of them.

    Args:
        config: a transformers configuration; it is not changed.
    """
    return type(config).from_dict(_shrunk(config.to_dict()))


def small_model(config: Any, trust_remote_code: bool = False) -> Any:
    """A random model of a small configuration, see :func:`cluster.shrink.shrunk`; float32, on the CPU.

    Its matrices are large enough for every layer to matter: some architectures begin with output projections of zero,
    which would hide what they leak.

    Raises:
        ValueError: it is not small.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if (size := sum(weight.numel() for weight in outline.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"it still has {size} parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=(weight.numel() / weight.shape[0]) ** -0.5)
    return model.eval()


def _shrunk(given: dict[str, Any]) -> dict[str, Any]:
    fields = {name: _shrunk(value) if _is_config(name, value) else value for name, value in given.items()}
    hidden = [value for name in _HIDDEN_NAMES if isinstance(value := given.get(name), int)]
    wide = not hidden or hidden[0] > HIDDEN
    total, depth = _total(given), _cut_depth(given)
    renamed: dict[int, int] = {}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == total and not re.fullmatch(_TOKENS, name):
            fields[name] = value = value[:depth]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            fields[name] = {layer: one for layer, one in value.items() if int(layer) < depth}
        change = _change_of(name, value == given.get("num_attention_heads"), wide, depth, renamed)
        if change is not None:
            fields[name] = _each(value, change)
    if wide:
        _mend(fields, given)
    return fields


def _change_of(
    name: str, is_head_count: bool, wide: bool, depth: int, renamed: dict[int, int]
) -> Callable[[int], int] | None:
    """What becomes of the numbers in a field; None where they stay.

    Args:
        is_head_count: its value is the number of attention heads.
        wide: widths are changed too.
    """
    if re.fullmatch(_TOKENS, name):
        return lambda old: _special(old, renamed)
    if re.fullmatch(_DEPTHS, name):
        return lambda old: min(old, depth)
    if wide and re.fullmatch(_KV_HEAD_COUNTS, name) and not is_head_count:
        return lambda old: math.gcd(old, HEADS // 2)
    if wide and re.fullmatch(f"{_HEAD_COUNTS}|{_KV_HEAD_COUNTS}", name):
        return lambda old: math.gcd(old, HEADS)
    for table in [_SIZES, _WIDTHS] if wide else [_SIZES]:
        for pattern, size in table.items():
            if re.fullmatch(pattern, name):
                return lambda old, size=size: min(old, size)  # type: ignore[misc]
    return None


def _is_config(name: str, value: Any) -> bool:
    return isinstance(value, dict) and (name.endswith("config") or "model_type" in value)


def _each(value: Any, change: Callable[[int], int]) -> Any:
    """A number, or the numbers of a list, changed; zero, negative numbers and anything else stay."""
    if isinstance(value, list):
        return [_each(one, change) for one in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


def _special(old: int, renamed: dict[int, int]) -> int:
    """Special tokens stay distinct; those beyond the small vocabulary move to its end."""
    if old < VOCABULARY // 4:
        return old
    return renamed.setdefault(old, VOCABULARY - 1 - len(renamed) % (VOCABULARY // 4))


def _mend(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Make widths fit that a model derives from others."""
    # Mamba's inner width is `expand` times the hidden size, and its heads times their width.
    inner = HIDDEN * int(given.get("mamba_expand") or given.get("expand") or 2)
    counts = ["mamba_n_heads", "n_mamba_heads", "mamba_num_heads"]
    if "expand" in given and "num_attention_heads" not in given:
        counts.append("num_heads")
    sizes = ["mamba_d_head", "mamba_headdim", "mamba_head_dim"]
    fields.update({name: inner // HEAD_DIM for name in counts if given.get(name)})
    fields.update({name: HEAD_DIM for name in sizes if given.get(name)})
    if given.get("d_head") and given.get("n_head"):
        fields["d_head"] = HIDDEN // fields["n_head"]
    # Zamba's attention reads two hidden states side by side.
    if given.get("attention_head_dim") and given.get("attention_hidden_size"):
        fields["attention_hidden_size"] = HIDDEN * (given["attention_hidden_size"] // given["hidden_size"])
        fields["attention_head_dim"] = fields["attention_hidden_size"] // fields["num_attention_heads"]
    # Long-context rotary tables have one factor per pair of a head's rotated dimensions.
    if heads := fields.get("num_attention_heads"):
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(rope := fields.get(name), dict):
                share = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
                pairs = int((fields.get("head_dim") or fields["hidden_size"] // heads) * share) // 2
                fields[name] = {
                    key: value[:pairs] if key.endswith("_factor") and isinstance(value, list) else value
                    for key, value in rope.items()
                }
    # Gemma 3n's last layers take their keys from earlier ones of the same kind, which have to be left.
    if shared := given.get("num_kv_shared_layers"):
        fields["num_kv_shared_layers"] = min(shared, fields["num_hidden_layers"] // 2)


def _total(fields: dict[str, Any]) -> int:
    return next((fields[name] for name in _TOTAL_NAMES if isinstance(fields.get(name), int)), 0)


def _cut_depth(fields: dict[str, Any]) -> int:
    """Layers to keep so that every kind of layer is among them, and twice if there are two: they may share weights."""
    total = _total(fields)
    by_layer = [
        value
        for name, value in fields.items()
        # Not a list of the layers' own numbers.
        if "layer" in name and isinstance(value, list) and len(value) == total and len(set(map(repr, value))) < total
    ]
    kinds = [repr(kind) for kind in zip(*by_layer, strict=True)]
    seconds = [[i for i, other in enumerate(kinds) if other == kind][:2][-1] for kind in set(kinds)]
    patterns = [
        value
        for name, value in fields.items()
        if re.fullmatch(_LAYER_PATTERNS, name) and isinstance(value, int) and 0 < value < total
    ]
    depth = max(LAYERS, 1 + max([*seconds, *patterns], default=0))
    return 2 * depth if fields.get("num_kv_shared_layers") else depth
