"""How far the gradient of a label kind points away from the exact one, estimated on few tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cluster.heads import OutputHead
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import Targets, Tile, softmax

# Tokens that an estimate uses at most: their gradients by the logits are held whole.
MOST_TOKENS = 128


def angle_sums(
    hidden_TD: Tensor,
    head: OutputHead[Tensor],
    *,
    target: Targets,
    exact: Targets,
    objective: Objective,
    vocabulary: int,
) -> Tensor:
    """Dot product of two gradients by the head's weight, and their squared norms (float64, [3]).

    The gradient by the head's weight is ``sum_t delta_t hidden_t``, with ``delta_t`` the soft loss' gradient by the
    head's product. So the products of two such matrices come from two small Gram matrices, and neither matrix is made.
    It is one part of the whole gradient, and few tokens: what draws add is noise, which falls with the root of their
    number, while what top-k leaves out stays. ``benchmarks/fidelity.py`` measures this angle and the whole one.

    Args:
        hidden_TD, head: the student's last hidden states at the loss tokens, and its head.
        target, exact: labels of the same tokens in the kind in use, and over the whole vocabulary.
    """
    rows = slice(0, MOST_TOKENS)
    hidden_TD, soft_only = hidden_TD[rows], replace(objective, hard=0.0, soft=1.0)
    head = head.cut(vocabulary)
    logits_TV = head.logits(hidden_TD).float()
    z_TV = logits_TV / objective.temperature
    deltas = []
    for each in (target, exact):
        grad_TV = each.chunk(rows).soft(Tile(z_TV, *softmax(z_TV)), soft_only, 0.0).grad_CV
        assert grad_TV is not None
        deltas.append(head.product_gradient(grad_TV, logits_TV))
    gram_TT = (hidden_TD.float() @ hidden_TD.float().T).double()
    own, whole = deltas
    pairs = ((own, whole), (own, own), (whole, whole))
    return torch.stack([((a @ b.T).double() * gram_TT).sum() for a, b in pairs])
