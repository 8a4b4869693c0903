"""The distillation loss fused with the student's head: loss and gradient in one sweep over chunks of tokens.

The student's ``[tokens, vocabulary]`` logits exist for one chunk at a time and are not kept for the backward pass;
their gradient is computed while they are there (the idea of Liger's fused linear cross-entropy, Hsu et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens whose float32 columns are worked on at a time on a CPU.
TILE = 32


@dataclass(frozen=True)
class TopKTargets:
    """Labels of the loss tokens, as tensors on the student's device.

    Attributes:
        next_T: the corpus' own next token, int64.
        ids_TK: the teacher's likeliest tokens, int64.
        logprobs_TK: their log-probabilities at temperature T, float32 nats.
        log_tail_T: log of the mass outside the K, float32 nats.
    """

    next_T: Tensor
    ids_TK: Tensor
    logprobs_TK: Tensor
    log_tail_T: Tensor

    def rows(self, rows: slice) -> TopKTargets:
        """The labels of some of the tokens, as views."""
        return TopKTargets(self.next_T[rows], self.ids_TK[rows], self.logprobs_TK[rows], self.log_tail_T[rows])


def _soft_terms(z_CV: Tensor, target: TopKTargets, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL over K + 1 buckets of some tokens, and what its gradient is made of.

    With buckets ``k`` and the tail ``r`` (all tokens outside the K):
    ``KL = sum_k p_k (log p_k - log q_k) + p_r (log p_r - log q_r)``, whose gradient by the scaled logit ``j`` is
    ``q_j - p_j`` inside the K and ``q_j (1 - p_r / q_r)`` outside.

    Returns:
        kl_C; q_CV with the columns of the K set to zero; the scale of the other columns' gradient, rest_C; and the
        gradient of the K columns, inside_CK.
    """
    scaled_CV = z_CV if temperature == 1.0 else z_CV / temperature
    peak_C1 = scaled_CV.amax(-1, keepdim=True)
    top_CK = scaled_CV.gather(1, target.ids_TK) - peak_C1
    q_CV = (scaled_CV - peak_C1).exp_().scatter_(1, target.ids_TK, 0.0)
    # The tail is summed over its own tokens: one minus the kept mass would drown in rounding when it is small.
    tail_C = q_CV.sum(-1)
    total_C = top_CK.exp().sum(-1) + tail_C
    log_total_C = total_C.log()
    log_q_CK = top_CK - log_total_C[:, None]
    tiny = torch.finfo(tail_C.dtype).tiny
    log_q_tail_C = (tail_C / total_C).clamp_min(tiny).log()
    p_CK, p_tail_C = target.logprobs_TK.exp(), target.log_tail_T.exp()
    kl_C = (p_CK * (target.logprobs_TK - log_q_CK)).sum(-1) + p_tail_C * (target.log_tail_T - log_q_tail_C)
    q_CV.div_(total_C[:, None])
    rest_C = 1.0 - (target.log_tail_T - log_q_tail_C).exp()
    return kl_C, q_CV, rest_C, log_q_CK.exp() - p_CK


