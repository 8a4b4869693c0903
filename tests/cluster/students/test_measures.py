"""Held-out sums of real models: per document those of the plain formula, however ranks and micro-batches share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.corpus.batches import STARTS_FILE, TOKENS_FILE, Batches, CorpusFacts
from cluster.evaluate.fidelity import fidelity_of
from cluster.evaluate.figures import Fidelity
from cluster.heads import head_of
from cluster.labels.make import make_labels
from cluster.labels.wire import Stamp, encode
from cluster.loading import load_model
from cluster.prefill import backbone_of
from cluster.stream.figures import Delivery
from cluster.students.job import StudentJob
from cluster.students.measures import HIDDEN, held_out_sums
from cluster.students.module import Student, inputs_of
from tests.cluster.students.test_champion import job_of
from tests.tiny import VOCABULARY, write_tiny_model

LENGTH, DOCUMENT, SEQUENCES, HELD_OUT = 32, 20, 12, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A student and its teacher."""
    other = write_tiny_model(tmp_path_factory.mktemp("student") / "model", layers=2, seed=1)
    student, teacher = (load_model(folder, dtype=torch.float32).eval() for folder in (other, tiny_teacher))
    return student, teacher


@pytest.fixture
def batches(tmp_path: Path, tiny_teacher: Path) -> Batches:
    """Two held-out batches of four sequences; documents of 20 tokens lie end to end in sequences of 32."""
    tokens_NS = np.random.default_rng(0).integers(4, VOCABULARY, (SEQUENCES, LENGTH)).astype(np.int32)
    # Either side of the cut is laid out on its own.
    sides = [np.arange(rows * LENGTH) % DOCUMENT == 0 for rows in (SEQUENCES - HELD_OUT, HELD_OUT)]
    np.save(tmp_path / TOKENS_FILE, tokens_NS)
    np.save(tmp_path / STARTS_FILE, np.concatenate(sides).reshape(tokens_NS.shape))
    documents = -(-HELD_OUT * LENGTH // DOCUMENT)
    facts = CorpusFacts(20, tokens_NS.size, SEQUENCES, "a", held_out=HELD_OUT, held_out_documents=documents)
    facts.write(tmp_path)
    return Batches(tmp_path, job_of(tiny_teacher).family.corpus, 2)


class HeldOut:
    """Stands in for the stream's reader: one rank's rows of the held-out batches with the teacher's hidden states."""

    def __init__(self, job: StudentJob, batches: Batches, teacher: Any, rank: int) -> None:
        self._job, self._batches, self._teacher, self._rank = job, batches, teacher, rank

    def held_out(self, number: int) -> tuple[Delivery, list[np.ndarray]]:
        job, delivery = self._job, Delivery.of(self._batches.held_out(number), [], self._rank, self._job.spec.ranks)
        inputs = inputs_of(delivery.batch, CPU)
        hidden_TD = Student(self._teacher, "exact")(inputs, lambda hidden_TD, _: hidden_TD)
        hidden_BSD = hidden_TD.new_zeros(*inputs.loss_mask_BS.shape, hidden_TD.shape[1])
        hidden_BSD[inputs.loss_mask_BS] = hidden_TD
        labels = make_labels(
            HIDDEN,
            hidden_BSD,
            delivery.batch.loss_mask_BS,
            head_of(self._teacher).logits,
            vocabulary=VOCABULARY,
            address=delivery.batch.address,
            chunk=64,
        )
        assert labels is not None
        stamp = Stamp.of(job.teacher.fingerprint, job.teacher.tokenizer, HIDDEN, delivery.batch.address)
        return delivery, [encode(labels, stamp)]


def measured(teacher_dir: Path, batches: Batches, models: tuple[Any, Any], ranks: int, micro_batch: int) -> Fidelity:
    """What the ranks of a student find together."""
    job = job_of(teacher_dir, evaluation={"batches": 2})
    spec = job.spec.model_copy(update={"ranks": ranks, "micro_batch": micro_batch})
    job = replace(job, family=job.family.model_copy(update={"students": {"small": spec}}))
    student, teacher = models
    head = head_of(teacher).cut(VOCABULARY)
    parts = []
    for rank in range(ranks):
        reader: Any = HeldOut(job, batches, teacher, rank)
        parts.append(held_out_sums(Student(student, "exact"), job, reader, head, CPU))
    return fidelity_of(torch.stack(parts).sum(0))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 4), (1, 1), (2, 2), (4, 1)])
@torch.no_grad()
def test_a_document_s_sums_are_those_of_the_document_alone(
    tiny_teacher: Path, batches: Batches, models: tuple[Any, Any], ranks: int, micro_batch: int
) -> None:
    found = measured(tiny_teacher, batches, models, ranks, micro_batch)
    tokens_T = np.concatenate([batches.held_out(number).tokens_BS for number in range(2)]).reshape(-1)
    expected = []
    for first in range(0, len(tokens_T), DOCUMENT):
        sums_4 = torch.zeros(4, dtype=torch.float64)
        # A piece of a document that goes on in the next sequence begins anew there.
        cuts = [first, *(at for at in range(first + 1, min(first + DOCUMENT, len(tokens_T))) if at % LENGTH == 0)]
        for start, stop in zip(cuts, [*cuts[1:], min(first + DOCUMENT, len(tokens_T))], strict=True):
            ids_1S = torch.from_numpy(tokens_T[None, start:stop].astype(np.int64))
            q_SV, p_SV = (
                (backbone_of(model)(ids_1S).last_hidden_state[0, :-1] @ model.lm_head.weight[:VOCABULARY].T)
                .double()
                .log_softmax(-1)
                for model in models
            )
            agreed_S = (q_SV.argmax(-1) == p_SV.argmax(-1)).double()
            cross_entropy_S = -q_SV.gather(1, ids_1S[0, 1:, None])[:, 0]
            sums_S4 = torch.stack(
                [torch.ones_like(agreed_S), (p_SV.exp() * (p_SV - q_SV)).sum(-1), agreed_S, cross_entropy_S], 1
            )
            sums_4 += sums_S4.sum(0)
        expected.append(sums_4.tolist())
    assert len(found.blocks) == len(expected) == 13
    assert np.array(found.blocks) == pytest.approx(np.array(expected), rel=1e-4, abs=1e-4)
    assert found.tokens == sum(block[0] for block in found.blocks)
