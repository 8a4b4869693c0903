"""Labels out of hidden states: exact where they are kept, drawn as the address says, and that nothing else shows."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from cluster.errors import LabelError
from cluster.labels.kinds import Dense, Hidden, Labels, Sampled, TopK
from cluster.labels.make import as_tensor, kept, make_labels
from cluster.spec import LabelsSpec
from tests.cluster.labels.blocks import same

VOCABULARY, PADDED, WIDTH, CHUNK = 50, 56, 16, 4
ADDRESS, OTHER = "0123456789abcdef" * 2, "f" * 32
MASK_BS = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=np.bool_)
TOKENS = int(MASK_BS.sum())
SPECS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 8},
    "sampled": {"kind": "sampled", "draws": 20},
    "hidden": {"kind": "hidden"},
    "dense": {"kind": "dense"},
}
WITH_HEAD = ["topk", "sampled", "dense"]
every_kind = pytest.mark.parametrize("kind", SPECS)
every_kind_with_a_head = pytest.mark.parametrize("kind", WITH_HEAD)


def spec_of(kind: str, **fields: Any) -> LabelsSpec:
    return TypeAdapter(LabelsSpec).validate_python(SPECS[kind] | fields)  # type: ignore[no-any-return]


class Teacher:
    """Hidden states and a head whose last columns are padding with large logits."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        # Whole eighths: their products are exact in any order that a matrix product may sum them in.
        self.hidden_BSD = torch.randint(-8, 9, (*MASK_BS.shape, WIDTH), generator=generator) / 8
        self.head_VD = torch.randint(-16, 17, (PADDED, WIDTH), generator=generator) / 8
        self.head_VD[VOCABULARY:] *= 50
        self.calls: list[int] = []

    def head(self, hidden_TD: Tensor) -> Tensor:
        self.calls.append(len(hidden_TD))
        return hidden_TD @ self.head_VD.T

    def labels(self, kind: str, *, mask_BS: npt.NDArray[np.bool_] = MASK_BS, **options: Any) -> Any:
        known = {"vocabulary": VOCABULARY, "address": ADDRESS, "chunk": CHUNK}
        arguments = {name: options.pop(name, value) for name, value in known.items()}
        keep = options.pop("keep", True)
        return make_labels(spec_of(kind, **options), self.hidden_BSD, mask_BS, self.head, **arguments, keep=keep)

    def log_p(self, temperature: float = 1.0) -> Tensor:
        """Of the loss tokens, in float64."""
        hidden_TD = self.hidden_BSD[torch.from_numpy(MASK_BS)].double()
        return (hidden_TD @ self.head_VD[:VOCABULARY].double().T / temperature).log_softmax(-1)


def from_logits(kind: str, logits_TV: Tensor, chunk: int = CHUNK, **options: Any) -> Any:
    """Labels of logits that are given as they are."""
    mask_BS = np.ones((1, len(logits_TV)), dtype=np.bool_)
    known = {"vocabulary": logits_TV.shape[1], "address": ADDRESS, "chunk": chunk}
    return make_labels(spec_of(kind, **options), logits_TV[None], mask_BS, lambda hidden_TD: hidden_TD, **known)


