"""Tiny random models of many types, as ``save_pretrained`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS, VOCABULARY = 4, 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
TYPES: dict[str, dict[str, Any]] = {
    "bloom": {},
    "cohere2": {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v3": {
        **_EXPERTS,
        "intermediate_size": 48,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "falcon": {},
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_oss": {**_GROUPED, **_EXPERTS, "num_local_experts": 4, "sliding_window": 8},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite": {**_GROUPED},
    "jamba": {
        **_GROUPED,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
        "use_mamba_kernels": False,
    },
    "llama": {**_GROUPED},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "olmo2": {**_GROUPED},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"intermediate_size": 48},
    "qwen2": {**_GROUPED, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "num_experts": 4, "mlp_only_layers": [1, 3]},
}


def tiny_config(kind: str, **fields: Any) -> Any:
    """A configuration of a type in ``TYPES`` with four layers of width 32."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**_COMMON, **TYPES[kind], **fields})


def tiny_model(config: Any) -> Any:
    """A random model of a configuration, the same one every time."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


OWN_CONFIGURATION = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "tiny_own"
"""
OWN_MODEL = """from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def write_own_code(path: Path, **fields: Any) -> Path:
    """Save a random model of a type that transformers does not know, with the Python that it needs beside it."""
    tiny_model(tiny_config("llama", **fields)).save_pretrained(path)
    tree = json.loads((path / "config.json").read_text())
    tree |= {"model_type": "tiny_own", "architectures": ["OwnForCausalLM"]}
    tree["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(tree))
    (path / "configuration_own.py").write_text(OWN_CONFIGURATION)
    (path / "modeling_own.py").write_text(OWN_MODEL)
    return path


def write_tiny_type(path: Path, kind: str, **fields: Any) -> Path:
    """Save a random model of a type."""
    tiny_model(tiny_config(kind, **fields)).save_pretrained(path)
    return path
