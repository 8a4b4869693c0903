"""How close a student is to its teacher, exactly: full vocabulary, from both sides' hidden states and heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """Means over held-out loss tokens.

    Attributes:
        kl: KL(teacher || student) in nats, over the whole vocabulary at T = 1.
        agreement: share of tokens where both find the same token likeliest.
        student_perplexity, teacher_perplexity: exp of the mean cross-entropy with the text.
        tokens: loss tokens measured.
    """

    kl: float
    agreement: float
    student_perplexity: float
    teacher_perplexity: float
    tokens: int


def fidelity_sums(
    student_TD: Tensor,
    student_head_VD: Tensor,
    teacher_TD: Tensor,
    teacher_head_VD: Tensor,
    next_T: Tensor,
    *,
    vocabulary: int,
    chunk: int = 512,
) -> Tensor:
    """Sums over tokens: KL, agreements, the student's and the teacher's cross-entropy, and the tokens (float64, [5]).

    Sums, so that ranks can add theirs before :func:`fidelity_of` divides.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=student_TD.device)
    for start in range(0, student_TD.shape[0], chunk):
        rows = slice(start, start + chunk)
        q_CV = (student_TD[rows] @ student_head_VD[:vocabulary].T).float().log_softmax(-1)
        p_CV = (teacher_TD[rows] @ teacher_head_VD[:vocabulary].T).float().log_softmax(-1)
        picked_C1 = next_T[rows, None]
        sums += torch.stack(
            [
                (p_CV.exp() * (p_CV - q_CV)).sum(dtype=torch.float64),
                (p_CV.argmax(-1) == q_CV.argmax(-1)).sum().double(),
                -q_CV.gather(1, picked_C1).sum(dtype=torch.float64),
                -p_CV.gather(1, picked_C1).sum(dtype=torch.float64),
                torch.tensor(float(len(q_CV)), dtype=torch.float64, device=sums.device),
            ]
        )
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
