"""Architectures in small: every kind of layer is left, windows are short, and a model is a few million parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    JambaConfig,
    LlamaConfig,
    Qwen3NextConfig,
)

from cluster.shrink import HIDDEN, VOCABULARY, WINDOW, shrunk

CONFIGS = [
    LlamaConfig(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80),
    JambaConfig(),
    Gemma3TextConfig(),
    Gemma3nTextConfig(),
    Qwen3NextConfig(),
    DeepseekV3Config(),
]


def kinds(model: Any) -> set[frozenset[str]]:
    """What distinguishes the layers of a model: their modules' classes."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    return {frozenset(type(module).__name__ for module in layer.modules()) for layer in layers}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_a_small_model_has_every_kind_of_layer(config: Any) -> None:
    before = config.to_json_string()
    small = shrunk(config)
    with torch.device("meta"):
        big, little = (AutoModelForCausalLM.from_config(each) for each in (config, small))
    assert config.to_json_string() == before
    assert kinds(little) == kinds(big)
    assert set(getattr(small, "layer_types", None) or []) == set(getattr(config, "layer_types", None) or [])
    assert sum(p.numel() for p in little.parameters()) < 10e6 < sum(p.numel() for p in big.parameters())


def test_windows_are_shorter_than_a_probe_and_special_tokens_stay_apart() -> None:
    config = Gemma3TextConfig(bos_token_id=2, eos_token_id=[1, 106_000, 107_000], pad_token_id=250_000)
    small = shrunk(config)
    assert (small.sliding_window, small.vocab_size) == (WINDOW, VOCABULARY)
    ids = [small.bos_token_id, *small.eos_token_id, small.pad_token_id]
    assert len(set(ids)) == 5 and max(ids) < VOCABULARY


def test_a_model_that_is_small_keeps_its_widths() -> None:
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, intermediate_size=40)
    small = shrunk(config)
    assert HIDDEN > 24 == small.hidden_size
    assert (small.num_attention_heads, small.num_key_value_heads, small.intermediate_size) == (3, 1, 40)
