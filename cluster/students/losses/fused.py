"""The distillation loss fused with the student's head: loss and gradient in one sweep over chunks of tokens.

The student's ``[tokens, vocabulary]`` logits exist for one chunk at a time and are not kept for the backward pass;
their gradient is computed while they are there (the idea of Liger's fused linear cross-entropy, Hsu et al., 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cluster.heads import OutputHead
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import Targets, Tile, TileTargets, softmax

# Floats of a tile of logits on a CPU: small enough for its caches, large enough to hide the cost of a call.
TILE_FLOATS = 1 << 19
# Rows of the head whose gradient is added at a time: on a CPU few enough for its caches.
PRODUCT_ROWS = {"cpu": 1024, "cuda": 16384}


def _tile_sweep(
    z_CV: Tensor, target: TileTargets, objective: Objective, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums of divergence, KL and cross-entropy of one tile (float64, [3]), and the loss' gradient by its logits."""
    hard, temperature = objective.hard, objective.temperature
    q_CV, log_norm_C = softmax(z_CV)
    ce_C = log_norm_C - z_CV.gather(1, target.next_T[:, None])[:, 0]
    if temperature == 1.0:
        soft = target.soft(Tile(z_CV, q_CV, log_norm_C), objective, hard if with_gradient else None)
    else:
        scaled_CV = z_CV / temperature
        soft = target.soft(Tile(scaled_CV, *softmax(scaled_CV)), objective, 0.0 if with_gradient else None)
    sums = torch.stack([column_C.sum(dtype=torch.float64) for column_C in (soft.divergence_C, soft.kl_C, ce_C)])
    grad_CV = soft.grad_CV
    if grad_CV is None or not hard:
        return sums, grad_CV
    if temperature != 1.0:
        grad_CV.add_(q_CV, alpha=hard)
    return sums, grad_CV.scatter_add_(1, target.next_T[:, None], grad_CV.new_full((len(grad_CV), 1), -hard))


def _chunk_sweep(
    product_CV: Tensor, head: OutputHead[Tensor], target: TileTargets, objective: Objective, with_gradient: bool
) -> Tensor:
    """Sums over one chunk, see :func:`_tile_sweep`; the head's product is overwritten by its gradient.

    On a CPU it works through small tiles: their float32 columns then stay in the processor's cache, which is worth
    more than the arithmetic.
    """
    tokens, vocabulary = product_CV.shape
    wide = torch.promote_types(product_CV.dtype, torch.float32)
    sums = torch.zeros(3, dtype=torch.float64, device=product_CV.device)
    tile = max(1, TILE_FLOATS // vocabulary) if product_CV.device.type == "cpu" else max(1, tokens)
    for start in range(0, tokens, tile):
        rows = slice(start, start + tile)
        logits_CV = head.finish(product_CV[rows].to(wide))
        tile_sums, grad_CV = _tile_sweep(logits_CV, target.rows(rows), objective, with_gradient)
        sums += tile_sums
        if grad_CV is not None:
            product_CV[rows] = head.product_gradient(grad_CV, logits_CV)
    return sums


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        whole: OutputHead[Tensor],
        target: Targets,
        objective: Objective,
        vocabulary: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        needed = any(ctx.needs_input_grad)
        head = whole.cut(vocabulary)
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        if needed:
            ctx.grad_hidden_TD = torch.empty_like(hidden_TD)
            ctx.grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
            ctx.grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        sums = hidden_TD.new_zeros(3, dtype=torch.float64)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            h_CD = hidden_TD[rows]
            product_CV = head.product(h_CD)
            sums += _chunk_sweep(product_CV, head, target.chunk(rows), objective, needed)
            if needed:
                torch.mm(product_CV, head.weight_VD, out=ctx.grad_hidden_TD[rows])
                _add_product(ctx.grad_weight_VD[:vocabulary], product_CV, h_CD)
                if ctx.grad_bias_V is not None:
                    ctx.grad_bias_V[:vocabulary] += product_CV.sum(0, dtype=wide)
        divergence, _, ce = sums
        ctx.mark_non_differentiable(sums)
        ctx.weight_dtype = weight_VD.dtype
        return (objective.hard * ce + objective.soft * objective.temperature**2 * divergence).to(wide), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        # In place: the gradients were made in forward, belong to this node alone, and are used once.
        grad_hidden_TD = ctx.grad_hidden_TD.mul_(grad_loss.to(ctx.grad_hidden_TD.dtype))
        grad_weight_VD = ctx.grad_weight_VD.mul_(grad_loss).to(ctx.weight_dtype)
        grad_bias_V = None if ctx.grad_bias_V is None else ctx.grad_bias_V.mul_(grad_loss).to(ctx.weight_dtype)
        del ctx.grad_hidden_TD, ctx.grad_weight_VD, ctx.grad_bias_V
        return grad_hidden_TD, grad_weight_VD, grad_bias_V, None, None, None, None, None


def _add_product(into_VD: Tensor, logits_CV: Tensor, h_CD: Tensor) -> None:
    """``into_VD += logits_CV.T @ h_CD``; in blocks where two precisions meet.

    A sum of two precisions is made through a copy, which for the whole weight would cost more time than the product
    and more memory than all else here.
    """
    if into_VD.dtype == h_CD.dtype:
        into_VD.addmm_(logits_CV.T, h_CD)
        return
    step = PRODUCT_ROWS[into_VD.device.type]
    for start in range(0, len(into_VD), step):
        rows = slice(start, start + step)
        into_VD[rows] += logits_CV[:, rows].T @ h_CD


def distillation_loss(
    hidden_TD: Tensor,
    head: OutputHead[Tensor],
    target: Targets,
    objective: Objective,
    *,
    vocabulary: int,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """``sum_t hard * CE_t + soft * T^2 * D_t`` over loss tokens, from hidden states and the head.

    The temperature-squared factor keeps the soft gradient's size independent of T (Hinton et al., 2015, section 2).

    Args:
        hidden_TD: the student's last hidden states at the loss tokens.
        head: of the student; rows past ``vocabulary`` are padding and get no gradient.
        target: labels of the same tokens, in the same order.
        chunk: tokens whose logits exist at a time.

    Returns:
        The loss (a sum, float32 or wider, differentiable), and the sums of the divergence, the forward KL and the
        cross-entropy (float64, [3], nats, for reporting only).
    """
    # The parameters are passed beside the head because autograd sees arguments only.
    parameters = (hidden_TD, head.weight_VD, head.bias_V)
    out: tuple[Tensor, Tensor] = _FusedHeadLoss.apply(*parameters, head, target, objective, vocabulary, chunk)
    return out
