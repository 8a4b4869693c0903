"""One student as a Ray Train run: its ranks, its checkpoints, its restarts."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import RunError
from cluster.evaluate.figures import Fidelity, StudentResult
from cluster.students.job import COMMIT_FILE, MODEL_FOLDER, STUDENTS_FOLDER, StudentJob


class Trainers:
    """A Ray actor that waits for the students' Ray Train runs, one thread each.

    One process for all, because each that imports torch and Ray Train costs seconds of start-up. They are imported in
    the actor, not where the class is only named.
    """

    def __init__(self) -> None:
        import cluster.students.loop  # noqa: F401  (before there is work, while the corpus is read)

    def run(self, job: StudentJob) -> StudentResult:
        """See :func:`run_student`."""
        return run_student(job)


def run_student(job: StudentJob) -> StudentResult:
    """Train one student to the end; blocks.

    Raises:
        RunError: its ranks failed more often than ``max_failures`` allows.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.students.loop import train_student

    spec, checkpoints = job.spec, job.family.checkpoints
    per_rank = {"CPU": spec.cpus_per_rank, "GPU": spec.gpus_per_rank}
    trainer = TorchTrainer(
        train_student,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if spec.gpus_per_rank else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.ranks,
            use_gpu=spec.gpus_per_rank > 0,
            resources_per_worker={name: amount for name, amount in per_rank.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=f"{job.storage}/{STUDENTS_FOLDER}",
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=checkpoints.keep),
            failure_config=ray.train.FailureConfig(max_failures=spec.max_failures),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunError(_root_cause(error)) from error
    if result.checkpoint is None:
        raise RunError("it ended without a checkpoint")
    return student_result(job.name, Path(result.checkpoint.path))


def _root_cause(error: Exception) -> str:
    """What the first rank that failed said, in one line."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(failures.items())
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"rank {rank}: {lines[-1] if lines else type(cause).__name__}"


def student_result(name: str, folder: Path) -> StudentResult:
    """What the last checkpoint of a finished student says of it."""
    commit = json.loads((folder / COMMIT_FILE).read_text())
    return StudentResult(
        name=name,
        model_dir=str(folder / MODEL_FOLDER),
        parameters=commit["parameters"],
        before=Fidelity(**commit["before"]),
        after=Fidelity(**commit["after"]),
        batches=commit["batch"],
        seconds=commit["seconds"],
    )