def _tile_loss(
    z_CV: Tensor, target: TopKTargets, hard: float, soft: float, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL and cross-entropy per token of one tile, and the gradient of their weighted sum by its logits."""
    log_norm_C = z_CV.logsumexp(-1)
    ce_C = log_norm_C - z_CV.gather(1, target.next_T[:, None])[:, 0]
    kl_C, q_CV, rest_C, inside_CK = _soft_terms(z_CV, target, temperature)
    if not with_gradient:
        return kl_C, ce_C, None
    # d(T^2 KL)/dz = T^2 * (1/T) * dKL/d(z/T)
    scale = soft * temperature
    grad_CV = q_CV.mul_((scale * rest_C)[:, None]).scatter_(1, target.ids_TK, scale * inside_CK)
    if hard:
        grad_CV += (z_CV - log_norm_C[:, None]).exp_().mul_(hard)
        grad_CV.scatter_add_(1, target.next_T[:, None], grad_CV.new_full((grad_CV.shape[0], 1), -hard))
    return kl_C, ce_C, grad_CV


def _chunk_sweep(
    logits_CV: Tensor, target: TopKTargets, weights: tuple[float, float, float], with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy of one chunk as float64 sums; its logits are overwritten by their gradient.

    Works through ``TILE`` tokens at a time: a tile's float32 columns then stay in the processor's cache, which on a
    CPU is worth more than the arithmetic.
    """
    hard, soft, temperature = weights
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    sums = torch.zeros(2, dtype=torch.float64, device=logits_CV.device)
    tile = TILE if logits_CV.device.type == "cpu" else logits_CV.shape[0]
    for start in range(0, logits_CV.shape[0], tile):
        rows = slice(start, start + tile)
        kl, ce, grad_CV = _tile_loss(
            logits_CV[rows].to(wide), target.rows(rows), hard, soft, temperature, with_gradient
        )
        sums += torch.stack([kl.sum(dtype=torch.float64), ce.sum(dtype=torch.float64)])
        if grad_CV is not None:
            logits_CV[rows] = grad_CV
    return sums[0], sums[1]


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target: TopKTargets,
        vocabulary: int,
        weights: tuple[float, float, float],
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hard, soft, temperature = weights
        needed = hidden_TD.requires_grad or weight_VD.requires_grad
        head_VD = weight_VD[:vocabulary]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        if needed:
            ctx.grad_hidden_TD = torch.empty_like(hidden_TD)
            ctx.grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        kl, ce = hidden_TD.new_zeros((), dtype=torch.float64), hidden_TD.new_zeros((), dtype=torch.float64)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            h_CD = hidden_TD[rows]
            logits_CV = h_CD @ head_VD.T
            chunk_kl, chunk_ce = _chunk_sweep(logits_CV, target.rows(rows), weights, needed)
            kl += chunk_kl
            ce += chunk_ce
            if needed:
                ctx.grad_hidden_TD[rows] = logits_CV @ head_VD
                ctx.grad_weight_VD[:vocabulary] += logits_CV.T @ h_CD
        ctx.mark_non_differentiable(kl, ce)
        ctx.weight_dtype = weight_VD.dtype
        return (hard * ce + soft * temperature**2 * kl).to(wide), kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        # In place: the gradients were made in forward, belong to this node alone, and are used once.
        grad_hidden_TD = ctx.grad_hidden_TD.mul_(grad_loss.to(ctx.grad_hidden_TD.dtype))
        grad_weight_VD = ctx.grad_weight_VD.mul_(grad_loss).to(ctx.weight_dtype)
        del ctx.grad_hidden_TD, ctx.grad_weight_VD
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


def distillation_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target: TopKTargets,
    *,
    vocabulary: int,
    hard: float,
    soft: float,
    temperature: float,
    chunk: int = 512,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_t hard * CE_t + soft * T^2 * KL_t`` over loss tokens, from hidden states and the head's weight.

    The temperature-squared factor keeps the soft gradient's size independent of T (Hinton et al., 2015, section 2).

    Args:
        hidden_TD: the student's last hidden states at the loss tokens.
        weight_VD: the head's weight; rows past ``vocabulary`` are padding and get no gradient.
        target: labels of the same tokens, in the same order.
        temperature: the T that the labels were made at.
        chunk: tokens whose logits exist at a time.

    Returns:
        The loss (a sum, float32 or wider, differentiable), the KL summed over K + 1 buckets and the cross-entropy
        summed (float64, nats, for reporting only).
    """
    out: tuple[Tensor, Tensor, Tensor] = _FusedHeadLoss.apply(
        hidden_TD, weight_VD, target, vocabulary, (hard, soft, temperature), chunk
    )
    return out
