"""A student as DeepSpeed sees it: a backbone, and a head that applies a function to its own weight.

Under ZeRO-3 a weight is whole only inside the ``forward`` of the module that owns it. So whatever needs the head's
weight (the fused loss, the evaluation) is handed to the head as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.labels.kinds import TopK
from cluster.stream import Delivery
from cluster.students.losses.divergence import TopKTargets

R = TypeVar("R")


class Head(nn.Module):
    """Owns the output embedding's weight, which may be tied to the input embedding's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_TD: Tensor, use: Callable[[Tensor, Tensor], R]) -> R:
        """``use(hidden_TD, weight_VD)`` while the weight is whole."""
        return use(hidden_TD, self.weight)


class Student(nn.Module):
    """A causal language model without its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = model.base_model
        self.head = Head(model.get_output_embeddings().weight)

    def forward(self, tokens_BS: Tensor, loss_mask_BS: Tensor, use: Callable[[Tensor, Tensor], R]) -> R:
        """Run the backbone and hand the hidden states of the loss tokens, [T, D], with the head to ``use``."""
        hidden_BSD = self.backbone(input_ids=tokens_BS, use_cache=False).last_hidden_state
        return self.head(hidden_BSD[loss_mask_BS], use)


def tokens_and_mask(delivery: Delivery, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (int64) and loss mask of some rows of a delivery, on the student's device."""
    tokens_BS = torch.from_numpy(delivery.batch.tokens_BS[rows].astype(np.int64)).to(device)
    return tokens_BS, torch.from_numpy(delivery.batch.loss_mask_BS[rows].copy()).to(device)


def topk_targets(tokens_BS: Tensor, loss_mask_BS: Tensor, labels: TopK) -> TopKTargets:
    """The loss tokens' labels: position t is scored on token t + 1 with the teacher's distribution at t."""
    device = tokens_BS.device
    mask = loss_mask_BS.cpu().numpy()
    return TopKTargets(
        next_T=tokens_BS.roll(-1, dims=1)[loss_mask_BS],
        ids_TK=torch.from_numpy(labels.ids_BSK[mask].astype(np.int64)).to(device),
        logprobs_TK=torch.from_numpy(labels.logprobs_BSK[mask]).to(device),
        log_tail_T=torch.from_numpy(labels.log_tail_BS[mask]).to(device),
    )
