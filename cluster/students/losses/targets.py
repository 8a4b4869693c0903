"""The teacher's labels as the loss sees them: one class per way of being exact, all with the same face.

A target turns a tile of the student's float32 logits into the divergence from the teacher and its gradient. The
fused head (:mod:`cluster.students.losses.fused`) and the training loop never ask which one they hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from cluster.heads import OutputHead
from cluster.students.losses.divergences import terms_of
from cluster.students.losses.objective import Objective

# A log-probability that is 0 for all purposes, and whose product with 0 is 0, not NaN.
LOGPROB_FLOOR = -1e4


@dataclass(frozen=True)
class Soft:
    """What a target says of a tile.

    Attributes:
        divergence_C: D per token, nats (total variation: a probability).
        kl_C: forward KL per token, nats, whatever D is.
        grad_CV: gradient of ``soft * T^2 * D + hard * sum(q)`` by the student's scaled logits, if asked for.
    """

    divergence_C: Tensor
    kl_C: Tensor
    grad_CV: Tensor | None


@dataclass(frozen=True)
class Tile:
    """The student's scaled logits z / T of some tokens, with their softmax and its log-normaliser.

    Attributes:
        q_CV: belongs to the target, which may overwrite it.
    """

    z_CV: Tensor
    q_CV: Tensor
    log_norm_C: Tensor


@dataclass(frozen=True)
class Targets(ABC):
    """Labels of some loss tokens as tensors on the student's device.

    Attributes:
        next_T: the corpus' own next token, int64.
    """

    next_T: Tensor

    @abstractmethod
    def chunk(self, rows: slice) -> TileTargets:
        """The labels of the tokens whose logits are made next; what costs a matrix product is made here."""


@dataclass(frozen=True)
class TileTargets(Targets):
    """Targets that can be held against logits. Every field has a row per loss token."""

    def rows(self, rows: slice) -> Self:
        """The labels of some of the tokens, as views."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def chunk(self, rows: slice) -> Self:
        """See :meth:`Targets.chunk`."""
        return self.rows(rows)

    @abstractmethod
    def soft(self, tile: Tile, objective: Objective, hard: float | None) -> Soft:
        """Divergence from the teacher; its gradient too unless ``hard`` is None.

        Args:
            hard: added to the gradient as ``hard * q``, which at T = 1 saves the cross-entropy a pass of its own.
        """


@dataclass(frozen=True)
class BucketTargets(TileTargets):
    """Top-k labels: K tokens and the tail are K + 1 outcomes, and the divergence is exact over these.

    Attributes:
        ids_TK: the K tokens, int64.
        logprobs_TK, log_tail_T: float32 nats; the K + 1 masses are 1 together.
    """

    ids_TK: Tensor
    logprobs_TK: Tensor
    log_tail_T: Tensor

    def soft(self, tile: Tile, objective: Objective, hard: float | None) -> Soft:
        """See :meth:`TileTargets.soft`. Inside the K the gradient is each token's own; the tail shares one slope."""
        q_CV = tile.q_CV
        log_q_CK = tile.z_CV.gather(1, self.ids_TK) - tile.log_norm_C[:, None]
        # The tail is summed over its own tokens: one minus the kept mass would drown in rounding when it is small.
        tail_C = q_CV.scatter_(1, self.ids_TK, 0.0).sum(-1).clamp_min_(torch.finfo(q_CV.dtype).tiny)
        log_p = torch.cat([self.logprobs_TK, self.log_tail_T[:, None]], -1).to(q_CV.dtype)
        log_q = torch.cat([log_q_CK, tail_C.log()[:, None]], -1)
        value, slope = terms_of(objective.divergence, objective.mix, log_p, log_q)
        kl_C = value.sum(-1) if objective.divergence == "forward_kl" else (log_p.exp() * (log_p - log_q)).sum(-1)
        if hard is None:
            return Soft(value.sum(-1), kl_C, None)
        scale, q_CK, slope_sum_C1 = objective.soft * objective.temperature, log_q_CK.exp(), slope.sum(-1, keepdim=True)
        rest_C1 = slope[:, -1:] / tail_C[:, None] - slope_sum_C1
        inside_CK = slope[:, :-1] - q_CK * slope_sum_C1
        q_CV.mul_(scale * rest_C1 + hard).scatter_(1, self.ids_TK, scale * inside_CK + hard * q_CK)
        return Soft(value.sum(-1), kl_C, q_CV)


