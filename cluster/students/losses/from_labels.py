"""From a block of labels to the targets of the loss: the one place in training that knows the kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.heads import OutputHead
from cluster.labels.kinds import Dense, Hidden, Labels, Sampled, TopK
from cluster.labels.make import as_tensor
from cluster.students.losses.targets import BucketTargets, FullTargets, HiddenTargets, SampledTargets, Targets


def _topk(labels: TopK, next_T: Tensor, teacher_head: OutputHead[Tensor] | None) -> Targets:
    logprobs_TK, log_tail_T = labels.buckets()
    device = next_T.device
    ids_TK = torch.from_numpy(labels.ids_TK.astype(np.int64)).to(device)
    return BucketTargets(
        next_T, ids_TK, torch.from_numpy(logprobs_TK).to(device), torch.from_numpy(log_tail_T).to(device)
    )


def _sampled(labels: Sampled, next_T: Tensor, teacher_head: OutputHead[Tensor] | None) -> Targets:
    # Most tokens draw far fewer different ids than N: the columns that nobody fills are left out.
    used = int((labels.counts_TN > 0).sum(-1).max(initial=1))
    device = next_T.device
    ids_TK = torch.from_numpy(labels.ids_TN[:, :used].astype(np.int64)).to(device)
    shares_TK = torch.from_numpy(labels.counts_TN[:, :used].astype(np.float32) / labels.draws).to(device)
    return SampledTargets(next_T, ids_TK, shares_TK, torch.from_numpy(labels.entropy_T.copy()).to(device))


def _hidden(labels: Hidden, next_T: Tensor, teacher_head: OutputHead[Tensor] | None) -> Targets:
    assert teacher_head is not None, "hidden labels need the teacher's head"
    return HiddenTargets(next_T, as_tensor(labels.hidden_TD).to(next_T.device), teacher_head)


def _dense(labels: Dense, next_T: Tensor, teacher_head: OutputHead[Tensor] | None) -> Targets:
    return FullTargets(next_T, as_tensor(labels.logits_TV).to(next_T.device))


_TARGETS: dict[type[Labels], Callable[[Any, Tensor, OutputHead[Tensor] | None], Targets]] = {
    TopK: _topk,
    Sampled: _sampled,
    Hidden: _hidden,
    Dense: _dense,
}


def targets_of(labels: Labels, next_T: Tensor, teacher_head: OutputHead[Tensor] | None) -> Targets:
    """The targets of a block's loss tokens, on the device of ``next_T``.

    Args:
        next_T: the corpus' next token at each loss token, int64.
        teacher_head: the teacher's head on the same device, for labels that are hidden states.
    """
    return _TARGETS[type(labels)](labels, next_T, teacher_head)
