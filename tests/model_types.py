"""Every causal model type of transformers as a small random model, and what the probes find of it."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

SECONDS, MEMORY_BYTES = 120, 8 << 30
FULL, SLIDING = "full_attention", "sliding_attention"

# What the default configuration of a type leaves out, although its models cannot be built or are not complete without.
FILLED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (FULL, SLIDING)}
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
    "dots1": {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "lfm2_moe": {"layer_types": ["conv", "conv", FULL, "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
# Settings that change which token attends to which, beside the default ones.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, is_decoder": ("bert", {"is_decoder": True}),
    "roberta, is_decoder": ("roberta", {"is_decoder": True}),
    "xlm, causal": ("xlm", {"causal": True}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new_decoder_architecture": (
        "falcon",
        {"new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8},
    ),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": ["attention"] * 32}),
}


@dataclass(frozen=True)
class Row:
    """What was found of a type.

    Attributes:
        packing: exact, masked, unpacked or refused; "not built" where no small model could be built and run.
        head: how its logits come from its last states: exact for a plain product, what is added to it, or refused; ""
            where no layout of documents helps anyway.
        detail: why it was refused or not built.
    """

    name: str
    packing: str
    head: str = ""
    detail: str = ""


def names() -> list[str]:
    """All causal model types of transformers, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS})


def config_of(name: str) -> Any:
    """The default configuration of a type, in its real size."""
    from transformers import CONFIG_MAPPING

    model_type, settings = VARIANTS.get(name, (name, {}))
    return CONFIG_MAPPING[model_type](**FILLED.get(model_type, {}), **settings)


def probe(name: str) -> Row:
    """Build a type in small and probe it, in this process."""
    from cluster.packing import NotCausalError, probe_packing
    from cluster.prefill import backbone_of
    from cluster.shrink import shrunk, small_model

    try:
        model = small_model(shrunk(config_of(name)))
        # One pass in the plain way tells a model that cannot be run from one that cannot be run with positions.
        packing: str = probe_packing(backbone_of(model))
    except NotCausalError as error:
        return Row(name, "refused", detail=str(error))
    except Exception as error:
        return Row(name, "not built", detail=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return Row(name, packing, _head(model))


def _head(model: Any) -> str:
    from cluster.errors import UserError
    from cluster.heads import head_of, probe_head

    try:
        probe_head(model, "")
        head = head_of(model)
    except UserError as error:
        return "refused: " + str(error).removeprefix(": ").split(";")[0]
    parts = {"bias": head.bias_V is not None, "scale": head.scale != 1.0, "soft-cap": head.softcap is not None}
    return ", ".join(part for part, there in parts.items() if there) or "exact"


def probe_apart(name: str) -> Row:
    """:func:`probe` in a process of its own, which may take ``SECONDS`` and ``MEMORY_BYTES``.

    The process is a fork of a small server with torch and transformers in it, not of the caller, whose own address
    space may be larger than the limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch", "transformers"])
    source, sink = context.Pipe(duplex=False)
    process = context.Process(target=_probe_into, args=(name, sink))
    process.start()
    sink.close()
    try:
        row: Row = source.recv()
    except EOFError:
        process.join()
        return Row(name, "not built", detail=f"its process ended with {process.exitcode}")
    process.join()
    return row


def _probe_into(name: str, sink: Connection) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sink.send(probe(name))
