"""A student as DeepSpeed sees it: a backbone, and a head that applies a function to its own parameters.

Under ZeRO-3 a parameter is whole only inside the ``forward`` of the module that owns it. So whatever needs the head
(the fused loss, the evaluation) is handed to it as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.corpus.batches import Batch
from cluster.heads import OutputHead, head_of
from cluster.models import Packing
from cluster.prefill import backbone_of, last_hidden

R = TypeVar("R")


class Head(nn.Module):
    """Owns the output embedding's weight, which may be tied to the input embedding's, and its bias if it has one."""

    def __init__(self, head: OutputHead[Any]) -> None:
        super().__init__()
        self.weight, self.bias = head.weight_VD, head.bias_V
        self.scale, self.softcap = head.scale, head.softcap

    def forward(self, hidden_TD: Tensor, use: Callable[[Tensor, OutputHead[Tensor]], R]) -> R:
        """``use(hidden_TD, head)`` while the head's parameters are whole."""
        return use(hidden_TD, OutputHead(self.weight, self.bias, self.scale, self.softcap))


@dataclass(frozen=True)
class Inputs:
    """Some sequences as a student reads them, on its device.

    Attributes:
        tokens_BS: int64.
        positions_BS: places in the documents, int64; none where every sequence is one document.
        loss_mask_BS: True where a position carries loss.
    """

    tokens_BS: Tensor
    positions_BS: Tensor | None
    loss_mask_BS: Tensor

    @property
    def next_T(self) -> Tensor:
        """The token after each loss token: what position t is scored on."""
        return self.tokens_BS.roll(-1, dims=1)[self.loss_mask_BS]


def inputs_of(batch: Batch, device: torch.device) -> Inputs:
    """A batch's columns as tensors of their own, for arrays out of Ray's store are read-only."""
    tokens_BS = torch.from_numpy(batch.tokens_BS.astype(np.int64)).to(device)
    positions_BS = torch.from_numpy(batch.positions_BS.astype(np.int64)).to(device) if batch.packed else None
    return Inputs(tokens_BS, positions_BS, torch.from_numpy(batch.loss_mask_BS.copy()).to(device))


class Student(nn.Module):
    """A causal language model without its logits.

    Args:
        packing: how it keeps packed documents apart, see :mod:`cluster.packing`.
    """

    def __init__(self, model: PreTrainedModel, packing: Packing = "unpacked") -> None:
        super().__init__()
        self.backbone, self._packing = backbone_of(model), packing
        self.head = Head(head_of(model))

    def forward(self, inputs: Inputs, use: Callable[[Tensor, OutputHead[Tensor]], R]) -> R:
        """Run the backbone and hand the hidden states of the loss tokens, [T, D], with the head to ``use``."""
        hidden_BSD = last_hidden(self.backbone, inputs.tokens_BS, inputs.positions_BS, self._packing)
        return self.head(hidden_BSD[inputs.loss_mask_BS], use)
