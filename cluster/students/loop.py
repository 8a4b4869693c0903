"""What every rank of a student runs: read a batch and its labels, learn, commit. Started by Ray Train."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor
from transformers import set_seed

from cluster import tracing
from cluster.audit import AuditLog
from cluster.board import Point
from cluster.devices import see_no_gpu
from cluster.errors import RunError
from cluster.evaluate.figures import Fidelity
from cluster.flops import TRAINING, Work, parameters_of, peak_flops
from cluster.heads import probe_head
from cluster.memory import keep_memory
from cluster.packing import verify_packing
from cluster.registry import on_this_node
from cluster.session import ACTOR_LOST
from cluster.space import NoRoomError
from cluster.stream.figures import HeldError
from cluster.stream.reader import Reader
from cluster.students.commits import Commits
from cluster.students.elastic import ZERO_FOLDER
from cluster.students.initial import initial_student
from cluster.students.job import MODEL_FOLDER, StudentJob
from cluster.students.losses.from_labels import targets_of
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.objective import objective_at
from cluster.students.measures import Measures
from cluster.students.module import Student, inputs_of
from cluster.students.zero import adamw, gathered_state, reduce_nothing, schedule_of, use_plain_gloo, zero_config

log = logging.getLogger(__name__)


def seed_micro_batch(seed: int, student: str, batch: int, row: int) -> None:
    """Seed Python, NumPy and torch (all devices) before one micro-batch, so that its dropout depends on nothing else.

    A resumed student therefore draws what it would have drawn without the interruption, whatever ran in between and on
    whatever number of ranks, and no random state has to be committed.

    Args:
        seed: the corpus' seed.
        row: the micro-batch's first sequence in the global batch.
    """
    digest = hashlib.sha256(f"{seed} {student} {batch} {row}".encode()).digest()
    set_seed(int.from_bytes(digest[:4], "big"))


# How long a commit waits for a board that is being started again.
BOARD_S = 60.0


class _Rank:
    """One rank of one student, for as long as its process lives."""

    def __init__(self, job: StudentJob) -> None:
        self.job, self.spec = job, job.spec
        self.rank = ray.train.get_context().get_world_rank()
        # Ray Train shows the ranks on a node each other's GPUs too, so a rank's own is not always the first.
        self.device = ray.train.torch.get_device() if self.spec.gpus_per_rank else torch.device("cpu")
        torch.set_num_threads(max(1, int(self.spec.cpus_per_rank)))
        keep_memory()
        self.commits = Commits(job, self.rank)
        self._build()
        self.reader = Reader(job.stream, job.name, self.rank, job.batches)
        self.measures = Measures(job, self.engine, self.reader, self.device)
        self.before: Fidelity | None = None
        self.finished = False
        # Points that the board has not acknowledged.
        self._posted: list[ray.ObjectRef] = []
        self.audit: AuditLog | None = None
        self.trained_s = 0.0
        self.commit_is_due = False

    def _build(self) -> None:
        import deepspeed

        dtype = torch.bfloat16 if self.spec.precision == "bfloat16" else torch.float32
        self.model = initial_student(
            self.spec.init,
            teacher_dir=on_this_node(self.job.teacher.folder),
            student_dir=self.job.student_dir and on_this_node(self.job.student_dir),
            dtype=dtype,
            trust_remote_code=self.job.family.trusts_code(self.job.name),
        ).to(self.device)
        probe_head(self.model, f"students.{self.job.name}", self.job.teacher.vocabulary)
        verify_packing(self.model, self.job.packing, f"student {self.job.name}")
        self.model.train()
        if self.spec.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.work = Work(parameters_of(self.model), TRAINING, peak_flops(self.device), self.spec.ranks)
        module = Student(self.model, self.job.packing)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module, self.spec),
            lr_scheduler=schedule_of(self.spec, self.job.batches),
            config=zero_config(
                self.spec, self.job.family.corpus.batch_sequences, load_universal=self.commits.resharded
            ),
            dist_init_required=False,
        )
        if self.spec.ranks == 1:
            reduce_nothing(self.engine)

    def say(self, phase: str) -> None:
        """Post what this student does now."""
        if self.rank == 0:
            self.job.board.phase.remote(self.job.name, phase)

    # -- resuming and committing -----------------------------------------------------------------------------------

    def restore(self) -> int:
        """Load the last commit. Returns the first batch that is still to be learnt; ``finished`` when all is done."""
        last = self.commits.last
        if last is None:
            return 0
        self.before, self.trained_s = Fidelity(**last["before"]), last["seconds"]
        self.finished = last["after"] is not None
        # A commit from before micro_batch was recorded has none.
        made_on = {name: last.get(name) for name in ("ranks", "micro_batch")}
        if self.rank == 0 and made_on != (now := self._layout()):
            log.warning(
                "student %s resumes after batch %d with %s, committed with %s; sums are added in another order%s",
                self.job.name,
                last["batch"] - 1,
                now,
                made_on,
                "" if made_on["micro_batch"] == now["micro_batch"] else ", and dropout draws other masks from here on",
            )
        if not self.finished:
            self.commits.take_up(self.engine)
        return int(last["batch"])

    def _layout(self) -> dict[str, int]:
        return {"ranks": self.spec.ranks, "micro_batch": self.spec.micro_batch}

    def commit(self, batch: int, after: Fidelity | None = None, last: bool = False) -> None:
        """Commit the number of batches learnt with the training state; with ``after`` the finished model instead.

        That, and the ``last`` of a run that ends before, is waited for until it is stored, see :meth:`Commits.make`.
        """
        assert self.before is not None
        self._await_board()
        facts = {
            "batch": batch,
            **self._layout(),
            "seconds": self.trained_s,
            "parameters": self.parameters,
            "before": asdict(self.before),
            "after": asdict(after) if after else None,
        }

        def fill(folder: Path) -> None:
            if after is None:
                self.engine.save_checkpoint(str(folder), tag=ZERO_FOLDER)
            else:
                self._export(folder / MODEL_FOLDER)

        self.commits.make(facts, fill, self.parameters, wait=last or after is not None)

    def _export(self, folder: Path) -> None:
        """Write the model and its tokenizer as rank 0; the other ranks only help to gather."""
        state = gathered_state(self.model, keep=self.rank == 0)
        if self.rank == 0:
            from transformers import AutoTokenizer

            self.model.save_pretrained(folder, state_dict=state)
            tokenizer = AutoTokenizer.from_pretrained(self.job.teacher.folder, trust_remote_code=False)
            tokenizer.save_pretrained(folder)

    # -- learning --------------------------------------------------------------------------------------------------

    def begin(self, first: int) -> None:
        """Begin a life of this student at batch ``first``."""
        if self.rank == 0:
            self.audit = AuditLog(self.job.storage, self.job.name, first, self.job.family.patience_s)

    def learn(self, number: int) -> None:
        """Consume one batch: forward and backward over its micro-batches, one optimiser step, one point posted.

        Raises:
            LabelError: the labels must not be learnt from.
            RunError: the loss or the gradient is not finite; nothing of this batch is committed.
        """
        job, device = self.job, self.device
        waits_ns = time.time_ns()
        delivery, blocks = self.reader.next(number)
        tracing.record("wait", delivery.trace, waits_ns, student=job.name, rank=self.rank)
        labels = job.labels(delivery, blocks, job.family.labels)
        started, begins_ns = time.perf_counter(), time.time_ns()
        objective = objective_at(self.spec.loss, job.family.labels, number, job.batches)
        rows, size = len(delivery.batch.tokens_BS), self.spec.micro_batch
        # DeepSpeed averages over ranks and accumulation steps; the loss is a sum over the whole global batch
        # divided by its loss tokens, however it is cut up.
        scale = self.spec.ranks * (rows // size) / delivery.loss_tokens
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        # The step also moves the schedule on: afterwards this is the next batch's.
        rate = self.engine.get_lr()[0]
        for first in range(0, rows, size):
            seed_micro_batch(job.family.corpus.seed, job.name, number, self.rank * rows + first)
            inputs = inputs_of(delivery.batch.rows(first, first + size), device)
            target = targets_of(labels.rows(first, first + size), inputs.next_T, self.measures.kept_head())
            use = partial(distillation_loss, target=target, objective=objective, vocabulary=job.teacher.vocabulary)
            loss, parts = self.engine(inputs, use)
            self.engine.backward(loss * scale)
            self.engine.step()
            sums += torch.cat([loss.detach().double()[None], parts])
        means = self._means(number, sums, labels.sums(), delivery.loss_tokens)
        # A GPU has done all of its work only now that the sums are here.
        seconds = time.perf_counter() - started
        self.trained_s += seconds
        tracing.record("step", delivery.trace, begins_ns, student=job.name, rank=self.rank)
        if self.audit is not None:
            self.audit.step(number, delivery.batch.address, means["loss"])
        speed = {"tokens_per_second": delivery.loss_tokens / seconds}
        if (mfu := self.work.mfu(self.spec.ranks * delivery.batch.tokens_BS.size, seconds)) is not None:
            speed["mfu"] = mfu
        self._post(number, {**means, **speed, "lr": rate})

    def _means(self, number: int, sums: Tensor, facts: Mapping[str, float], loss_tokens: int) -> dict[str, float]:
        """Means over the global batch's loss tokens, and its gradient norm; also whether to commit after it.

        The only place where a batch waits for the device on our part: all is read in one copy, when it is logged.

        Args:
            sums: this rank's, see :func:`~cluster.students.losses.fused.distillation_loss`.
            facts: sums over this rank's labels.

        Raises:
            RunError: the loss or the gradient is not finite. DeepSpeed skips such a step, and only counts it.
        """
        # Rank 0 decides on the commit for all of them, for its clock is not theirs.
        due = float(self.rank == 0 and self.commits.due(number + 1))
        more = torch.tensor([*facts.values(), due], dtype=torch.float64, device=self.device)
        sums = torch.cat([sums, more])
        if self.spec.ranks > 1:
            torch.distributed.all_reduce(sums)
        # DeepSpeed's: over all ranks, before clipping; a tensor on the device, or inf where it has skipped the step.
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float64, device=self.device)
        *totals, due, gradient_norm = torch.cat([sums, norm[None]]).tolist()
        self.commit_is_due = due > 0
        names = ["loss", "divergence", "kl", "cross_entropy", *facts]
        means = {name: total / loss_tokens for name, total in zip(names, totals, strict=True)}
        if not (math.isfinite(means["loss"]) and math.isfinite(gradient_norm)):
            raise RunError(
                f"student {self.job.name}, batch {number}: loss {means['loss']:g}, gradient norm {gradient_norm:g}; "
                f"both must be finite, and nothing of this batch was committed. Lower lr, lengthen schedule.warmup, or "
                f"use precision: float32, in a new run"
            )
        return {**means, "gradient_norm": gradient_norm}

    def _post(self, number: int, metrics: dict[str, float]) -> None:
        """Add what is measured at this batch only, and put all of it on the board."""
        every = self.job.family.evaluation.angle_every
        if every and number % every == 0 and (angle := self._angle(number)) is not None:
            metrics["gradient_angle"] = angle
        if self.rank == 0:
            self._posted.append(self.job.board.post.remote(Point(self.job.name, number + 1, metrics)))
            _, self._posted = ray.wait(self._posted, num_returns=len(self._posted), timeout=0)

    def _angle(self, number: int) -> float | None:
        """The gradient's angle after batch ``number``; none where the labels for it cannot be had.

        Raises:
            RunError: the stream is gone for good. Not its own error: the step on this batch has been taken already.
        """
        try:
            return self.measures.gradient_angle(number)
        except HeldError as error:
            log.warning("%s: no gradient angle at batch %d: %s", self.job.name, number, error)
            return None
        except ACTOR_LOST as error:
            raise RunError(f"no gradient angle at batch {number}: {error}") from error

    def _await_board(self) -> None:
        """Wait until the board has the points so far: what is committed is not learnt again, so nor is it posted again.

        Ray makes the calls again that a board died over, for as long as this process lives.
        """
        if self._posted:
            _, self._posted = ray.wait(self._posted, num_returns=len(self._posted), timeout=BOARD_S)
        if self._posted:
            log.warning("the board has not acknowledged %d points for %g s", len(self._posted), BOARD_S)


def train_student(job: StudentJob) -> None:
    """What one rank of a student does, from its last commit to the end.

    The checkpoints it reports hold ``commit.json`` and ZeRO's own state; the last one the finished model.
    """
    job.board.phase.remote(job.name, "loading")
    try:
        _train(job)
    except NoRoomError as error:
        # Another life would only wait once more.
        ray.get(job.board.stop.remote(f"student {job.name}: {error}"))
        raise
    finally:
        tracing.flush()


def _train(job: StudentJob) -> None:
    if not job.spec.gpus_per_rank:
        see_no_gpu()
        os.environ["DS_ACCELERATOR"] = "cpu"
        use_plain_gloo()
    rank = _Rank(job)
    first = rank.restore()
    if rank.finished:
        rank.say("finished")
        return
    rank.reader.attach(first)
    rank.begin(first)
    learnt = first
    try:
        if rank.before is None:
            rank.say("measuring before")
            rank.before = rank.measures.fidelity()
        rank.say("training")
        for number in range(first, job.batches):
            rank.learn(number)
            learnt = number + 1
            if rank.commit_is_due and learnt < job.batches:
                rank.commit(learnt)
        if rank.rank == 0:
            # The last batch ended with a collective, so the other ranks have read it too.
            rank.reader.detach()
        rank.say("measuring after")
        after = rank.measures.fidelity()
    except (HeldError, *ACTOR_LOST) as error:
        # The run is to end. All ranks of the student hear of a held pass before the same batch; of a stream that is
        # gone for good they do not, and with a peer that has read one more batch there is no common commit.
        if isinstance(error, ACTOR_LOST) and job.spec.ranks > 1:
            raise
        rank.say("saving")
        if learnt > first:
            rank.commit(learnt, last=True)
        rank.say("stopped")
        return
    rank.say("saving")
    rank.commit(job.batches, after)
    rank.say("finished")
