"""Labels as plain columns: cut and joined without a loss, and log-probabilities as exact as they say."""

import pickle
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.labels.kinds import KINDS, LOGPROB_RANGE, Sampled, TopK, decode_logprobs, encode_logprobs, joined
from tests.cluster.labels.blocks import FORMS, columns, ragged_mask, random_labels, random_mask, same

ALL_TRUE = np.ones((1, 2), dtype=np.bool_)


@pytest.mark.parametrize("form", FORMS)
def test_the_columns_are_those_with_a_row_per_loss_token(form: str) -> None:
    whole = random_labels(form, ragged_mask())
    assert KINDS[form.split()[0]] is type(whole)
    assert (whole.sequences, whole.tokens) == (6, int(ragged_mask().sum()))
    assert {len(column) for column in columns(whole).values()} == {whole.tokens}
    assert set(whole.columns()) == {field.name for field in fields(whole) if "_T" in field.name}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6], [0, 0, 3, 3, 6]])
def test_rows_joined_again_are_the_whole(form: str, cuts: list[int]) -> None:
    whole = random_labels(form, ragged_mask())
    blocks = [whole.rows(start, stop) for start, stop in pairwise(cuts)]
    assert [block.sequences for block in blocks] == np.diff(cuts).tolist()
    assert [block.tokens for block in blocks] == [ragged_mask()[a:b].sum() for a, b in pairwise(cuts)]
    assert same(joined(blocks), whole)


@given(st.integers(0, 2**16), st.integers(0, 6), st.integers(0, 9), st.data())
def test_any_rows_are_those_of_their_own_sequences(
    seed: int, sequences: int, positions: int, data: st.DataObject
) -> None:
    mask_BS = random_mask((sequences, positions), 0.5, seed)
    whole = random_labels("topk", mask_BS, seed=seed)
    assert isinstance(whole, TopK)
    start = data.draw(st.integers(0, sequences))
    stop = data.draw(st.integers(start, sequences))
    sequence_T = mask_BS.nonzero()[0]
    mine_T = (start <= sequence_T) & (sequence_T < stop)
    assert np.array_equal(whole.rows(start, stop).ids_TK, whole.ids_TK[mine_T])


def test_rows_of_rows_are_the_rows_of_the_whole() -> None:
    whole = random_labels("sampled", ragged_mask())
    assert same(whole.rows(1, 5).rows(1, 3), whole.rows(2, 4))


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_a_single_block_are_not_copied(form: str) -> None:
    whole = random_labels(form, ragged_mask())
    part = whole.rows(1, 3)
    assert np.shares_memory(part.loss_mask_BS, whole.loss_mask_BS)
    assert all(np.shares_memory(column, columns(whole)[name]) for name, column in columns(part).items())
    assert joined([whole]) is whole


@pytest.mark.parametrize("form", FORMS)
def test_labels_survive_pickling(form: str) -> None:
    whole = random_labels(form, ragged_mask())
    assert same(pickle.loads(pickle.dumps(whole)), whole)


def topk(logprobs_TK: npt.NDArray[np.floating], log_tail_T: npt.NDArray[np.floating]) -> TopK:
    tokens, k = logprobs_TK.shape
    ids_TK = np.zeros((tokens, k), dtype=np.uint16)
    columns = {"ids_TK": ids_TK, "codes_TK": encode_logprobs(logprobs_TK), "log_tail_T": np.float32(log_tail_T)}
    mask_BS = np.ones((1, tokens), dtype=np.bool_)
    return TopK(loss_mask_BS=mask_BS, vocabulary=1000, temperature=1.0, **columns)  # type: ignore[arg-type]


def test_sums_of_topk_are_the_mass_kept_and_the_tail() -> None:
    tail_T = np.array([0.25, 0.125])
    sums = topk(np.log([[0.5, 0.25], [0.75, 0.125]]), np.log(tail_T)).sums()
    assert sums == pytest.approx({"kept_mass": 0.75 + 0.875, "log_tail": float(np.log(tail_T).sum())}, abs=1e-6)


def test_sums_of_sampled_are_the_different_ids_and_the_entropy() -> None:
    ids_TN, counts_TN = np.array([[3, 7, 0], [0, 0, 0]], np.uint16), np.array([[2, 1, 0], [3, 0, 0]], np.uint16)
    labels = Sampled(ALL_TRUE, 300, 1.0, ids_TN, counts_TN, np.array([1.5, 0.25], np.float32), draws=3)
    assert labels.sums() == {"unique_ids": 3.0, "teacher_entropy": 1.75}


