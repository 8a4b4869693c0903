"""A student's forward and its labels line up, and the loss does not depend on how a batch is cut up."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.corpus.batches import Batch, content_address, positions_of
from cluster.heads import OutputHead, head_of
from cluster.labels.kinds import Dense, Hidden, Labels, Sampled, TopK, encode_logprobs
from cluster.labels.make import make_labels
from cluster.spec import DenseLabels, HiddenLabels, LabelsSpec, SampledLabels, TeacherLayers, TopKLabels
from cluster.students.initial import initial_student
from cluster.students.losses.from_labels import targets_of
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import BucketTargets, FullTargets, HiddenTargets, SampledTargets
from cluster.students.module import Inputs, Student, inputs_of
from tests.tiny import VOCABULARY

SEQUENCES, LENGTH = 8, 16
CPU = torch.device("cpu")
KINDS: dict[str, LabelsSpec] = {
    "topk": TopKLabels(k=8),
    "sampled": SampledLabels(kind="sampled", draws=1024),
    "hidden": HiddenLabels(kind="hidden"),
    "dense": DenseLabels(kind="dense"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make_batch(starts_BS: Any = None) -> Batch:
    """Eight sequences with uneven masks: the first have next to no loss tokens, as with long prompts."""
    tokens_BS = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH)).astype(np.int32)
    mask_BS = np.arange(LENGTH)[None, :] >= np.array([14, 13, 12, 8, 4, 2, 1, 0])[:, None]
    mask_BS[:, -1] = False
    starts_BS = np.zeros_like(mask_BS) if starts_BS is None else starts_BS
    mask_BS[:, :-1] &= ~starts_BS[:, 1:]
    positions_BS = positions_of(starts_BS)
    return Batch(0, tokens_BS, mask_BS, positions_BS, content_address(tokens_BS, mask_BS, positions_BS))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


@pytest.fixture(scope="module")
def packed_batch() -> Batch:
    """Documents that begin inside of sequences, at different places in each; the last sequence is one document."""
    starts_BS = np.zeros((SEQUENCES, LENGTH), dtype=np.bool_)
    for row in range(SEQUENCES - 1):
        starts_BS[row, [row + 3, 12]] = True
    return make_batch(starts_BS)


def load(tiny_teacher: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)


def score(tiny_teacher: Path, batch: Batch, kind: str) -> tuple[Labels, OutputHead[Tensor]]:
    """The teacher's labels of a batch, and its head."""
    teacher, inputs = load(tiny_teacher), inputs_of(batch, CPU)
    with torch.no_grad():
        hidden_BSD = teacher.model(
            inputs.tokens_BS, position_ids=inputs.positions_BS, use_cache=False
        ).last_hidden_state
        made = make_labels(
            KINDS[kind],
            hidden_BSD,
            batch.loss_mask_BS,
            head_of(teacher).logits,
            vocabulary=VOCABULARY,
            address=batch.address,
            chunk=7,
        )
    assert made is not None
    return made, head_of(teacher).cut(VOCABULARY).map(Tensor.detach)


def learn(
    student: Student, batch: Batch, labels: Labels, head: OutputHead[Tensor], objective: Objective
) -> tuple[Tensor, Tensor]:
    """Loss and sums of some sequences, from tokens to loss as the loop goes."""
    inputs = inputs_of(batch, CPU)
    target = targets_of(labels, inputs.next_T, head)
    return student(inputs, partial(distillation_loss, target=target, objective=objective, vocabulary=VOCABULARY))


def gradients(
    tiny_teacher: Path, batch: Batch, labels: Labels, head: OutputHead[Tensor], micro: int, ranks: int = 1
) -> dict[str, Tensor]:
    """The gradient of one optimiser step: as the loop scales it and as DeepSpeed averages it."""
    init = TeacherLayers(source="teacher", layers=[0, 3])
    model = initial_student(init, teacher_dir=str(tiny_teacher), student_dir=None, dtype=torch.float32)
    student, steps = Student(model, "exact"), SEQUENCES // (micro * ranks)
    scale = ranks * steps / batch.loss_tokens
    for first in range(0, SEQUENCES, micro):
        part = batch.rows(first, first + micro)
        loss, _ = learn(student, part, labels.rows(first, first + micro), head, Objective(0.1, 0.9))
        (loss * scale / (ranks * steps)).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_many_micro_batches_give_the_gradient_of_the_whole_batch(
    tiny_teacher: Path, batch: Batch, packed_batch: Batch, packed: bool, kind: str
) -> None:
    batch = packed_batch if packed else batch
    labels, head = score(tiny_teacher, batch, kind)
    whole = gradients(tiny_teacher, batch, labels, head, SEQUENCES)
    assert len(whole) > 20
    for micro, ranks in [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)]:
        cut = gradients(tiny_teacher, batch, labels, head, micro, ranks)
        assert cut.keys() == whole.keys()
        assert max(float((cut[name] - whole[name]).norm() / whole[name].norm()) for name in whole) < 1e-5


