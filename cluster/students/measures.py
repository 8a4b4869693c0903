"""What a student is measured by while and after it learns: fidelity, calibration, and the angle of its gradient."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.evaluate.fidelity import FIDELITY_SUMS, fidelity_of, fidelity_sums
from cluster.evaluate.figures import Fidelity
from cluster.heads import OutputHead
from cluster.labels.kinds import Labels
from cluster.labels.make import as_tensor, make_labels
from cluster.spec import HiddenLabels
from cluster.stream.reader import Reader
from cluster.students.angle import angle_sums
from cluster.students.job import StudentJob
from cluster.students.losses.from_labels import targets_of
from cluster.students.losses.objective import objective_at
from cluster.students.losses.targets import HiddenTargets
from cluster.students.module import Inputs, inputs_of

HIDDEN = HiddenLabels(kind="hidden")


@torch.no_grad()
def held_out_sums(
    student: Any, job: StudentJob, reader: Reader, teacher_head: OutputHead[Tensor], device: torch.device
) -> Tensor:
    """A student's :func:`fidelity_sums` over one rank's share of the held-out batches.

    Args:
        student: a :class:`~cluster.students.module.Student` in evaluation mode, be it the one that learns or another.
        job, reader: say which batches, in which micro-batches and for which rank.
    """
    size = job.spec.micro_batch
    sums = torch.zeros(FIDELITY_SUMS, dtype=torch.float64, device=device)
    for number in range(job.family.evaluation.batches):
        delivery, blocks = reader.held_out(number)
        labels = job.labels(delivery, blocks, HIDDEN)
        for first in range(0, labels.sequences, size):
            batch = delivery.batch.rows(first, first + size)
            assert batch.blocks_BS is not None, "a held-out batch has blocks"
            inputs = inputs_of(batch, device)
            block_T = torch.from_numpy(batch.blocks_BS[batch.loss_mask_BS].astype(np.int64)).to(device)
            teacher = _exact(labels.rows(first, first + size), inputs, teacher_head)
            use = partial(fidelity_sums, teacher_logits=teacher.logits, next_T=inputs.next_T, block_T=block_T)
            sums += student(inputs, partial(use, vocabulary=job.teacher.vocabulary))
    return sums


class Measures:
    """Measures one rank's share of a student on the held-out batches, which the teacher scored exactly.

    Args:
        engine: DeepSpeed's, around a :class:`~cluster.students.module.Student`. All ranks measure at the same time.
    """

    def __init__(self, job: StudentJob, engine: Any, reader: Reader, device: torch.device) -> None:
        self._job, self._engine, self._reader, self._device = job, engine, reader, device
        self._kept: OutputHead[Tensor] | None = None

    def _head(self) -> OutputHead[Tensor]:
        """The teacher's head on this rank's device."""
        return self._reader.teacher_head().map(lambda kept: as_tensor(kept).to(self._device))

    def kept_head(self) -> OutputHead[Tensor] | None:
        """The teacher's head where the labels need it at every batch, else None; fetched once."""
        if self._job.family.labels.kind != "hidden":
            return None
        if self._kept is None:
            self._kept = self._head()
        return self._kept

    def _all_ranks(self, sums: Tensor) -> Tensor:
        if self._job.spec.ranks > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def fidelity(self) -> Fidelity:
        """Fidelity on the held-out batches; every rank measures its rows and the sums are added."""
        kept = self.kept_head()
        self._engine.eval()
        sums = held_out_sums(
            self._engine.module, self._job, self._reader, self._head() if kept is None else kept, self._device
        )
        self._engine.train()
        return fidelity_of(self._all_ranks(sums))

    @torch.no_grad()
    def gradient_angle(self, number: int) -> float | None:
        """Degrees between the gradient that the labels in use give and the exact one, see :func:`angle_sums`.

        Measured on one held-out sequence per rank. None where it says nothing: the labels are exact, or a rank has
        no token that carries loss.
        """
        job = self._job
        if job.family.labels.kind in ("hidden", "dense"):
            return None
        delivery, blocks = self._reader.held_out(0)
        head = self._head()
        batch = delivery.batch.rows(0, 1)
        inputs = inputs_of(batch, self._device)
        exact = _exact(job.labels(delivery, blocks, HIDDEN).rows(0, 1), inputs, head)
        labels = make_labels(
            job.family.labels,
            _on_grid(exact.hidden_TD, inputs),
            batch.loss_mask_BS,
            head.logits,
            vocabulary=job.teacher.vocabulary,
            address=delivery.batch.address,
            chunk=job.family.teacher.tokens_per_chunk,
        )
        assert labels is not None
        target = targets_of(labels, inputs.next_T, None)
        objective = objective_at(job.spec.loss, job.family.labels, number, job.batches)
        use = partial(angle_sums, target=target, exact=exact, objective=objective)
        # Without dropout, as it is the labels' angle that is asked for, and nothing may be drawn.
        self._engine.eval()
        sums = self._engine.module(inputs, partial(use, vocabulary=job.teacher.vocabulary))
        self._engine.train()
        dot, own, whole = self._all_ranks(sums).tolist()
        if not own or not whole:
            return None
        return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.sqrt(own * whole)))))


def _exact(labels: Labels, inputs: Inputs, head: OutputHead[Tensor]) -> HiddenTargets:
    """The teacher's exact distributions at the loss tokens of some sequences."""
    target = targets_of(labels, inputs.next_T, head)
    assert isinstance(target, HiddenTargets)
    return target


def _on_grid(hidden_TD: Tensor, inputs: Inputs) -> Tensor:
    """Hidden states of the loss tokens at their places in the sequence; zeros elsewhere."""
    grid_BSD = hidden_TD.new_zeros(*inputs.loss_mask_BS.shape, hidden_TD.shape[1])
    grid_BSD[inputs.loss_mask_BS] = hidden_TD
    return grid_BSD