@pytest.mark.parametrize("form", FORMS[2:])
def test_exact_labels_have_no_quality_to_sum(form: str) -> None:
    assert random_labels(form, ragged_mask()).sums() == {}


@pytest.mark.parametrize("form", FORMS[:2])
def test_sums_of_the_parts_are_those_of_the_whole_and_none_of_nothing(form: str) -> None:
    whole = random_labels(form, ragged_mask())
    tails = {name: np.full(whole.tokens, -1.5, np.float32) for name in columns(whole) if name.endswith("_T")}
    whole = replace(whole, **tails)  # type: ignore[arg-type]
    parts = [whole.rows(start, start + 1).sums() for start in range(6)]
    assert {name: sum(part[name] for part in parts) for name in parts[0]} == pytest.approx(whole.sums())
    assert set(parts[0].values()) == {0.0}


@given(st.lists(st.floats(0.0, LOGPROB_RANGE, width=32), min_size=1, max_size=50))
def test_the_code_of_a_logprob_is_as_exact_as_it_says(below_zero: list[float]) -> None:
    x = np.array(below_zero, dtype=np.float32)
    error = np.abs(decode_logprobs(encode_logprobs(-x)) + x.astype(np.float64))
    # Beside the rounding to 16 bits there is that of float32, and the bound is the first term of a series.
    assert (error <= np.sqrt(LOGPROB_RANGE * x.astype(np.float64)) / 65535 + 1e-6 * x + 1e-8).all()


def test_the_code_of_a_logprob_is_as_exact_as_the_examples_say() -> None:
    for x, bound in ((1.0, 9e-5), (10.0, 3e-4)):
        near = np.linspace(x - 0.05, x, 1001, dtype=np.float32)
        assert np.abs(decode_logprobs(encode_logprobs(-near)) + near).max() <= bound


def test_every_code_is_that_of_its_own_logprob() -> None:
    codes = np.arange(65536, dtype=np.uint16)
    logprobs = decode_logprobs(codes)
    assert (np.diff(logprobs) < 0).all()
    assert np.array_equal(encode_logprobs(logprobs), codes)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_logprobs_out_of_range_are_clipped(dtype: type[np.floating]) -> None:
    given = np.array([0.0, 1e-4, -32.0, -32.5, -1e4, -np.inf], dtype=dtype)
    assert decode_logprobs(encode_logprobs(given)).tolist() == [0.0, 0.0, -32.0, -32.0, -32.0, -32.0]


@st.composite
def teachers(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """True log-probabilities of the K likeliest tokens and of the tail, from flat to sharp."""
    k, scale = draw(st.integers(1, 64)), draw(st.floats(0.0, 6.0))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    z_TV = scale * rng.normal(size=(20, k + draw(st.integers(1, 300))))
    log_p_TV = np.sort(z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True)), axis=-1)[:, ::-1]
    return log_p_TV[:, :k], np.log(np.exp(log_p_TV[:, k:]).sum(-1))


@given(teachers())
def test_buckets_sum_to_one_and_are_near_the_truth(teacher: tuple[npt.NDArray[np.float64], ...]) -> None:
    true_TK, true_tail_T = teacher
    logprobs_TK, log_tail_T = topk(true_TK, true_tail_T).buckets()
    assert (logprobs_TK.dtype, log_tail_T.dtype) == (np.float32, np.float32)
    mass_T = np.exp(logprobs_TK.astype(np.float64)).sum(-1) + np.exp(log_tail_T.astype(np.float64))
    assert np.abs(mass_T - 1).max() < 1e-6
    assert np.abs(log_tail_T - true_tail_T).max() < 5e-4
    assert np.abs(logprobs_TK - true_TK)[true_TK > -12].max(initial=0.0) < 5e-4


def test_buckets_of_a_whole_vocabulary_kept_have_a_finite_tail() -> None:
    nothing = np.log(np.finfo(np.float32).tiny)
    logprobs_TK, log_tail_T = topk(np.log([[0.5, 0.5], [1.0, 1e-300]]), np.array([nothing, nothing])).buckets()
    assert np.isfinite(logprobs_TK).all()
    assert np.isfinite(log_tail_T).all()
    assert np.exp(logprobs_TK).sum(-1) == pytest.approx([1.0, 1.0], abs=1e-6)


def test_buckets_of_no_token_are_none() -> None:
    logprobs_TK, log_tail_T = topk(np.zeros((0, 4)), np.zeros(0)).buckets()
    assert (logprobs_TK.shape, log_tail_T.shape) == ((0, 4), (0,))
