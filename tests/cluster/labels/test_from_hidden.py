"""Labels against the plain float64 softmax, and that nothing about how they are computed shows in them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.labels.from_hidden import as_tensor, hidden_labels, topk_labels, topk_of_logits
from cluster.labels.kinds import TopK

TOKENS, VOCABULARY, PADDED, WIDTH = 12, 50, 56, 16


def logits(scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def tail_of(log_p_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Log of the mass outside the ids, in float64, -inf where there is none."""
    return log_p_TV.scatter(1, ids_TK, -torch.inf).logsumexp(-1)


class Setup:
    """Hidden states and a head whose last columns are padding with large logits."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.hidden_BSD = torch.randn(3, 4, WIDTH, generator=generator)
        self.head_VD = torch.randn(PADDED, WIDTH, generator=generator)
        self.head_VD[VOCABULARY:] *= 50
        self.chunks: list[int] = []

    def head(self, hidden_TD: Tensor) -> Tensor:
        self.chunks.append(len(hidden_TD))
        return hidden_TD @ self.head_VD.T

    def labels(self, *, k: int = 8, temperature: float = 1.0, chunk: int = 5, keep: bool = True) -> TopK | None:
        shape = {"k": k, "temperature": temperature, "vocabulary": VOCABULARY, "chunk": chunk, "keep": keep}
        return topk_labels(self.hidden_BSD, self.head, **shape)  # type: ignore[arg-type]

    def log_p(self, temperature: float) -> Tensor:
        logits_TV = self.hidden_BSD.reshape(-1, WIDTH).double() @ self.head_VD[:VOCABULARY].double().T
        return (logits_TV / temperature).log_softmax(-1)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_top_k_agrees_with_the_float64_softmax(k: int, scale: float) -> None:
    ids_TK, logprobs_TK, log_tail_T = topk_of_logits(logits(scale), k)
    log_p_TV = logits(scale).double().log_softmax(-1)
    torch.testing.assert_close(logprobs_TK.double(), log_p_TV.topk(k).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs_TK.double(), log_p_TV.gather(1, ids_TK), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_tail_T.double(), tail_of(log_p_TV, ids_TK), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_the_kept_mass_and_the_tail_are_one(k: int) -> None:
    _, logprobs_TK, log_tail_T = topk_of_logits(logits(), k)
    mass_T = logprobs_TK.double().exp().sum(-1) + log_tail_T.double().exp()
    torch.testing.assert_close(mass_T, torch.ones(TOKENS, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_logits_are_left_as_they_were() -> None:
    given = logits()
    topk_of_logits(given, 3)
    assert torch.equal(given, logits())


def test_a_whole_vocabulary_leaves_a_finite_tail_without_weight() -> None:
    _, _, log_tail_T = topk_of_logits(logits(), VOCABULARY)
    assert log_tail_T.isfinite().all()
    assert (log_tail_T.exp() < 1e-37).all()


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_a_tiny_tail_keeps_its_relative_precision(gap: float) -> None:
    given = logits(1.0)
    given[:, :3] += gap
    ids_TK, _, log_tail_T = topk_of_logits(given, 3)
    tail_T, true_T = log_tail_T.double().exp(), tail_of(given.double().log_softmax(-1), ids_TK).exp()
    assert float(((tail_T - true_T) / true_T).abs().max()) < 1e-4


@pytest.mark.parametrize("masked", [1, VOCABULARY - 2])
def test_a_token_that_the_teacher_excludes_gives_no_infinite_label(masked: int) -> None:
    given = logits()
    given[:, :masked] = -torch.inf
    _, logprobs_TK, log_tail_T = topk_of_logits(given, VOCABULARY - 1)
    assert logprobs_TK.isfinite().all()
    assert log_tail_T.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_applied_before_the_tail_is_summed(temperature: float) -> None:
    setup = Setup()
    labels = setup.labels(temperature=temperature)
    assert labels is not None
    ids_TK = torch.from_numpy(labels.ids_BSK.astype(np.int64)).reshape(-1, 8)
    log_p_TV = setup.log_p(temperature)
    np.testing.assert_allclose(labels.logprobs_BSK.reshape(-1, 8), log_p_TV.gather(1, ids_TK), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(labels.log_tail_BS.reshape(-1), tail_of(log_p_TV, ids_TK), rtol=1e-4, atol=1e-5)


def test_padded_columns_are_cut_however_large_they_are() -> None:
    labels = Setup().labels(k=VOCABULARY)
    assert labels is not None
    assert np.array_equal(np.sort(labels.ids_BSK, axis=-1)[0, 0], np.arange(VOCABULARY))
    np.testing.assert_allclose(np.exp(labels.logprobs_BSK).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_the_chunk_size_does_not_show_in_the_labels(chunk: int) -> None:
    setup = Setup()
    labels, whole = setup.labels(chunk=chunk), Setup().labels(chunk=TOKENS)
    assert labels is not None
    assert whole is not None
    assert max(setup.chunks) <= chunk
    assert np.array_equal(labels.ids_BSK, whole.ids_BSK)
    np.testing.assert_allclose(labels.logprobs_BSK, whole.logprobs_BSK, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(labels.log_tail_BS, whole.log_tail_BS, rtol=1e-5, atol=1e-5)


def test_a_shard_that_keeps_nothing_takes_part_in_every_call_of_the_head() -> None:
    keeps, helps = Setup(), Setup()
    assert keeps.labels() is not None
    assert helps.labels(keep=False) is None
    assert helps.chunks == keeps.chunks == [5, 5, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_labels_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    hidden_BSD = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 1e6).to(dtype)
    column = hidden_labels(hidden_BSD).hidden_BSD
    column.flags.writeable = False  # as out of Ray's store
    assert as_tensor(column).dtype == dtype
    assert torch.equal(as_tensor(column), hidden_BSD)
