"""One forward pass of a causal language model's backbone: what the teacher and every student do with a batch."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from cluster.errors import RunError


def last_hidden(backbone: Any, tokens_BS: Tensor, positions_BS: Tensor | None) -> Tensor:
    """Last hidden states [B, S, D] after the final norm; no KV cache, no logits.

    Args:
        backbone: a transformers model without its head.
        tokens_BS: int64.
        positions_BS: places in the packed documents, int64: where they begin anew, attention does too. None where
            every sequence is one document.

    Raises:
        RunError: documents are packed and the model cannot tell them apart.
    """
    packed = {} if positions_BS is None else {"position_ids": positions_BS}
    if packed and "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise RunError(
            f"{type(backbone).__name__} takes no position_ids, so the documents packed into one sequence would see "
            f"each other; use a model that takes them, or a corpus of documents longer than corpus.sequence_length"
        )
    hidden_BSD: Tensor = backbone(input_ids=tokens_BS, use_cache=False, **packed).last_hidden_state
    return hidden_BSD