MASK_BS = np.array([[False, True, True, False], [True, False, True, False]])
ABOUT = (MASK_BS, VOCABULARY, 1.0)
ROWS_T = np.array([1, 2, 4, 6])
WIDE_TV = np.tile(ROWS_T[:, None], VOCABULARY).astype(np.float32)


def test_a_position_is_scored_against_the_token_after_it() -> None:
    tokens_BS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert Inputs(tokens_BS, None, torch.from_numpy(MASK_BS)).next_T.tolist() == [12, 13, 21, 23]


def test_top_k_columns_become_a_row_per_loss_token() -> None:
    next_T = torch.tensor([12, 13, 21, 23])
    codes_TK = encode_logprobs(-ROWS_T[:, None].astype(np.float32))
    log_tail_T = np.log1p(-np.exp(-ROWS_T)).astype(np.float32)
    labels = TopK(*ABOUT, ROWS_T[:, None].astype(np.uint16), codes_TK, log_tail_T)
    target = targets_of(labels, next_T, None)
    assert isinstance(target, BucketTargets)
    assert target.next_T.tolist() == next_T.tolist()
    assert target.ids_TK.tolist() == [[1], [2], [4], [6]]
    assert target.ids_TK.dtype == torch.int64
    assert target.logprobs_TK.flatten().tolist() == pytest.approx([-1, -2, -4, -6], abs=1e-3)
    assert target.log_tail_T.tolist() == pytest.approx(log_tail_T.tolist(), abs=1e-3)
    assert (target.logprobs_TK.exp().sum(-1) + target.log_tail_T.exp()).tolist() == pytest.approx([1] * 4, abs=1e-6)
    second = targets_of(labels.rows(1, 2), next_T[2:], None)
    assert isinstance(second, BucketTargets)
    assert second.ids_TK.tolist() == [[4], [6]]


def test_draws_become_shares_without_the_columns_that_nobody_fills() -> None:
    ids_TN = np.array([[3, 5, 0, 0], [1, 0, 0, 0], [2, 7, 9, 0], [0, 299, 0, 0]], dtype=np.uint16)
    counts_TN = np.array([[1, 3, 0, 0], [4, 0, 0, 0], [2, 1, 1, 0], [2, 2, 0, 0]], dtype=np.uint16)
    target = targets_of(
        Sampled(*ABOUT, ids_TN, counts_TN, ROWS_T.astype(np.float32), 4), torch.tensor([1, 2, 3, 4]), None
    )
    assert isinstance(target, SampledTargets)
    assert target.ids_TK.tolist() == ids_TN[:, :3].tolist()
    assert target.shares_TK.tolist() == [[0.25, 0.75, 0], [1, 0, 0], [0.5, 0.25, 0.25], [0.5, 0.5, 0]]
    assert target.entropy_T.tolist() == [1, 2, 4, 6]


def test_logits_and_hidden_states_keep_their_rows_and_precision() -> None:
    next_T = torch.tensor([1, 2, 3, 4])
    bits_TV = (WIDE_TV.view(np.uint32) >> 16).astype(np.uint16)
    for wide_TV, dtype in ((WIDE_TV, torch.float32), (bits_TV, torch.bfloat16)):
        dense = targets_of(Dense(*ABOUT, wide_TV), next_T, None)
        hidden = targets_of(Hidden(*ABOUT, wide_TV), next_T, OutputHead(torch.eye(VOCABULARY, dtype=dtype)))
        assert isinstance(dense, FullTargets) and isinstance(hidden, HiddenTargets)
        assert dense.logits_TV.dtype == hidden.hidden_TD.dtype == dtype
        assert dense.logits_TV[:, 0].tolist() == hidden.logits(slice(0, 4))[:, 0].tolist() == [1, 2, 4, 6]


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_is_given_the_hidden_states_of_the_loss_tokens(
    tiny_teacher: Path, batch: Batch, packed_batch: Batch, packed: bool
) -> None:
    model, part = load(tiny_teacher), (packed_batch if packed else batch).rows(2, 5)
    inputs = inputs_of(part, CPU)
    with torch.no_grad():
        logits_TV = Student(model, "exact")(inputs, lambda hidden_TD, head: head.logits(hidden_TD))
        logits_BSV = model(inputs.tokens_BS, position_ids=inputs.positions_BS, use_cache=False).logits
    torch.testing.assert_close(logits_TV, logits_BSV[inputs.loss_mask_BS])
    assert len(logits_TV) == part.loss_tokens


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_the_labels_and_the_student_s_logits_lie_at_the_same_positions(
    tiny_teacher: Path, batch: Batch, packed_batch: Batch, packed: bool, kind: str
) -> None:
    """The teacher as its own student has nothing to learn, through every step from tokens to loss."""
    batch = packed_batch if packed else batch
    labels, head = score(tiny_teacher, batch, kind)
    student = Student(load(tiny_teacher), "exact")
    moved = {name: np.roll(getattr(labels, name), 1, axis=0) for name in labels.columns()}
    own, wrong = (
        abs(float(learn(student, batch, each, head, Objective(0.0, 1.0))[1][1])) / batch.loss_tokens
        for each in (labels, replace(labels, **moved))
    )
    assert own < (0.05 if kind == "sampled" else 1e-5)  # draws are exact only in the mean
    assert wrong > 0.5


