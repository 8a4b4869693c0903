"""Logits to labels against plain float64, and what systematic draws promise of every single token."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cluster.labels.kinds import LOGPROB_RANGE
from cluster.labels.reduce import (
    BLOCK,
    TILE,
    draw_offsets,
    largest,
    probabilities,
    probabilities_and_entropy,
    systematic_draws,
    top_k,
)

ROWS = TILE + 5
# Fewer than a block, blocks that fill up, and blocks that do not.
VOCABULARIES = [3, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK, 1000]
ALMOST_ONE = float(np.nextafter(1.0, 0.0))
ADDRESS = "0123456789abcdef" * 2


def logits(vocabulary: int, scale: float = 3.0, rows: int = ROWS, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def teacher(vocabulary: int, scale: float = 3.0, rows: int = ROWS, seed: int = 0) -> Tensor:
    return logits(vocabulary, scale, rows, seed).softmax(-1)


def exact(logits_CV: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Softmax and entropy in float64."""
    log_p_CV = (logits_CV.double() / temperature).log_softmax(-1)
    return log_p_CV.exp(), torch.special.entr(log_p_CV.exp()).sum(-1)


def counts_of(p_CV: Tensor, offsets_C: Tensor, draws: int) -> Tensor:
    """How often each token of the vocabulary was drawn."""
    ids_CN, counts_CN = systematic_draws(p_CV, offsets_C, draws)
    return torch.zeros(p_CV.shape, dtype=torch.int64).scatter_add_(1, ids_CN, counts_CN)


def offsets(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_probabilities_and_entropy_are_those_of_float64(vocabulary: int, temperature: float) -> None:
    p_CV, entropy_C, likeliest_C = probabilities_and_entropy(logits(vocabulary), temperature)
    true_p_CV, true_entropy_C = exact(logits(vocabulary), temperature)
    torch.testing.assert_close(p_CV.double(), true_p_CV, rtol=3e-5, atol=1e-30)
    torch.testing.assert_close(entropy_C.double(), true_entropy_C, rtol=1e-5, atol=1e-5)
    assert torch.equal(likeliest_C, p_CV.amax(-1))
    assert p_CV.dtype == entropy_C.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("excluded", [1, 50, 99])
def test_an_excluded_token_has_no_probability_and_no_part_in_the_entropy(excluded: int, temperature: float) -> None:
    given = logits(100)
    given[:, -excluded:] = -torch.inf
    p_CV, entropy_C, _ = probabilities_and_entropy(given, temperature)
    without_p_CV, without_C = exact(given[:, :-excluded], temperature)
    assert (p_CV[:, -excluded:] == 0).all()
    torch.testing.assert_close(p_CV[:, :-excluded].double(), without_p_CV, rtol=3e-5, atol=1e-30)
    torch.testing.assert_close(entropy_C.double(), without_C, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0])
def test_the_entropy_lies_between_nothing_and_that_of_an_even_distribution(scale: float) -> None:
    _, entropy_C, _ = probabilities_and_entropy(logits(100, scale), 1.0)
    assert (entropy_C >= 0).all()
    assert (entropy_C <= np.log(100) + 1e-5).all()
    torch.testing.assert_close(entropy_C.double(), exact(logits(100, scale))[1], rtol=0, atol=1e-4)


