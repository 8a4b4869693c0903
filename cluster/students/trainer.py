"""One student as a Ray Train run: its ranks, its checkpoints, its restarts."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from textwrap import shorten

import ray

from cluster.board import STARTING, STARTING_AGAIN
from cluster.errors import RunError, first_line
from cluster.evaluate.figures import Fidelity, StudentResult
from cluster.session import ACTOR_LOST
from cluster.space import DISK_FULL, SPARE_BYTES, NoRoomError, wait_for_room, when_there_is_room
from cluster.students.job import COMMIT_FILE, MODEL_FOLDER, StudentJob
from cluster.students.snapshot import keep_last_only, mend

log = logging.getLogger(__name__)


class StoppedError(RunError):
    """A student ended before its last batch because the pass was held: not its failure, and the run is to stop."""


class Trainers:
    """A Ray actor that waits for the students' Ray Train runs, one thread each.

    One process for all, because each that imports Ray Train costs seconds of start-up. It is imported in the actor, not
    where the class is only named.
    """

    def __init__(self) -> None:
        import ray.train.torch  # noqa: F401  (before there is work, while the corpus is read)

    def run(self, job: StudentJob) -> StudentResult:
        """See :func:`run_student`."""
        return run_student(job)


def run_student(job: StudentJob) -> StudentResult:
    """Train one student to the end; blocks.

    Ray Train starts ranks again that died. What it does not get over is tried again here: that its own controller dies,
    or a rank before it has been told what to do, and that it cannot write down what it has, because the disk is full.

    Raises:
        StoppedError: the pass was held.
        RunError: its ranks failed more often than ``max_failures`` allows.
        NoRoomError: the disk stayed full; the run is told to stop.
    """
    import ray.train

    from cluster.students.steering import SHOWN, rank_failure

    allowed, phase = job.spec.max_failures, STARTING
    for attempt in range(allowed + 1):
        job.board.phase.remote(job.name, phase)
        _make_ready(job)
        try:
            return _fit(job)
        except ACTOR_LOST as error:
            reason = f"the controller of its ranks died: {first_line(error)}"
        except ray.train.TrainingFailedError as error:
            reason = rank_failure(error)
            if not (_disk_is_full(job, error) or _died_at_launch(error)):
                raise RunError(reason) from error
        if attempt == allowed:
            raise RunError(reason)
        log.warning("student %s is started again from its last checkpoint: %s", job.name, reason)
        phase = f"{STARTING_AGAIN} ({attempt + 1} of {allowed}): {shorten(reason, SHOWN)}"
    raise AssertionError("the last attempt returns or raises")


def _make_ready(job: StudentJob) -> None:
    """Wait for room on the disk, and see to the list of checkpoints.

    Raises:
        NoRoomError: the disk stayed full; the whole run has been told.
    """
    try:
        wait_for_room(Path(job.storage), 0, job.family.patience_s)
        when_there_is_room(Path(job.storage), partial(mend, job.folder), job.family.patience_s)
    except NoRoomError as error:
        ray.get(job.board.stop.remote(f"student {job.name}: {error}"))
        raise


def _fit(job: StudentJob) -> StudentResult:
    """One Ray Train run of a student, from its last checkpoint if it has one."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.students.steering import Restarts, Steering, rank

    spec, checkpoints = job.spec, job.family.checkpoints
    per_rank = {"CPU": spec.cpus_per_rank, "GPU": spec.gpus_per_rank, "memory": spec.memory_per_rank or 0}
    trainer = TorchTrainer(
        rank,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if spec.gpus_per_rank else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.ranks,
            use_gpu=spec.gpus_per_rank > 0,
            resources_per_worker={name: amount for name, amount in per_rank.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=str(job.folder.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=checkpoints.keep),
            failure_config=ray.train.FailureConfig(max_failures=spec.max_failures),
            callbacks=[Steering(job), Restarts(job)],
        ),
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise StoppedError("it was stopped before its first commit")
    finished = student_result(job.name, Path(result.checkpoint.path))
    when_there_is_room(job.folder, partial(keep_last_only, job.folder), job.family.patience_s)
    return finished


def _disk_is_full(job: StudentJob, error: Exception) -> bool:
    """Whether Ray Train itself found no room, or there is none for anybody: an upload then fails in a rank."""
    cause = getattr(error, "controller_failure", None)
    said = isinstance(cause, NoRoomError) or (isinstance(cause, OSError) and cause.errno in DISK_FULL)
    return said or shutil.disk_usage(job.storage).free < SPARE_BYTES


def _died_at_launch(error: Exception) -> bool:
    """Whether a rank died in the moment between its start and its work, which Ray Train does not try again."""
    return isinstance(getattr(error, "controller_failure", None), ACTOR_LOST)


def student_result(name: str, folder: Path) -> StudentResult:
    """What the last checkpoint of a finished student says of it.

    Raises:
        StoppedError: it has not finished.
    """
    commit = json.loads((folder / COMMIT_FILE).read_text())
    if commit["after"] is None:
        raise StoppedError(f"it was stopped after batch {commit['batch'] - 1}, which is committed")
    return StudentResult(
        name=name,
        model_dir=str(folder / MODEL_FOLDER),
        parameters=commit["parameters"],
        before=Fidelity(**commit["before"]),
        after=Fidelity(**commit["after"]),
        batches=commit["batch"],
        seconds=commit["seconds"],
    )