@dataclass(frozen=True)
class SampledTargets(TileTargets):
    """Systematic draws: shares of the draws are unbiased for p, and the forward KL is linear in p.

    Attributes:
        ids_TK: the ids that were drawn, int64, at most K different ones; filled up with any.
        shares_TK: count / N, float32; 0 where filled up.
        entropy_T: H(p), float32 nats.
    """

    ids_TK: Tensor
    shares_TK: Tensor
    entropy_T: Tensor

    def soft(self, tile: Tile, objective: Objective, hard: float | None) -> Soft:
        """See :meth:`TileTargets.soft`. ``KL = -sum_v p_v log q_v - H(p)``, whose gradient is ``q - p``."""
        assert objective.divergence == "forward_kl", "the spec allows no other divergence with draws"
        shares_CK = self.shares_TK.to(tile.q_CV.dtype)
        log_q_CK = tile.z_CV.gather(1, self.ids_TK) - tile.log_norm_C[:, None]
        kl_C = -(shares_CK * log_q_CK).sum(-1) - self.entropy_T
        if hard is None:
            return Soft(kl_C, kl_C, None)
        scale = objective.soft * objective.temperature
        grad_CV = tile.q_CV if scale + hard == 1.0 else tile.q_CV.mul_(scale + hard)
        return Soft(kl_C, kl_C, grad_CV.scatter_add_(1, self.ids_TK, -scale * shares_CK))


@dataclass(frozen=True)
class FullTargets(TileTargets):
    """Dense labels: the teacher's logits over the whole vocabulary. Every divergence is exact.

    Attributes:
        logits_TV: the teacher's, in the precision it computed.
    """

    logits_TV: Tensor

    def soft(self, tile: Tile, objective: Objective, hard: float | None) -> Soft:
        """See :meth:`TileTargets.soft`."""
        logits_CV = self.logits_TV.to(tile.z_CV.dtype)
        if objective.temperature != 1.0:
            logits_CV = logits_CV / objective.temperature
        if objective.divergence == "forward_kl":
            return self._forward_kl(tile, logits_CV, objective, hard)
        log_p_CV = logits_CV.log_softmax(-1).clamp_min_(LOGPROB_FLOOR)
        log_q_CV = tile.z_CV - tile.log_norm_C[:, None]
        value_CV, slope_CV = terms_of(objective.divergence, objective.mix, log_p_CV, log_q_CV)
        kl_C = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1)
        if hard is None:
            return Soft(value_CV.sum(-1), kl_C, None)
        scale = objective.soft * objective.temperature
        slope_sum_C1 = slope_CV.sum(-1, keepdim=True)
        return Soft(value_CV.sum(-1), kl_C, tile.q_CV.mul_(hard - scale * slope_sum_C1).add_(slope_CV, alpha=scale))

    def _forward_kl(self, tile: Tile, logits_CV: Tensor, objective: Objective, hard: float | None) -> Soft:
        """The common case in few passes: ``KL = sum_v p_v (y - z)_v - log Z_p + log Z_q``, gradient ``q - p``."""
        p_CV, log_norm_p_C = softmax(logits_CV)
        # The difference is floored where the teacher excludes a token: 0 * inf would be NaN.
        gap_CV = (logits_CV - tile.z_CV).clamp_min_(LOGPROB_FLOOR)
        kl_C = gap_CV.mul_(p_CV).sum(-1) - log_norm_p_C + tile.log_norm_C
        if hard is None:
            return Soft(kl_C, kl_C, None)
        scale = objective.soft * objective.temperature
        return Soft(kl_C, kl_C, tile.q_CV.mul_(scale + hard).sub_(p_CV, alpha=scale))


@dataclass(frozen=True)
class HiddenTargets(Targets):
    """Hidden labels: with the teacher's head they are its logits, made for one chunk of tokens at a time.

    Attributes:
        hidden_TD: the teacher's last hidden states.
        teacher_head: its head, cut to the vocabulary.
    """

    hidden_TD: Tensor
    teacher_head: OutputHead[Tensor]

    def chunk(self, rows: slice) -> FullTargets:
        """See :meth:`Targets.chunk`."""
        return FullTargets(self.next_T[rows], self.logits(rows))

    def logits(self, rows: slice) -> Tensor:
        """The teacher's logits of some of the tokens."""
        return self.teacher_head.logits(self.hidden_TD[rows])


def softmax(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-normaliser of each row."""
    q_CV = torch.softmax(z_CV, -1)
    # The likeliest token's probability is never 0, so its logarithm gives the normaliser without another pass.
    return q_CV, z_CV.amax(-1) - q_CV.amax(-1).log()