def test_the_logits_are_left_as_they_were() -> None:
    given = logits(70)
    probabilities(given, 2.0)
    assert torch.equal(given, logits(70))


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    given = logits(200).bfloat16()
    torch.testing.assert_close(probabilities(given, 1.0), probabilities(given.float(), 1.0), rtol=0, atol=0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_entropy_of_its_row_and_no_other(broken: float) -> None:
    given = logits(100)
    given[3, 7] = broken
    _, entropy_C, _ = probabilities_and_entropy(given, 1.0)
    assert (~entropy_C.isfinite()).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("k", [1, 2, 5, 9, 64])
@pytest.mark.parametrize("levels", [0, 3])
def test_the_largest_are_those_of_a_full_search(vocabulary: int, k: int, levels: int) -> None:
    p_CV, k = teacher(vocabulary), min(k, vocabulary)
    if levels:  # so few different values that almost all are tied
        p_CV = torch.randint(0, levels, p_CV.shape, generator=torch.Generator().manual_seed(1)).float()
    values_CK, ids_CK = largest(p_CV, k)
    assert torch.equal(values_CK, p_CV.topk(k).values)
    assert torch.equal(values_CK, p_CV.gather(1, ids_CK))
    assert all(len(set(row)) == k for row in ids_CK.tolist())


def test_the_largest_are_found_when_they_are_all_in_one_block() -> None:
    p_CV = torch.zeros(1, 20 * BLOCK)
    p_CV[0, 5 * BLOCK : 5 * BLOCK + 4] = torch.tensor([0.1, 0.4, 0.2, 0.3])
    values_CK, ids_CK = largest(p_CV, 4)
    assert (ids_CK - 5 * BLOCK).tolist() == [[1, 3, 2, 0]]
    assert (values_CK.diff() < 0).all()


@pytest.mark.parametrize("k", [1, 7, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_top_k_agrees_with_the_float64_softmax(k: int, scale: float) -> None:
    given = logits(320, scale)
    ids_CK, logprobs_CK, log_tail_C = top_k(probabilities(given, 1.0), k)
    p_CV, _ = exact(given)
    wanted_CK = p_CV.gather(1, ids_CK).log()
    torch.testing.assert_close(wanted_CK, p_CV.topk(k).values.log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs_CK.double(), wanted_CK.clamp_min(-LOGPROB_RANGE), rtol=1e-5, atol=1e-5)
    tail_C = p_CV.scatter(1, ids_CK, 0.0).sum(-1)
    torch.testing.assert_close(log_tail_C.double(), tail_C.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_kept_mass_and_the_tail_are_one(k: int) -> None:
    _, logprobs_CK, log_tail_C = top_k(teacher(100), k)
    mass_C = logprobs_CK.double().exp().sum(-1) + log_tail_C.double().exp()
    torch.testing.assert_close(mass_C, torch.ones_like(mass_C), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_a_tiny_tail_keeps_its_relative_precision(gap: float) -> None:
    given = logits(50, 1.0)
    given[:, :3] += gap
    ids_CK, _, log_tail_C = top_k(probabilities(given, 1.0), 3)
    true_C = exact(given)[0].scatter(1, ids_CK, 0.0).sum(-1)
    assert float(((log_tail_C.double().exp() - true_C) / true_C).abs().max()) < 1e-4


def test_a_whole_vocabulary_leaves_a_finite_tail_without_weight() -> None:
    _, _, log_tail_C = top_k(teacher(50), 50)
    assert log_tail_C.isfinite().all()
    assert (log_tail_C.exp() < 1e-37).all()


@pytest.mark.parametrize("excluded", [1, 98])
def test_a_token_that_the_teacher_excludes_gives_no_infinite_label(excluded: int) -> None:
    given = logits(100)
    given[:, :excluded] = -torch.inf
    _, logprobs_CK, log_tail_C = top_k(probabilities(given, 1.0), 99)
    assert logprobs_CK.isfinite().all()
    assert log_tail_C.isfinite().all()
    assert (logprobs_CK >= -LOGPROB_RANGE).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("draws", [1, 2, 50, 257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
def test_every_token_is_drawn_as_often_as_its_probability_says_rounded_down_or_up(
    vocabulary: int, draws: int, scale: float
) -> None:
    p_CV = teacher(vocabulary, scale)
    counts_CV = counts_of(p_CV, offsets(), draws)
    expected_CV = draws * p_CV.double()
    assert (counts_CV.sum(-1) == draws).all()
    # An edge that rounding moves by a hair may let in or keep out the one draw that lies upon it.
    assert (counts_CV >= (expected_CV - 1e-4).floor()).all()
    assert (counts_CV <= (expected_CV + 1e-4).ceil()).all()


@pytest.mark.parametrize("draws", [1, 50])
def test_drawn_ids_rise_without_repeats_and_are_filled_up_with_0(draws: int) -> None:
    ids_CN, counts_CN = systematic_draws(teacher(1000), offsets(), draws)
    assert ids_CN.shape == counts_CN.shape == (ROWS, draws)
    for ids, counts in zip(ids_CN.tolist(), counts_CN.tolist(), strict=True):
        drawn = sum(count > 0 for count in counts)
        assert ids[:drawn] == sorted(set(ids[:drawn]))
        assert ids[drawn:] == counts[drawn:] == [0] * (draws - drawn)
        assert min(counts[:drawn]) >= 1
        assert sum(counts) == draws


EXCLUDED = {
    "at the end": slice(-70, None),
    "at the start": slice(0, 70),
    "a whole block": slice(BLOCK, 2 * BLOCK),
    "every other one": slice(0, None, 2),
    "all but the last": slice(0, -1),
    "all but the first": slice(1, None),
}


@pytest.mark.parametrize("excluded", EXCLUDED.values(), ids=EXCLUDED)
@pytest.mark.parametrize("vocabulary", [3 * BLOCK, 3 * BLOCK + 1, 4 * BLOCK - 1])
@pytest.mark.parametrize("offset", [0.0, 0.5, ALMOST_ONE])
def test_a_token_without_probability_is_never_drawn(excluded: slice, vocabulary: int, offset: float) -> None:
    given = logits(vocabulary, 1.0)
    given[:, excluded] = -torch.inf
    p_CV = probabilities(given, 1.0)
    for draws in (1, 7, 200):
        counts_CV = counts_of(p_CV, torch.full((ROWS,), offset, dtype=torch.float64), draws)
        assert (counts_CV.sum(-1) == draws).all()
        assert int(counts_CV[p_CV == 0].sum()) == 0


@pytest.mark.parametrize("tiny", [1e-20, 1e-40])
@pytest.mark.parametrize("offset", [0.0, ALMOST_ONE])
def test_tokens_of_hardly_any_probability_around_a_sure_one_do_no_harm(tiny: float, offset: float) -> None:
    p_CV = torch.full((1, 2 * BLOCK + 3), tiny)
    p_CV[0, BLOCK - 1] = 1.0
    p_CV[0, -1] = 0.0
    counts_CV = counts_of(p_CV, torch.tensor([offset], dtype=torch.float64), 50)
    assert int(counts_CV.sum()) == 50
    assert int(counts_CV[0, BLOCK - 1]) >= 49
    assert int(counts_CV[p_CV == 0].sum()) == 0


@pytest.mark.parametrize("total", [0.999, 1.001])
def test_mass_that_is_not_exactly_one_is_shared_out_all_the_same(total: float) -> None:
    p_CV = teacher(200, 1.0)
    counts_CV = counts_of(p_CV * total, offsets(), 500)
    assert (counts_CV.sum(-1) == 500).all()
    assert ((counts_CV - 500 * p_CV.double()).abs() <= 1 + 1e-4).all()


@pytest.mark.parametrize("vocabulary", [50, 1000])
@pytest.mark.parametrize("draws", [1, 8, 50])
def test_the_mean_over_all_offsets_is_the_distribution_itself(vocabulary: int, draws: int) -> None:
    shifts = 64
    p_CV = teacher(vocabulary, 2.0, rows=1)
    counts_MV = counts_of(p_CV.expand(shifts, -1), torch.arange(shifts) / shifts, draws)
    mean_V = counts_MV.double().mean(0) / draws
    assert float((mean_V - p_CV[0].double()).abs().max()) <= 1 / (draws * shifts) + 1e-6


def test_systematic_draws_vary_less_than_independent_ones() -> None:
    draws, repeats = 50, 2000
    p_CV = teacher(300, 1.5, rows=1)
    counts_RV = counts_of(p_CV.expand(repeats, -1), offsets(repeats), draws)
    variance_V = (counts_RV.double() / draws).var(0)
    independent_V = p_CV[0].double() * (1 - p_CV[0].double()) / draws
    assert float(variance_V.sum()) < 0.9 * float(independent_V.sum())
    likely_V = p_CV[0] > 1 / draws
    assert (variance_V[likely_V] < independent_V[likely_V]).all()


def test_a_row_s_draws_depend_on_no_other_row() -> None:
    p_CV, offsets_C = teacher(1000), offsets()
    ids_CN, counts_CN = systematic_draws(p_CV, offsets_C, 50)
    for row in range(ROWS):
        alone = systematic_draws(p_CV[row : row + 1], offsets_C[row : row + 1], 50)
        assert torch.equal(alone[0][0], ids_CN[row])
        assert torch.equal(alone[1][0], counts_CN[row])


def test_offsets_are_decided_by_the_address_alone() -> None:
    found: npt.NDArray[np.float64] = draw_offsets(ADDRESS, 1000)
    assert np.array_equal(found, draw_offsets(ADDRESS, 1000))
    np.random.default_rng(1).random()
    assert np.array_equal(found[:10], draw_offsets(ADDRESS, 10))
    assert found.dtype == np.float64
    assert ((found >= 0) & (found < 1)).all()
    assert abs(found.mean() - 0.5) < 0.05


def test_offsets_are_the_same_on_every_machine_and_in_every_version() -> None:
    # Written down: a batch that is scored again a year later must be drawn alike.
    np.testing.assert_array_equal(
        draw_offsets(ADDRESS, 3), [0.5345565143046691, 0.3671474662490569, 0.9012762801676591]
    )


@pytest.mark.parametrize("other", ["f" * 32, "0" * 32, "1" + ADDRESS[1:], ADDRESS[:-1] + "e"])
def test_another_address_has_other_offsets(other: str) -> None:
    assert not np.isclose(draw_offsets(ADDRESS, 50), draw_offsets(other, 50)).any()


def test_no_tokens_have_no_draws_and_no_offsets() -> None:
    empty = torch.empty(0, 100)
    assert draw_offsets(ADDRESS, 0).shape == (0,)
    assert systematic_draws(empty, torch.empty(0), 5)[0].shape == (0, 5)
    assert top_k(probabilities(empty, 1.0), 5)[0].shape == (0, 5)
