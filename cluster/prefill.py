"""One forward pass of a causal language model's backbone: what the teacher and every student do with a batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from cluster.errors import RunError
from cluster.models import Packing


def backbone_of(model: Any) -> Any:
    """The model without its head. Some classes, such as Llama 4's, declare a ``base_model`` that they do not have."""
    backbone = model.base_model
    return model.model if backbone is model and hasattr(model, "model") else backbone


def last_hidden(backbone: Any, tokens_BS: Tensor, positions_BS: Tensor | None, packing: Packing = "unpacked") -> Tensor:
    """Last hidden states [B, S, D] after the final norm; no KV cache, no logits.

    Args:
        backbone: a transformers model without its head, see :func:`backbone_of`.
        tokens_BS: int64.
        positions_BS: each token's place in its document, int64; a document begins wherever this does not grow by one.
            None where every sequence is one document.
        packing: how the model keeps packed documents apart, as :func:`cluster.packing.probe_packing` found.

    Raises:
        RunError: documents are packed and the model cannot keep them apart.
    """
    if positions_BS is None:
        hidden_BSD: Tensor = backbone(input_ids=tokens_BS, use_cache=False).last_hidden_state
        return hidden_BSD
    if packing == "unpacked":
        raise RunError(
            f"{type(backbone).__name__} cannot keep the documents apart that are packed into one sequence; start a new "
            f"run without --resume, whose corpus holds one document per sequence"
        )
    options: dict[str, Any] = {}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        options["position_ids"] = positions_BS
    if packing == "masked":
        options["attention_mask"] = document_mask(backbone, tokens_BS, positions_BS)
    hidden_BSD = backbone(input_ids=tokens_BS, use_cache=False, **options).last_hidden_state
    return hidden_BSD


def document_mask(backbone: Any, tokens_BS: Tensor, positions_BS: Tensor) -> Any:
    """A causal mask [B, 1, S, S] with one block per document, in the form that the model's attention takes.

    Boolean for sdpa, additive for eager attention, None for flash attention, which goes by the positions. Models with
    several kinds of layers get one mask per kind, so that sliding windows stay what they are.
    """
    # The builder reads the shape, the dtype and the device of the embeddings, and no values.
    embeddings_BSD = torch.empty(*tokens_BS.shape, 0, dtype=backbone.dtype, device=tokens_BS.device)
    return create_masks_for_generate(
        config=backbone.config,
        inputs_embeds=embeddings_BSD,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_BS,
    )
