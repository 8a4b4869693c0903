"""The figures by which a student is judged. No torch, so that a driver and a report can hold them."""

from __future__ import annotations

from dataclasses import dataclass


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
