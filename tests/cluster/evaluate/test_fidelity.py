"""Fidelity against the plain float64 formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.evaluate.fidelity import fidelity_of, fidelity_sums
from cluster.evaluate.figures import Fidelity

TOKENS, VOCABULARY, PADDED = 70, 40, 48


def side(seed: int, width: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Hidden states, and a head whose padding would win every argmax."""
    generator = torch.Generator().manual_seed(seed)
    head_VD = scale * torch.randn(PADDED, width, generator=generator)
    head_VD[VOCABULARY:] *= 100
    return torch.randn(TOKENS, width, generator=generator), head_VD


STUDENT, TEACHER = side(1, 12), side(2, 20, 2.0)
NEXT_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))


def sums(student: tuple[Tensor, Tensor] = STUDENT, rows: slice = slice(None), chunk: int = 64) -> Tensor:
    arguments = (student[0][rows], student[1], TEACHER[0][rows], TEACHER[1], NEXT_T[rows])
    return fidelity_sums(*arguments, vocabulary=VOCABULARY, chunk=chunk)


def plain() -> Fidelity:
    q, p = ((h.double() @ w[:VOCABULARY].double().T).log_softmax(-1) for h, w in (STUDENT, TEACHER))
    return Fidelity(
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        student_perplexity=math.exp(F.nll_loss(q, NEXT_T)),
        teacher_perplexity=math.exp(F.nll_loss(p, NEXT_T)),
        tokens=TOKENS,
    )


def same(one: Fidelity, other: Fidelity, rel: float = 1e-5) -> bool:
    return bool(vars(one) == pytest.approx(vars(other), rel=rel))


def test_fidelity_is_that_of_the_plain_formula() -> None:
    assert same(fidelity_of(sums()), plain())
    assert 0 < plain().agreement < 1


def test_a_student_that_is_the_teacher_is_faithful() -> None:
    found = fidelity_of(sums(TEACHER))
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.agreement == 1
    assert found.student_perplexity == found.teacher_perplexity


@pytest.mark.parametrize("shift", [5.0, -80.0])
def test_a_constant_added_to_all_logits_changes_nothing(shift: float) -> None:
    ones = torch.ones(TOKENS, 1)
    shifted = (torch.cat([TEACHER[0], ones], 1), torch.cat([TEACHER[1], torch.full((PADDED, 1), shift)], 1))
    found = fidelity_of(sums(shifted))
    assert found.kl == pytest.approx(0, abs=1e-4)
    assert found.agreement == 1


def test_the_sums_of_ranks_add_up_to_those_of_the_whole() -> None:
    parts = sums(rows=slice(0, 13)) + sums(rows=slice(13, 14)) + sums(rows=slice(14, TOKENS))
    torch.testing.assert_close(parts, sums(), rtol=1e-6, atol=0)
    assert parts.dtype == torch.float64
    assert parts[-1] == TOKENS


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
def test_the_chunk_size_does_not_show(chunk: int) -> None:
    torch.testing.assert_close(sums(chunk=chunk), sums(), rtol=1e-6, atol=0)


def test_bfloat16_sides_are_measured_in_float32() -> None:
    student = (STUDENT[0].bfloat16(), STUDENT[1].bfloat16())
    assert same(fidelity_of(sums(student)), plain(), rel=0.03)


def test_a_hopeless_student_has_a_finite_perplexity() -> None:
    hopeless = (torch.ones(TOKENS, 1), torch.where(torch.arange(PADDED) == 0, 1e4, 0.0)[:, None])
    found = fidelity_of(sums(hopeless))
    assert all(math.isfinite(value) for value in vars(found).values())
