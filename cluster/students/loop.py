"""What every rank of a student runs: read a batch and its labels, learn, commit. Started by Ray Train."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from torch import Tensor

from cluster.board import Point
from cluster.evaluate.fidelity import fidelity_of, fidelity_sums
from cluster.evaluate.figures import Fidelity
from cluster.labels.from_hidden import as_tensor
from cluster.labels.kinds import joined
from cluster.students.initial import initial_student
from cluster.students.job import COMMIT_FILE, MODEL_FOLDER, StudentJob
from cluster.students.losses.divergence import distillation_loss
from cluster.students.module import Student, tokens_and_mask, topk_targets
from cluster.students.zero import adamw, gathered_state, schedule_of, use_plain_gloo, zero_config

ZERO_FOLDER = "zero"


class _Rank:
    """One rank of one student, for as long as its process lives."""

    def __init__(self, job: StudentJob) -> None:
        self.job, self.spec = job, job.spec
        self.rank = ray.train.get_context().get_world_rank()
        self.device = torch.device("cuda", 0) if self.spec.gpus_per_rank else torch.device("cpu")
        torch.set_num_threads(max(1, int(self.spec.cpus_per_rank)))
        self._build()
        self.before: Fidelity | None = None
        self.trained_s = 0.0

    def _build(self) -> None:
        import deepspeed

        dtype = torch.bfloat16 if self.spec.precision == "bfloat16" else torch.float32
        self.model = initial_student(
            self.spec.init,
            teacher_dir=self.job.teacher_dir,
            student_dir=self.job.student_dir,
            dtype=dtype,
            trust_remote_code=self.job.family.teacher.trust_remote_code,
        ).to(self.device)
        self.model.train()
        if self.spec.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        module = Student(self.model)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module, self.spec),
            lr_scheduler=schedule_of(self.spec, self.job.batches),
            config=zero_config(self.spec, self.job.family.corpus.batch_sequences),
            dist_init_required=False,
        )

    def say(self, phase: str) -> None:
        """Post what this student does now."""
        if self.rank == 0:
            self.job.board.phase.remote(self.job.name, phase)

    # -- resuming and committing -----------------------------------------------------------------------------------

    def restore(self) -> int:
        """Take up the last commit. Returns the first batch that is still to be learnt."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            commit = json.loads((Path(folder) / COMMIT_FILE).read_text())
            self.before, self.trained_s = Fidelity(**commit["before"]), commit["seconds"]
            if commit["batch"] < self.job.batches:
                self.engine.load_checkpoint(folder, tag=ZERO_FOLDER)
        return int(commit["batch"])

    def commit(self, batch: int, after: Fidelity | None = None) -> None:
        """Report a checkpoint with the number of batches learnt; with ``after`` the finished model instead."""
        assert self.before is not None
        with tempfile.TemporaryDirectory() as folder:
            if after is None:
                self.engine.save_checkpoint(folder, tag=ZERO_FOLDER)
            else:
                self._export(Path(folder) / MODEL_FOLDER)
            if self.rank == 0:
                facts: dict[str, Any] = {
                    "batch": batch,
                    "seconds": self.trained_s,
                    "parameters": self.parameters,
                    "before": asdict(self.before),
                    "after": asdict(after) if after else None,
                }
                (Path(folder) / COMMIT_FILE).write_text(json.dumps(facts))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"batch": batch}, checkpoint=checkpoint)

    def _export(self, folder: Path) -> None:
        """Write the model and its tokenizer as rank 0; the other ranks only help to gather."""
        state = gathered_state(self.model, keep=self.rank == 0)
        if self.rank == 0:
            from transformers import AutoTokenizer

            self.model.save_pretrained(folder, state_dict=state)
            AutoTokenizer.from_pretrained(self.job.teacher_dir).save_pretrained(folder)

    # -- learning --------------------------------------------------------------------------------------------------

    def learn(self, number: int) -> None:
        """Consume one batch: forward and backward over its micro-batches, one optimiser step, one point posted."""
        delivery = ray.get(self.job.stream.next.remote(self.job.name, self.rank, number))
        labels = joined(ray.get(delivery.labels))
        started = time.perf_counter()
        family, weights = self.job.family, self.spec.loss
        rows, size = len(delivery.batch.tokens_BS), self.spec.micro_batch
        # DeepSpeed averages over ranks and accumulation steps; the loss is a sum over the whole global batch
        # divided by its loss tokens, however it is cut up.
        scale = self.spec.ranks * (rows // size) / delivery.loss_tokens
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for first in range(0, rows, size):
            part = slice(first, first + size)
            tokens_BS, mask_BS = tokens_and_mask(delivery, part, self.device)
            target = topk_targets(tokens_BS, mask_BS, labels.rows(part.start, part.stop))

            def use(hidden_TD: Tensor, weight_VD: Tensor, target: Any = target) -> tuple[Tensor, Tensor, Tensor]:
                return distillation_loss(
                    hidden_TD,
                    weight_VD,
                    target,
                    vocabulary=self.job.vocabulary,
                    hard=weights.hard,
                    soft=weights.soft,
                    temperature=family.labels.temperature,
                )

            loss, kl, cross_entropy = self.engine(tokens_BS, mask_BS, use)
            self.engine.backward(loss * scale)
            self.engine.step()
            sums += torch.stack([loss.detach().double(), kl, cross_entropy])
        self._post(number, sums / delivery.loss_tokens, delivery.loss_tokens, time.perf_counter() - started)

    def _post(self, number: int, means: Tensor, loss_tokens: int, seconds: float) -> None:
        if self.spec.ranks > 1:
            torch.distributed.all_reduce(means)
        self.trained_s += seconds
        if self.rank == 0:
            loss, kl, cross_entropy = means.tolist()
            metrics = {
                "loss": loss,
                "kl": kl,
                "cross_entropy": cross_entropy,
                "lr": self.engine.get_lr()[0],
                "tokens_per_second": loss_tokens / seconds,
            }
            self.job.board.post.remote(Point(self.job.name, number + 1, metrics))

    # -- measuring -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> Fidelity:
        """Fidelity on the held-out batches; every rank measures its rows and the sums are added."""
        stream, name = self.job.stream, self.job.name
        # A copy: what comes out of Ray's store is read-only.
        teacher_head_VD = as_tensor(ray.get(stream.teacher_head.remote())).to(self.device)
        self.engine.eval()
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        for number in range(self.job.family.evaluation.batches):
            delivery = ray.get(stream.held_out.remote(name, self.rank, number))
            teacher_BSD = as_tensor(joined(ray.get(delivery.labels)).hidden_BSD).to(self.device)
            rows, size = len(delivery.batch.tokens_BS), self.spec.micro_batch
            for first in range(0, rows, size):
                part = slice(first, first + size)
                tokens_BS, mask_BS = tokens_and_mask(delivery, part, self.device)
                teacher_TD, next_T = teacher_BSD[part][mask_BS], tokens_BS.roll(-1, dims=1)[mask_BS]

                def use(hidden_TD: Tensor, weight_VD: Tensor, t: Tensor = teacher_TD, n: Tensor = next_T) -> Tensor:
                    return fidelity_sums(hidden_TD, weight_VD, t, teacher_head_VD, n, vocabulary=self.job.vocabulary)

                sums += self.engine.module(tokens_BS, mask_BS, use)
        self.engine.train()
        if self.spec.ranks > 1:
            torch.distributed.all_reduce(sums)
        return fidelity_of(sums)


def train_student(config: dict[str, StudentJob]) -> None:
    """Ray Train's per-worker function. ``config["job"]`` says which student.

    The checkpoints it reports hold ``commit.json`` and ZeRO's own state; the last one the finished model.
    """
    job = config["job"]
    if not job.spec.gpus_per_rank:
        os.environ["DS_ACCELERATOR"] = "cpu"
        use_plain_gloo()
    rank = _Rank(job)
    first = rank.restore()
    if first >= job.batches:
        rank.say("finished")
        return
    ray.get(job.stream.attach.remote(job.name, rank.rank, first))
    if rank.before is None:
        rank.say("measuring before")
        rank.before = rank.measure()
    rank.say("training")
    every = job.family.checkpoints.every
    for number in range(first, job.batches):
        rank.learn(number)
        if every and (number + 1) % every == 0 and number + 1 < job.batches:
            rank.commit(number + 1)
    if rank.rank == 0:
        # The last batch ended with a collective, so the other ranks have read it too.
        ray.get(job.stream.detach.remote(job.name))
    rank.say("measuring after")
    after = rank.measure()
    rank.say("saving")
    rank.commit(job.batches, after)
    rank.say("finished")
