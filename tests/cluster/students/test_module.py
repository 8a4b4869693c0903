"""A student's forward and its labels line up, and the loss does not depend on how a batch is cut up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.corpus.batches import Batch
from cluster.labels.from_hidden import topk_labels
from cluster.labels.kinds import TopK
from cluster.spec import TeacherLayers
from cluster.stream import Delivery
from cluster.students.initial import initial_student
from cluster.students.losses.divergence import distillation_loss
from cluster.students.module import Student, tokens_and_mask, topk_targets
from tests.tiny import VOCABULARY

SEQUENCES, LENGTH, K = 8, 16, 8


@pytest.fixture(scope="module")
def delivery() -> Delivery:
    """Eight sequences with uneven masks: the first have next to no loss tokens, as with long prompts."""
    tokens_BS = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, LENGTH)).astype(np.int32)
    mask_BS = np.arange(LENGTH)[None, :] >= np.array([14, 13, 12, 8, 4, 2, 1, 0])[:, None]
    mask_BS[:, -1] = False
    refs: list[ray.ObjectRef] = []
    return Delivery(Batch(0, tokens_BS, mask_BS), refs, int(mask_BS.sum()))


@pytest.fixture(scope="module")
def labels(tiny_teacher: Path, delivery: Delivery) -> TopK:
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    with torch.no_grad():
        hidden_BSD = teacher.model(torch.from_numpy(delivery.batch.tokens_BS).long()).last_hidden_state
        made = topk_labels(hidden_BSD, teacher.lm_head, k=K, temperature=1.0, vocabulary=VOCABULARY, chunk=7)
    assert made is not None
    return made


def gradients(tiny_teacher: Path, delivery: Delivery, labels: TopK, micro: int, ranks: int = 1) -> dict[str, Tensor]:
    """The gradient of one optimiser step: as the loop scales it and as DeepSpeed averages it."""
    init = TeacherLayers(source="teacher", layers=[0, 3])
    model = initial_student(init, teacher_dir=str(tiny_teacher), student_dir=None, dtype=torch.float32)
    student, steps = Student(model), SEQUENCES // (micro * ranks)
    scale = ranks * steps / delivery.loss_tokens
    for first in range(0, SEQUENCES, micro):
        tokens_BS, mask_BS = tokens_and_mask(delivery, slice(first, first + micro), torch.device("cpu"))
        target = topk_targets(tokens_BS, mask_BS, labels.rows(first, first + micro))
        loss, *_ = student(
            tokens_BS,
            mask_BS,
            lambda h, w, t=target: distillation_loss(
                h, w, t, vocabulary=VOCABULARY, hard=0.1, soft=0.9, temperature=1.0
            ),
        )
        (loss * scale / (ranks * steps)).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)])
def test_many_micro_batches_give_the_gradient_of_the_whole_batch(
    tiny_teacher: Path, delivery: Delivery, labels: TopK, micro: int, ranks: int
) -> None:
    whole = gradients(tiny_teacher, delivery, labels, SEQUENCES)
    cut = gradients(tiny_teacher, delivery, labels, micro, ranks)
    assert cut.keys() == whole.keys()
    assert len(whole) > 20
    worst = max(float((cut[name] - whole[name]).norm() / whole[name].norm()) for name in whole)
    assert worst < 1e-5


def test_a_position_is_scored_against_the_token_after_it() -> None:
    tokens_BS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    mask_BS = torch.tensor([[False, True, True, False], [True, False, True, False]])
    column = np.array([[0.0, 1, 2, 3], [4, 5, 6, 7]], dtype=np.float32)
    labels = TopK(column[..., None].astype(np.uint16), -column[..., None], -10 - column)
    target = topk_targets(tokens_BS, mask_BS, labels)
    assert target.next_T.tolist() == [12, 13, 21, 23]
    assert target.ids_TK.tolist() == [[1], [2], [4], [6]]
    assert target.logprobs_TK.tolist() == [[-1], [-2], [-4], [-6]]
    assert target.log_tail_T.tolist() == [-11, -12, -14, -16]
    assert target.ids_TK.dtype == target.next_T.dtype == torch.int64


def test_the_head_is_given_the_hidden_states_of_the_loss_tokens(tiny_teacher: Path, delivery: Delivery) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    tokens_BS, mask_BS = tokens_and_mask(delivery, slice(2, 5), torch.device("cpu"))
    with torch.no_grad():
        logits_TV = Student(model)(tokens_BS, mask_BS, lambda hidden_TD, weight_VD: hidden_TD @ weight_VD.T)
        expected = model(tokens_BS).logits[mask_BS]
    torch.testing.assert_close(logits_TV, expected)
    assert len(logits_TV) == int(delivery.batch.loss_mask_BS[2:5].sum())


def test_the_labels_and_the_student_s_logits_lie_at_the_same_positions(
    tiny_teacher: Path, delivery: Delivery, labels: TopK
) -> None:
    """The teacher as its own student has nothing to learn, through every step from tokens to loss."""
    student = Student(AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32))
    tokens_BS, mask_BS = tokens_and_mask(delivery, slice(0, SEQUENCES), torch.device("cpu"))
    weights: dict[str, Any] = {"vocabulary": VOCABULARY, "hard": 0.0, "soft": 1.0, "temperature": 1.0}
    for roll, same in ((0, True), (1, False)):
        columns = (labels.ids_BSK, labels.logprobs_BSK, labels.log_tail_BS)
        target = topk_targets(tokens_BS, mask_BS, TopK(*(np.roll(c, roll, axis=1) for c in columns)))
        _, kl, _ = student(tokens_BS, mask_BS, lambda h, w, t=target: distillation_loss(h, w, t, **weights))
        assert (abs(float(kl)) / delivery.loss_tokens < 1e-5) is same


def test_tokens_and_mask_are_copies_that_may_be_written_to(delivery: Delivery) -> None:
    for column in (delivery.batch.tokens_BS, delivery.batch.loss_mask_BS):
        column.flags.writeable = False  # as out of Ray's store
    tokens_BS, mask_BS = tokens_and_mask(delivery, slice(1, 3), torch.device("cpu"))
    assert (tokens_BS.dtype, mask_BS.dtype) == (torch.int64, torch.bool)
    assert np.array_equal(tokens_BS.numpy(), delivery.batch.tokens_BS[1:3])
    assert np.array_equal(mask_BS.numpy(), delivery.batch.loss_mask_BS[1:3])
    assert not np.shares_memory(mask_BS.numpy(), delivery.batch.loss_mask_BS)
