"""What a student's ranks are told, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ray.actor import ActorHandle

from cluster.labels.kinds import Labels, joined
from cluster.labels.wire import Stamp, read_block
from cluster.models import Packing, TeacherModel
from cluster.spec import FamilySpec, LabelsSpec, StudentSpec
from cluster.stream.figures import Delivery

# In a run's folder: one for each student, with its checkpoints.
STUDENTS_FOLDER = "students"
# What a checkpoint of a student holds, beside ZeRO's own state: the commit always, the model when it has finished.
COMMIT_FILE = "commit.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class StudentJob:
    """All that the ranks of one student need.

    Attributes:
        student_dir: local directory of the existing model that it starts from, if it does.
        batches: how many the pass has.
        stream, board: handles of the family's actors.
        storage: the run's folder or bucket, for checkpoints.
        packing: how it keeps packed documents apart.
    """

    name: str
    family: FamilySpec
    teacher: TeacherModel
    student_dir: str | None
    batches: int
    stream: ActorHandle
    board: ActorHandle
    storage: str
    packing: Packing = "unpacked"

    @property
    def spec(self) -> StudentSpec:
        """The student's own part of the spec."""
        return self.family.students[self.name]

    @property
    def folder(self) -> Path:
        """Of the student's Ray Train run: its checkpoints and their list."""
        return Path(self.storage) / STUDENTS_FOLDER / self.name

    def labels(self, delivery: Delivery, blocks: Sequence[np.ndarray], spec: LabelsSpec) -> Labels:
        """A delivery's labels, refused unless they are this teacher's, of this kind and this batch.

        Raises:
            LabelError: a block is damaged or was made from something else.
        """
        expected = Stamp.of(self.teacher.fingerprint, self.teacher.tokenizer, spec, delivery.batch.address)
        return joined([read_block(block, expected) for block in blocks])
