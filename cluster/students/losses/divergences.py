"""How far the student's distribution is from the teacher's, and which way is closer: one function per divergence.

Each works on outcomes that exclude each other and together have mass 1 (all tokens, or the buckets of top-k labels).
With ``phi(p, q)`` the divergence is ``sum_v phi(p_v, q_v)``, and its gradient by the student's logits is
``slope_v - q_v * sum_u slope_u`` with ``slope_v = q_v dphi/dq_v``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cluster.spec import Divergence

# Per-outcome values of phi and the slopes, both shaped like the log-probabilities that they come from.
Terms = tuple[Tensor, Tensor]

# Adaptive KL's head: the likeliest tokens that hold this share of the teacher's mass (Wu et al., 2024, section 4).
HEAD_MASS = 0.5


def forward_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(p || q), Hinton et al. (2015)."""
    p = log_p.exp()
    return p * (log_p - log_q), -p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """KL(q || p), as in MiniLLM (Gu et al., 2024), over the teacher's contexts."""
    q, gap = log_q.exp(), log_q - log_p
    return q * gap, q * (gap + 1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jensen_shannon(log_p: Tensor, log_q: Tensor, mix: float) -> Terms:
    """``b KL(p || m) + (1 - b) KL(q || m)``, ``m = b p + (1 - b) q``, b = ``mix``: GKD (Agarwal et al., 2024)."""
    p, q, log_m = log_p.exp(), log_q.exp(), _log_mixture(log_p, log_q, mix)
    slope = (1 - mix) * q * (log_q - log_m)
    return mix * p * (log_p - log_m) + slope, slope


def skewed_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Terms:
    """``KL(p || a p + (1 - a) q)``, a = ``mix``: DistiLLM (Ko et al., 2024)."""
    p, log_m = log_p.exp(), _log_mixture(log_p, log_q, mix)
    return p * (log_p - log_m), -(1 - mix) * (log_p + log_q - log_m).exp()


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Terms:
    """``KL(q || a q + (1 - a) p)``, a = ``mix``: DistiLLM (Ko et al., 2024)."""
    q, log_m = log_q.exp(), _log_mixture(log_q, log_p, mix)
    gap = log_q - log_m
    return q * gap, q * (gap + 1 - mix * gap.exp())


def total_variation(log_p: Tensor, log_q: Tensor) -> Terms:
    """Half the sum of |p - q|."""
    p, q = log_p.exp(), log_q.exp()
    return 0.5 * (p - q).abs(), -0.5 * q * (p - q).sign()


def adaptive_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """Forward and reverse KL weighed per token by the gaps |p - q| in the teacher's head and tail (Wu et al., 2024).

    The weights count as constants. Where nothing differs they are one half each.
    """
    p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs()
    ranked, order = p.sort(-1, descending=True)
    # A token belongs to the head as long as those before it hold less than half of the mass.
    in_head = torch.zeros_like(p).scatter_(-1, order, (ranked.cumsum(-1) - ranked < HEAD_MASS).to(p.dtype))
    head, whole = (gap * in_head).sum(-1, keepdim=True), gap.sum(-1, keepdim=True)
    share = torch.where(whole > 0, head / whole.clamp_min(torch.finfo(p.dtype).tiny), 0.5)
    (forward, slope_f), (reverse, slope_r) = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
    return share * forward + (1 - share) * reverse, share * slope_f + (1 - share) * slope_r


_PLAIN: dict[Divergence, Callable[[Tensor, Tensor], Terms]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
}
_MIXED: dict[Divergence, Callable[[Tensor, Tensor, float], Terms]] = {
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}


def terms_of(divergence: Divergence, mix: float, log_p: Tensor, log_q: Tensor) -> Terms:
    """Values and slopes of a divergence by its name in the spec.

    Args:
        log_p, log_q: the teacher's and the student's log-probabilities over the last axis, finite.
    """
    if divergence in _PLAIN:
        return _PLAIN[divergence](log_p, log_q)
    return _MIXED[divergence](log_p, log_q, mix)