def counts_of(labels: Sampled) -> npt.NDArray[np.int64]:
    counts_TV = np.zeros((labels.tokens, labels.vocabulary), dtype=np.int64)
    np.add.at(counts_TV, (np.arange(labels.tokens)[:, None], labels.ids_TN), labels.counts_TN)
    return counts_TV


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_top_k_labels_are_cut_after_the_temperature_is_applied(temperature: float) -> None:
    labels: TopK = Teacher().labels("topk", temperature=temperature)
    log_p_TV, ids_TK = Teacher().log_p(temperature), torch.from_numpy(labels.ids_TK.astype(np.int64))
    logprobs_TK, log_tail_T = labels.buckets()
    assert (labels.temperature, labels.ids_TK.dtype, labels.ids_TK.shape) == (temperature, np.uint16, (TOKENS, 8))
    np.testing.assert_allclose(log_p_TV.gather(1, ids_TK), log_p_TV.topk(8).values, rtol=1e-6)
    np.testing.assert_allclose(logprobs_TK, log_p_TV.topk(8).values, atol=1e-3)
    tail_T = log_p_TV.scatter(1, ids_TK, -torch.inf).logsumexp(-1)
    np.testing.assert_allclose(labels.log_tail_T, tail_T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(logprobs_TK).sum(-1) + np.exp(log_tail_T), 1, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_draws_are_made_after_the_temperature_is_applied(temperature: float) -> None:
    labels: Sampled = Teacher().labels("sampled", temperature=temperature)
    p_TV = Teacher().log_p(temperature).exp()
    expected_TV = (20 * p_TV).numpy()
    counts_TV = counts_of(labels)
    assert (labels.temperature, labels.draws, labels.ids_TN.dtype) == (temperature, 20, np.uint16)
    assert (counts_TV.sum(-1) == 20).all()
    assert (counts_TV >= np.floor(expected_TV - 1e-4)).all()
    assert (counts_TV <= np.ceil(expected_TV + 1e-4)).all()
    np.testing.assert_allclose(labels.entropy_T, torch.special.entr(p_TV).sum(-1), rtol=1e-4, atol=1e-5)


def test_dense_labels_are_the_logits_of_the_loss_tokens() -> None:
    labels: Dense = Teacher().labels("dense")
    assert labels.logits_TV.shape == (TOKENS, VOCABULARY)
    np.testing.assert_allclose(
        torch.from_numpy(labels.logits_TV).double().log_softmax(-1), Teacher().log_p(), atol=1e-5
    )


def test_hidden_labels_are_the_states_of_the_loss_tokens_and_ask_for_no_logits() -> None:
    teacher = Teacher()
    labels: Hidden = teacher.labels("hidden")
    assert np.array_equal(labels.hidden_TD, teacher.hidden_BSD.numpy()[MASK_BS])
    assert teacher.calls == []


@every_kind
@pytest.mark.parametrize("chunk", [1, 3, TOKENS, 100])
def test_the_chunk_size_does_not_show(kind: str, chunk: int) -> None:
    teacher = Teacher()
    assert same(teacher.labels(kind, chunk=chunk), Teacher().labels(kind, chunk=TOKENS))
    assert all(call <= chunk for call in teacher.calls)


@every_kind
def test_a_batch_that_is_scored_again_has_the_same_labels_to_the_bit(kind: str) -> None:
    torch.manual_seed(1)
    one = Teacher().labels(kind)
    torch.manual_seed(2)
    assert same(one, Teacher().labels(kind))


@every_kind
def test_another_address_shows_in_the_draws_and_nowhere_else(kind: str) -> None:
    one, other = Teacher().labels(kind), Teacher().labels(kind, address=OTHER)
    assert same(one, other) is (kind != "sampled")
    if kind == "sampled":
        assert same(one, replace(other, ids_TN=one.ids_TN, counts_TN=one.counts_TN))


@every_kind_with_a_head
def test_only_loss_tokens_are_looked_at(kind: str) -> None:
    teacher = Teacher()
    teacher.hidden_BSD[~torch.from_numpy(MASK_BS)] = torch.nan
    assert same(teacher.labels(kind), Teacher().labels(kind))
    assert teacher.calls == [4, 4, 2]


def test_a_broken_state_without_loss_harms_no_hidden_label() -> None:
    teacher = Teacher()
    teacher.hidden_BSD[~torch.from_numpy(MASK_BS)] = torch.nan
    assert same(teacher.labels("hidden"), Teacher().labels("hidden"))


@every_kind_with_a_head
def test_padded_columns_are_cut_however_large_they_are(kind: str) -> None:
    bare = Teacher()
    bare.head_VD = bare.head_VD[:VOCABULARY]
    assert same(Teacher().labels(kind), bare.labels(kind))


@every_kind_with_a_head
def test_a_shard_that_keeps_nothing_takes_part_in_every_call_of_the_head(kind: str) -> None:
    keeps, helps = Teacher(), Teacher()
    assert keeps.labels(kind) is not None
    assert helps.labels(kind, keep=False) is None
    assert helps.calls == keeps.calls == [4, 4, 2]


def test_a_shard_that_keeps_nothing_has_no_hidden_labels() -> None:
    assert Teacher().labels("hidden", keep=False) is None


@every_kind
def test_a_batch_without_loss_tokens_has_labels_without_rows(kind: str) -> None:
    labels: Labels = Teacher().labels(kind, mask_BS=np.zeros_like(MASK_BS))
    one: Labels = Teacher().labels(kind)
    assert (labels.tokens, labels.sequences) == (0, len(MASK_BS))
    for name in labels.columns():
        assert getattr(labels, name).shape == (0, *getattr(one, name).shape[1:])
        assert getattr(labels, name).dtype == getattr(one, name).dtype


@every_kind_with_a_head
def test_every_shard_calls_the_head_as_often_where_there_is_no_loss_token(kind: str) -> None:
    helps = Teacher()
    assert helps.labels(kind, mask_BS=np.zeros_like(MASK_BS), keep=False) is None
    assert helps.calls == [0]


@every_kind
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_that_are_not_finite_are_refused(kind: str, broken: float, dtype: torch.dtype) -> None:
    teacher = Teacher()
    teacher.hidden_BSD[3, 2, 1] = broken
    teacher.hidden_BSD, teacher.head_VD = teacher.hidden_BSD.to(dtype), teacher.head_VD.to(dtype)
    with pytest.raises(LabelError, match="not finite"):
        teacher.labels(kind)


@every_kind_with_a_head
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_single_logit_that_is_not_finite_is_refused(kind: str, broken: float) -> None:
    logits_TV = torch.randn(12, 100, generator=torch.Generator().manual_seed(0))
    logits_TV[11, 99] = broken
    with pytest.raises(LabelError, match="not finite"):
        from_logits(kind, logits_TV)


@every_kind_with_a_head
def test_a_token_after_which_nothing_may_follow_is_refused(kind: str) -> None:
    logits_TV = torch.randn(12, 100, generator=torch.Generator().manual_seed(0))
    logits_TV[7] = -torch.inf
    with pytest.raises(LabelError):
        from_logits(kind, logits_TV)


@every_kind_with_a_head
def test_a_token_that_the_teacher_excludes_is_allowed(kind: str) -> None:
    logits_TV = torch.randn(12, 100, generator=torch.Generator().manual_seed(0))
    logits_TV[:, 90:] = -torch.inf
    labels = from_logits(kind, logits_TV)
    if kind == "sampled":
        assert not counts_of(labels)[:, 90:].any()
    if kind == "topk":
        assert (labels.ids_TK < 90).all()


@every_kind_with_a_head
@pytest.mark.parametrize("constant", [0.0, -7.5])
def test_a_teacher_to_whom_all_is_alike_is_refused(kind: str, constant: float) -> None:
    with pytest.raises(LabelError, match="gives all 100 tokens the same probability"):
        from_logits(kind, torch.full((12, 100), constant))


@every_kind_with_a_head
def test_a_teacher_that_knows_something_of_one_token_is_believed(kind: str) -> None:
    logits_TV = torch.zeros(12, 100)
    logits_TV[4, 3] = 5.0
    assert from_logits(kind, logits_TV).tokens == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_and_logits_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    values_TD = (torch.randn(9, 7, generator=torch.Generator().manual_seed(0)) * 1e6).to(dtype)
    columns = (
        kept(values_TD),
        from_logits("hidden", values_TD).hidden_TD,
        from_logits("dense", values_TD).logits_TV,
    )
    for column in columns:
        column.flags.writeable = False  # as out of Ray's store
        assert column.dtype == (np.uint16 if dtype == torch.bfloat16 else np.float32)
        assert as_tensor(column).dtype == dtype
        assert torch.equal(as_tensor(column), values_TD)


def test_every_bfloat16_bit_pattern_is_kept() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    assert torch.equal(as_tensor(kept(bits.view(torch.bfloat16))).view(torch.int16), bits)


def test_what_is_kept_shares_no_memory_with_what_is_read_from_it() -> None:
    column = kept(torch.ones(3))
    as_tensor(column).zero_()
    assert (column == 1).all()


def test_float16_and_a_head_with_a_gradient_and_strides_are_kept() -> None:
    half = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(as_tensor(kept(half)), half.float())
    weight = torch.nn.Parameter(half.float())
    assert torch.equal(as_tensor(kept(weight.T)), half.float().T)


@pytest.mark.parametrize("vocabulary", [2**16 - 1, 2**16, 2**16 + 1, 151_936])
@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_ids_come_back_however_large_the_vocabulary(vocabulary: int, kind: str) -> None:
    likely = [0, 255, 2**15, 2**15 + 1, 2**16 - 3, vocabulary - 1]
    logits_TV = torch.zeros(3, vocabulary)
    logits_TV[:, likely] = 40.0
    labels = from_logits(kind, logits_TV, **({"k": len(likely)} if kind == "topk" else {"draws": 60}))
    ids = labels.ids_TK if kind == "topk" else labels.ids_TN[:, : len(likely)]
    assert ids.dtype == (np.uint16 if vocabulary <= 2**16 else np.uint32)
    assert [sorted(row) for row in ids.tolist()] == [likely] * 3
    if kind == "sampled":
        assert (labels.counts_TN[:, : len(likely)] >= 9).all()


def test_the_most_draws_that_a_spec_allows_are_counted_even_when_all_are_one_token() -> None:
    logits_TV = torch.zeros(1, 100)
    logits_TV[0, 42] = 200.0
    labels = from_logits("sampled", logits_TV, draws=1024)
    assert (labels.ids_TN[0, 0], labels.counts_TN[0, 0], labels.sums()["unique_ids"]) == (42, 1024, 1)


@pytest.mark.gpu
@every_kind
def test_a_gpu_gives_the_labels_that_a_cpu_gives(kind: str) -> None:
    logits_TV = 3 * torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    alike(from_logits(kind, logits_TV.cuda(), chunk=64), from_logits(kind, logits_TV, chunk=64))


@pytest.mark.gpu
@every_kind
def test_a_gpu_gives_the_same_labels_again_and_alike_ones_in_chunks_of_another_size(kind: str) -> None:
    """Its sums go in another order with another chunk, so only the same chunks give the same bits."""
    logits_TV = 3 * torch.randn(300, 5000, generator=torch.Generator().manual_seed(0)).cuda()
    assert same(from_logits(kind, logits_TV, chunk=64), from_logits(kind, logits_TV, chunk=64))
    alike(from_logits(kind, logits_TV, chunk=7), from_logits(kind, logits_TV, chunk=300))


def alike(one: Labels, other: Labels) -> None:
    """The same labels, but for rounding."""
    if isinstance(one, TopK) and isinstance(other, TopK):
        assert np.array_equal(one.ids_TK, other.ids_TK)
        assert np.abs(one.codes_TK.astype(int) - other.codes_TK.astype(int)).max() <= 1
        np.testing.assert_allclose(one.log_tail_T, other.log_tail_T, rtol=1e-4, atol=1e-5)
    elif isinstance(one, Sampled) and isinstance(other, Sampled):
        # A draw that lies on an edge may fall to either side of it.
        assert (counts_of(one) == counts_of(other)).all(-1).mean() > 0.95
        assert (one.counts_TN.sum(-1) == other.draws).all()
    else:
        assert same(one, other)
