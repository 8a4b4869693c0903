"""A student's commits: how far it has learnt, with ZeRO's state or the finished model, as Ray Train checkpoints."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode

from cluster.space import size_of, wait_for_room
from cluster.students.elastic import ZERO_FOLDER, load_universal, make_universal
from cluster.students.job import COMMIT_FILE, StudentJob
from cluster.students.staging import Staging, remove_torn

# In a run's folder: what a student whose number of ranks has changed is loaded from, while it is loaded.
RESHARDED = "resharded"
# A weight in float32 with its master copy and AdamW's two moments.
STATE_BYTES = 16


class Commits:
    """One rank's part of its student's commits.

    Attributes:
        last: what the commit that this life begins with says of itself; none where there is none.
    """

    def __init__(self, job: StudentJob, rank: int) -> None:
        self._job, self._rank = job, rank
        self._storage, self._patience_s = Path(job.storage), job.family.patience_s
        self._staging = Staging(self._storage.name, job.name)
        self._universal = self._storage / RESHARDED / job.name
        if rank == 0:
            remove_torn(job.folder, _stored())
            # What a rank that was killed over it has left.
            shutil.rmtree(self._universal, ignore_errors=True)
        self.last = _last_commit()
        self._made_at = time.monotonic()

    @property
    def resharded(self) -> bool:
        """Whether another number of ranks made the last commit."""
        return self.last is not None and self.last["ranks"] != self._job.spec.ranks

    def due(self, batch: int) -> bool:
        """Whether to commit after ``batch`` batches, by ``checkpoints.every`` or by this rank's clock."""
        spec = self._job.family.checkpoints
        if spec.every is not None:
            return batch % spec.every == 0
        return time.monotonic() - self._made_at >= 60 * spec.minutes

    def take_up(self, engine: Any) -> None:
        """Load the training state of the last commit into a DeepSpeed engine. All ranks call it."""
        checkpoint = ray.train.get_checkpoint()
        assert checkpoint is not None
        with checkpoint.as_directory() as folder:
            if self.resharded:
                self._take_up_resharded(engine, Path(folder))
            else:
                engine.load_checkpoint(folder, tag=ZERO_FOLDER)

    def _take_up_resharded(self, engine: Any, folder: Path) -> None:
        """Load what another number of ranks has saved; rank 0 converts it, where all of them can read it."""
        if self._rank == 0:
            self._job.board.phase.remote(self._job.name, "resharding")
            wait_for_room(self._storage, 2 * size_of(folder), self._patience_s)
            make_universal(folder, self._universal)
        torch.distributed.barrier()
        load_universal(engine, self._universal)
        torch.distributed.barrier()
        if self._rank == 0:
            shutil.rmtree(self._universal)

    def make(self, facts: dict[str, Any], fill: Callable[[Path], None], parameters: int, wait: bool) -> None:
        """Report a checkpoint. All ranks call it.

        It is written down and then stored while the ranks learn on. It counts when it is whole on all of them; what
        was learnt after one that was not is learnt again.

        Args:
            facts: what the commit says of itself; rank 0's is kept.
            fill: writes this rank's files into a folder.
            parameters: of the student.
            wait: until it is stored.

        Raises:
            NoRoomError: the disk stayed full.
        """
        # Ray Train would queue any number of uploads. One at a time: then the room that is looked for is there, and a
        # crash never takes back more than the batches of two commits. An upload that fails ends the ranks by itself.
        _stored()
        self._made_at = time.monotonic()
        # It is written aside first, often on the same disk. What all ranks of a student write is at most this.
        wait_for_room(Path(tempfile.gettempdir()), parameters * STATE_BYTES, self._patience_s)
        with self._staging.folder() as folder:
            fill(folder)
            if self._rank == 0:
                (folder / COMMIT_FILE).write_text(json.dumps(facts))
            # All ranks write to it at the same time.
            wait_for_room(self._storage, size_of(folder) * self._job.spec.ranks, self._patience_s)
            ray.train.report(
                {"batch": facts["batch"]},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
                delete_local_checkpoint_after_upload=True,
            )


def _stored() -> list[str]:
    """Names of the checkpoints that are kept, once the last one that was reported is whole on all ranks."""
    reported = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    return [Path(each.checkpoint.path).name for each in reported]


def _last_commit() -> dict[str, Any] | None:
    """What the checkpoint that this life begins with says of itself; None where there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        commit: dict[str, Any] = json.loads((Path(folder) / COMMIT_FILE).read_text())
    return commit
