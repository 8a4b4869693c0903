"""Tiny models of real classes whose heads are more than a matrix: a bias, a logit scale, a soft-cap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import POSITIONS, write_tiny_tokenizer

_SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
_GPTJ: dict[str, Any] = {"n_embd": 64, "n_inner": 128, "n_layer": 4, "n_head": 4, "n_positions": POSITIONS}
HEADED: dict[str, dict[str, Any]] = {
    "phi": _SIZE,
    "gptj": {**_GPTJ, "rotary_dim": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    # A cap that bends most of the logits.
    "gemma2": {**_SIZE, "num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 3.0},
    "granite": {**_SIZE, "num_key_value_heads": 2, "logits_scaling": 3.0},
    "cohere": {**_SIZE, "num_key_value_heads": 2, "logit_scale": 0.3},
    "hyperclovax": {**_SIZE, "num_key_value_heads": 2, "logits_scaling": 0.3},
}


def headed_model(kind: str, padded_to: int = 320) -> Any:
    """A random model of a type in :data:`HEADED`, whose bias, where it has one, is far from 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"max_position_embeddings": POSITIONS, **HEADED[kind]} if kind != "gptj" else HEADED[kind]
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=padded_to, initializer_range=0.2, **fields, **ids)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if (bias_V := model.get_output_embeddings().bias) is not None:
            bias_V.normal_(std=2.0)
    return model


def write_headed_model(path: Path, kind: str) -> Path:
    """The same with the tiny tokenizer, as a directory."""
    write_tiny_tokenizer(path)
    headed_model(kind).save_pretrained(path)
    return path
