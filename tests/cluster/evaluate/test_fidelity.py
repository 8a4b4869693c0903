"""Fidelity against the plain float64 formula."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.evaluate.fidelity import CALIBRATION_BINS, FIDELITY_SUMS, fidelity_of, fidelity_sums
from cluster.evaluate.figures import Fidelity
from cluster.heads import OutputHead

TOKENS, VOCABULARY, PADDED = 70, 40, 48


def side(seed: int, width: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Hidden states, and a head whose padding would win every argmax."""
    generator = torch.Generator().manual_seed(seed)
    head_VD = scale * torch.randn(PADDED, width, generator=generator)
    head_VD[VOCABULARY:] *= 100
    return torch.randn(TOKENS, width, generator=generator), head_VD


STUDENT, TEACHER = side(1, 12), side(2, 20, 2.0)
NEXT_T = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))


BLOCK_T = torch.arange(TOKENS) % 7 * 5


def sums(student: tuple[Tensor, Tensor] = STUDENT, rows: slice = slice(None), chunk: int = 64) -> Tensor:
    return fidelity_sums(
        student[0][rows],
        OutputHead(student[1]),
        teacher_logits=lambda part: TEACHER[0][rows][part] @ TEACHER[1][:VOCABULARY].T,
        next_T=NEXT_T[rows],
        vocabulary=VOCABULARY,
        block_T=BLOCK_T[rows],
        chunk=chunk,
    )


def plain_calibration(log_p_TV: Tensor) -> float:
    """Guo et al. (2017), token by token."""
    bins: list[list[float]] = [[] for _ in range(CALIBRATION_BINS)]
    for log_p_V, following in zip(log_p_TV, NEXT_T, strict=True):
        confidence = float(log_p_V.max().exp())
        hit = float(log_p_V.argmax() == following)
        bins[min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)].append(hit - confidence)
    return sum(abs(sum(gaps)) for gaps in bins) / len(NEXT_T)


def plain() -> Fidelity:
    q, p = ((h.double() @ w[:VOCABULARY].double().T).log_softmax(-1) for h, w in (STUDENT, TEACHER))
    return Fidelity(
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        student_perplexity=math.exp(F.nll_loss(q, NEXT_T)),
        teacher_perplexity=math.exp(F.nll_loss(p, NEXT_T)),
        calibration_error=plain_calibration(q),
        teacher_calibration_error=plain_calibration(p),
        tokens=TOKENS,
    )


def same(one: Fidelity, other: Fidelity, rel: float = 1e-5) -> bool:
    figures = ({k: v for k, v in vars(each).items() if k != "blocks"} for each in (one, other))
    return bool(next(figures) == pytest.approx(next(figures), rel=rel))


def test_fidelity_is_that_of_the_plain_formula() -> None:
    assert same(fidelity_of(sums()), plain())
    assert 0 < plain().agreement < 1


