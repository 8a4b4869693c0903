"""What a student's ranks are told, and what its checkpoints hold."""

from __future__ import annotations

from dataclasses import dataclass

from ray.actor import ActorHandle

from cluster.spec import FamilySpec, StudentSpec

# What a checkpoint of a student holds, beside ZeRO's own state: the commit always, the model when it has finished.
COMMIT_FILE = "commit.json"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class StudentJob:
    """All that the ranks of one student need.

    Attributes:
        teacher_dir, student_dir: local model directories; the second for a pretrained student only.
        vocabulary: the tokenizer's real size.
        batches: how many the pass has.
        stream, board: handles of the family's actors.
        storage: the run's folder or bucket, for checkpoints.
    """

    name: str
    family: FamilySpec
    teacher_dir: str
    student_dir: str | None
    vocabulary: int
    batches: int
    stream: ActorHandle
    board: ActorHandle
    storage: str

    @property
    def spec(self) -> StudentSpec:
        """The student's own part of the spec."""
        return self.family.students[self.name]