@every_kind
@pytest.mark.parametrize("whole", [False, True], ids=["some sequences", "a whole batch"])
def test_sequences_without_loss_tokens_give_no_loss_and_no_gradient(
    tiny_teacher: Path, batch: Batch, whole: bool, kind: str
) -> None:
    mask_BS = batch.loss_mask_BS.copy()
    mask_BS[: None if whole else 3] = False
    batch = replace(batch, loss_mask_BS=mask_BS)
    labels, head = score(tiny_teacher, batch, kind)
    student = Student(load(tiny_teacher), "exact")
    loss, sums = learn(student, batch.rows(0, 3), labels.rows(0, 3), head, Objective(0.1, 0.9))
    loss.backward()
    assert float(loss.detach()) == 0.0 and not sums.any()
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


def test_inputs_are_copies_that_may_be_written_to(packed_batch: Batch) -> None:
    for column in (packed_batch.tokens_BS, packed_batch.loss_mask_BS, packed_batch.positions_BS):
        column.flags.writeable = False  # as out of Ray's store
    part = packed_batch.rows(1, 3)
    inputs = inputs_of(part, CPU)
    assert inputs.positions_BS is not None
    assert (inputs.tokens_BS.dtype, inputs.positions_BS.dtype) == (torch.int64, torch.int64)
    assert inputs.loss_mask_BS.dtype == torch.bool
    assert np.array_equal(inputs.tokens_BS.numpy(), part.tokens_BS)
    assert np.array_equal(inputs.positions_BS.numpy(), part.positions_BS)
    assert np.array_equal(inputs.loss_mask_BS.numpy(), part.loss_mask_BS)
    assert not np.shares_memory(inputs.loss_mask_BS.numpy(), packed_batch.loss_mask_BS)


def test_sequences_of_one_document_each_need_no_positions(batch: Batch, packed_batch: Batch) -> None:
    assert inputs_of(batch, CPU).positions_BS is None
    assert inputs_of(packed_batch.rows(SEQUENCES - 1, SEQUENCES), CPU).positions_BS is None


FIRST, SECOND = 6, 10


def two_documents() -> Inputs:
    """Two sequences, the first of documents of 6 and 10 tokens, the second of 10 and 6."""
    tokens_BS = torch.randint(1, VOCABULARY, (2, FIRST + SECOND), generator=torch.Generator().manual_seed(1))
    places = [[*range(FIRST), *range(SECOND)], [*range(SECOND), *range(FIRST)]]
    return Inputs(tokens_BS, torch.tensor(places), torch.ones_like(tokens_BS, dtype=torch.bool))


def alone(inputs: Inputs) -> list[Inputs]:
    """Each document as a sequence of its own, in order."""
    (first, second), mask = inputs.tokens_BS, torch.ones(1, FIRST + SECOND, dtype=torch.bool)
    parts = (first[:FIRST], first[FIRST:], second[:SECOND], second[SECOND:])
    return [Inputs(part[None], None, mask[:, : len(part)]) for part in parts]


def a_student(tiny_teacher: Path, checkpointing: bool) -> Student:
    model = load(tiny_teacher).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return Student(model, "exact")


def states_and_gradients(student: Student, parts: list[Inputs]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of all tokens in order, and the gradients of a sum that weighs each of them differently."""
    student.zero_grad()
    hidden_TD = torch.cat([student(part, lambda hidden_TD, head: hidden_TD) for part in parts])
    weights_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(2))
    (hidden_TD * weights_TD).sum().backward()
    return hidden_TD.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_do_not_see_each_other(tiny_teacher: Path, checkpointing: bool) -> None:
    student, packed = a_student(tiny_teacher, checkpointing), two_documents()
    hidden_TD, grads = states_and_gradients(student, [packed])
    alone_TD, alone_grads = states_and_gradients(student, alone(packed))
    assert float((hidden_TD - alone_TD).abs().max()) < 1e-5
    assert grads.keys() == alone_grads.keys()
    assert max(float((grads[name] - g).norm() / g.norm()) for name, g in alone_grads.items()) < 1e-5
    blind_TD, _ = states_and_gradients(student, [replace(packed, positions_BS=None)])
    assert float((blind_TD - alone_TD).abs().max()) > 0.1


def test_checkpointing_changes_no_gradient(tiny_teacher: Path) -> None:
    packed = two_documents()
    hidden_TD, grads = states_and_gradients(a_student(tiny_teacher, False), [packed])
    again_TD, again = states_and_gradients(a_student(tiny_teacher, True), [packed])
    torch.testing.assert_close(again_TD, hidden_TD)
    assert max(float((again[name] - g).norm() / g.norm()) for name, g in grads.items()) < 1e-6
