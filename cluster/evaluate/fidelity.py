"""How close a student is to its teacher, exactly: full vocabulary, from both sides' hidden states and heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cluster.evaluate.figures import Fidelity


def fidelity_sums(
    student_TD: Tensor,
    student_head_VD: Tensor,
    teacher_TD: Tensor,
    teacher_head_VD: Tensor,
    next_T: Tensor,
    *,
    vocabulary: int,
    chunk: int = 64,
) -> Tensor:
    """Sums over tokens: KL, agreements, the student's and the teacher's cross-entropy, and the tokens (float64, [5]).

    Sums, so that ranks can add theirs before :func:`fidelity_of` divides.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=student_TD.device)
    for start in range(0, student_TD.shape[0], chunk):
        rows = slice(start, start + chunk)
        q_CV = (student_TD[rows] @ student_head_VD[:vocabulary].T).float()
        p_CV = (teacher_TD[rows] @ teacher_head_VD[:vocabulary].T).float()
        agreed = (p_CV.argmax(-1) == q_CV.argmax(-1)).sum()
        log_norm_q_C, log_norm_p_C = q_CV.logsumexp(-1), p_CV.logsumexp(-1)
        student_ce = (log_norm_q_C - q_CV.gather(1, next_T[rows, None])[:, 0]).sum(dtype=torch.float64)
        teacher_ce = (log_norm_p_C - p_CV.gather(1, next_T[rows, None])[:, 0]).sum(dtype=torch.float64)
        # KL = sum_v p_v (z_p - z_q)_v - log Z_p + log Z_q, with the difference of the logits made in place
        gap_CV = q_CV.neg_().add_(p_CV)
        mean_gap_C = p_CV.sub_(log_norm_p_C[:, None]).exp_().mul_(gap_CV).sum(-1)
        kl = (mean_gap_C - log_norm_p_C + log_norm_q_C).sum(dtype=torch.float64)
        tokens = torch.tensor(float(len(mean_gap_C)), dtype=torch.float64, device=sums.device)
        sums += torch.stack([kl, agreed.double(), student_ce, teacher_ce, tokens])
    return sums


def fidelity_of(sums: Tensor) -> Fidelity:
    """The means behind :func:`fidelity_sums`."""
    kl, agreed, student_ce, teacher_ce, tokens = sums.tolist()
    return Fidelity(
        kl=kl / tokens,
        agreement=agreed / tokens,
        student_perplexity=math.exp(min(student_ce / tokens, 700.0)),
        teacher_perplexity=math.exp(min(teacher_ce / tokens, 700.0)),
        tokens=int(tokens),
    )
