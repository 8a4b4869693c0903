"""How close a student is to its teacher, exactly: full vocabulary, from both sides' hidden states and heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cluster.corpus.blocks import MAX_BLOCKS
from cluster.evaluate.figures import Fidelity
from cluster.heads import OutputHead

# Bins of equal width over the confidence, as in Guo et al. (2017).
CALIBRATION_BINS = 15
# Per block: tokens, kl, agreements, student cross-entropy
BLOCK_SUMS = 4
# kl, agreements, student and teacher cross-entropy, tokens; per bin of either side: tokens, hits, confidence; per block
BINS_END = 5 + 2 * 3 * CALIBRATION_BINS
FIDELITY_SUMS = BINS_END + BLOCK_SUMS * MAX_BLOCKS


def _calibration(probabilities_CV: Tensor, next_C: Tensor) -> Tensor:
    """Per bin of confidence: tokens, how often the likeliest token was the next one, confidence (float64, flat)."""
    confidence_C, likeliest_C = probabilities_CV.max(-1)
    bin_C = (confidence_C * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    facts_3C = torch.stack([torch.ones_like(confidence_C), (likeliest_C == next_C).float(), confidence_C]).double()
    return (
        torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=bin_C.device)
        .index_add(1, bin_C, facts_3C)
        .view(-1)
    )


def _calibration_error(sums: Tensor) -> float:
    """Expected calibration error (Guo et al., 2017): mean gap between confidence and accuracy over the bins."""
    tokens_B, hits_B, confidence_B = sums.view(3, CALIBRATION_BINS)
    return float((hits_B - confidence_B).abs().sum() / tokens_B.sum())


def fidelity_sums(
    hidden_TD: Tensor,
    head: OutputHead[Tensor],
    *,
    teacher_logits: Callable[[slice], Tensor],
    next_T: Tensor,
    vocabulary: int,
    block_T: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """Sums over tokens that ranks can add before :func:`fidelity_of` divides (float64, [FIDELITY_SUMS]).

    Args:
        hidden_TD, head: the student's last hidden states at the loss tokens, and its head.
        teacher_logits: the teacher's logits [C, vocabulary] of some of these tokens, made when they are asked for.
        next_T: the token after each of them.
        block_T: the block of each of them, int64; None puts all into one.
    """
    if block_T is None:
        block_T = torch.zeros_like(next_T)
    sums, head = torch.zeros(FIDELITY_SUMS, dtype=torch.float64, device=hidden_TD.device), head.cut(vocabulary)
    for start in range(0, hidden_TD.shape[0], chunk):
        rows = slice(start, start + chunk)
        z_CV, y_CV = head.logits(hidden_TD[rows]).float(), teacher_logits(rows).float()
        log_norm_q_C, log_norm_p_C = z_CV.logsumexp(-1), y_CV.logsumexp(-1)
        student_ce_C = log_norm_q_C - z_CV.gather(1, next_T[rows, None])[:, 0]
        teacher_ce_C = log_norm_p_C - y_CV.gather(1, next_T[rows, None])[:, 0]
        q_CV, p_CV = z_CV.softmax(-1), y_CV.softmax(-1)
        agreed_C = q_CV.argmax(-1) == p_CV.argmax(-1)
        # KL = sum_v p_v (y_v - z_v) - log Z_p + log Z_q, with the difference of the logits made in place
        kl_C = y_CV.sub_(z_CV).mul_(p_CV).sum(-1) - log_norm_p_C + log_norm_q_C
        ones_C = torch.ones_like(kl_C)
        columns = (kl_C, agreed_C, student_ce_C, teacher_ce_C, ones_C)
        means = torch.stack([column_C.sum(dtype=torch.float64) for column_C in columns])
        bins = [_calibration(each_CV, next_T[rows]) for each_CV in (q_CV, p_CV)]
        facts_4C = torch.stack([ones_C, kl_C, agreed_C.float(), student_ce_C]).double()
        blocks_4K = facts_4C.new_zeros(BLOCK_SUMS, MAX_BLOCKS).index_add(1, block_T[rows], facts_4C)
        sums += torch.cat([means, *bins, blocks_4K.view(-1)])
    return sums


def fidelity_of(sums: Tensor) -> Fidelity:
    """The means behind :func:`fidelity_sums`."""
    kl, agreed, student_ce, teacher_ce, tokens = sums[:5].tolist()
    student_bins, teacher_bins = sums[5:BINS_END].chunk(2)
    blocks_K4 = sums[BINS_END:].view(BLOCK_SUMS, MAX_BLOCKS).T
    return Fidelity(
        kl=kl / tokens,
        agreement=agreed / tokens,
        student_perplexity=math.exp(min(student_ce / tokens, 700.0)),
        teacher_perplexity=math.exp(min(teacher_ce / tokens, 700.0)),
        calibration_error=_calibration_error(student_bins),
        teacher_calibration_error=_calibration_error(teacher_bins),
        tokens=int(tokens),
        blocks=tuple(blocks_K4[blocks_K4[:, 0] > 0].tolist()),
    )