def test_the_blocks_are_the_sums_of_their_tokens_in_order() -> None:
    q, p = ((h.double() @ w[:VOCABULARY].double().T).log_softmax(-1) for h, w in (STUDENT, TEACHER))
    kl_T, agreed_T = (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()
    columns_4T = torch.stack([torch.ones(TOKENS).double(), kl_T, agreed_T, F.nll_loss(q, NEXT_T, reduction="none")])
    plainly = [columns_4T[:, block == BLOCK_T].sum(1) for block in sorted(set(BLOCK_T.tolist()))]
    found = fidelity_of(sums())
    torch.testing.assert_close(torch.tensor(found.blocks), torch.stack(plainly).float(), rtol=1e-5, atol=1e-6)
    # As a commit keeps them.
    assert Fidelity(**json.loads(json.dumps(asdict(found)))) == found


def test_a_student_that_is_the_teacher_is_faithful() -> None:
    found = fidelity_of(sums(TEACHER))
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.agreement == 1
    assert found.student_perplexity == found.teacher_perplexity
    assert found.calibration_error == found.teacher_calibration_error > 0


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
    assert parts.shape == (FIDELITY_SUMS,)
    assert fidelity_of(parts).tokens == TOKENS


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
def test_the_chunk_size_does_not_show(chunk: int) -> None:
    torch.testing.assert_close(sums(chunk=chunk), sums(), rtol=1e-6, atol=0)


def test_bfloat16_sides_are_measured_in_float32() -> None:
    student = (STUDENT[0].bfloat16(), STUDENT[1].bfloat16())
    assert same(fidelity_of(sums(student)), plain(), rel=0.03)


def test_a_hopeless_student_has_a_finite_perplexity() -> None:
    hopeless = (torch.ones(TOKENS, 1), torch.where(torch.arange(PADDED) == 0, 1e4, 0.0)[:, None])
    found = fidelity_of(sums(hopeless))
    assert all(math.isfinite(value) for name, value in vars(found).items() if name != "blocks")


def test_the_teacher_s_logits_are_asked_for_a_chunk_at_a_time_and_are_left_alone() -> None:
    teacher_TV = (TEACHER[0] @ TEACHER[1].T)[:, :VOCABULARY].contiguous()
    before, asked = teacher_TV.clone(), []

    def teacher_logits(rows: slice) -> Tensor:
        asked.append(len(range(TOKENS)[rows]))
        return teacher_TV[rows].clone()

    fidelity_sums(
        STUDENT[0],
        OutputHead(STUDENT[1]),
        teacher_logits=teacher_logits,
        next_T=NEXT_T,
        vocabulary=VOCABULARY,
        chunk=32,
    )
    assert asked == [32, 32, 6]
    assert torch.equal(teacher_TV, before)


def judged(student_TV: Tensor, teacher_TV: Tensor, next_T: Tensor) -> Fidelity:
    """Fidelity of logits that are given as they are."""
    vocabulary = student_TV.shape[1]
    head_VD = torch.eye(vocabulary)
    return fidelity_of(
        fidelity_sums(
            student_TV,
            OutputHead(head_VD),
            teacher_logits=lambda rows: teacher_TV[rows].clone(),
            next_T=next_T,
            vocabulary=vocabulary,
            chunk=7,
        )
    )


def test_a_side_that_is_right_as_often_as_it_is_sure_is_calibrated_and_one_that_is_sure_and_wrong_is_not() -> None:
    # 20 tokens: half of them 0.8 sure and right 8 times of 10, half 0.5 sure and right 5 times of 10.
    calibrated_TV = torch.tensor([[0.8, 0.1, 0.1]] * 10 + [[0.3, 0.5, 0.2]] * 10).log()
    next_T = torch.tensor([0] * 8 + [1] * 2 + [1] * 5 + [0] * 3 + [2] * 2)
    wrong_TV = 200.0 * torch.nn.functional.one_hot((next_T + 1) % 3, 3).float()
    found = judged(wrong_TV, calibrated_TV, next_T)
    assert found.teacher_calibration_error == pytest.approx(0, abs=1e-6)
    assert found.calibration_error == pytest.approx(1, abs=1e-6)
    turned = judged(calibrated_TV, wrong_TV, next_T)
    assert turned.calibration_error == found.teacher_calibration_error
    assert turned.teacher_calibration_error == found.calibration_error


def test_gaps_of_one_bin_cancel_and_gaps_of_two_bins_do_not() -> None:
    next_T = torch.tensor([0, 1])
    one_bin_TV = torch.tensor([[0.5, 0.3, 0.2]] * 2).log()
    two_bins_TV = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2]]).log()
    found = judged(one_bin_TV, two_bins_TV, next_T)
    assert found.calibration_error == pytest.approx(0, abs=1e-6)
    assert found.teacher_calibration_error == pytest.approx(0.6, abs=1e-6)


def test_a_token_of_which_a_side_is_wholly_sure_falls_into_the_last_bin() -> None:
    sure_TV = torch.tensor([[1e4, 0.0]] * 3)
    assert judged(sure_TV, sure_TV, torch.tensor([0, 0, 0])).calibration_error == 0
