"""The champion measured as the new student was: the same held-out batches and teacher, the same code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from cluster.devices import see_no_gpu
from cluster.errors import UserError
from cluster.evaluate.fidelity import FIDELITY_SUMS, fidelity_of
from cluster.evaluate.figures import Champion
from cluster.fingerprint import tokenizer_fingerprint
from cluster.heads import probe_config, probe_head
from cluster.labels.make import as_tensor
from cluster.loading import load_model
from cluster.memory import keep_memory
from cluster.models import Packing, load_config, load_tokenizer
from cluster.packing import NotCausalError, probe_packing
from cluster.prefill import backbone_of
from cluster.registry import fetch_model, on_this_node
from cluster.stream.reader import Reader
from cluster.students.job import StudentJob
from cluster.students.measures import held_out_sums
from cluster.students.module import Student
from cluster.vocabulary import embedding_rows, token_difference


def measure_champion(job: StudentJob, model: str, version: int, tracking_uri: str) -> Champion:
    """Fidelity of a registered version on a student's held-out batches, in the student's precision and micro-batches.

    One process measures what the student's ranks share out; it adds the sums of the same pieces.

    Args:
        model: name of the registered model.

    Raises:
        UserError: the registry does not know the version, or its model cannot be read.
        RunError: its files are gone, or the teacher is lost for good.
    """
    if not job.spec.gpus_per_rank:
        see_no_gpu()
    torch.set_num_threads(max(1, int(job.spec.cpus_per_rank)))
    keep_memory()
    device = torch.device("cuda", 0) if job.spec.gpus_per_rank else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="still-champion-") as put:
        folder = fetch_model(f"models:/{model}/{version}", tracking_uri, Path(put), job.family.patience_s)
        if reason := why_not_comparable(folder, job):
            return Champion(version, None, f"champion v{version} cannot be compared: {reason}")
        whole = load_model(
            folder,
            dtype=torch.bfloat16 if job.spec.precision == "bfloat16" else torch.float32,
            trust_remote_code=job.family.trusts_code(job.name),
        ).to(device)
    whole.eval()
    probe_head(whole, f"the champion v{version}", job.teacher.vocabulary)
    packing, reason = packing_beside(whole, job.packing)
    if reason:
        return Champion(version, None, f"champion v{version} cannot be compared: {reason}")
    student = Student(whole, packing).eval()
    sums = torch.zeros(FIDELITY_SUMS, dtype=torch.float64, device=device)
    head = None
    for rank in range(job.spec.ranks):
        reader = Reader(job.stream, job.name, rank, job.batches)
        head = reader.teacher_head().map(lambda kept: as_tensor(kept).to(device)) if head is None else head
        sums += held_out_sums(student, job, reader, head, device)
    return Champion(version, fidelity_of(sums))


def packing_beside(model: Any, student: Packing) -> tuple[Packing, str | None]:
    """How a champion is to read the batches of a student, and why it cannot; None where it can.

    Args:
        model: the champion, in evaluation mode.
        student: how the student does; where it is ``unpacked``, no sequence holds two documents.
    """
    try:
        packing = probe_packing(backbone_of(model))
    except NotCausalError as error:
        return "unpacked", f"it is not causal: {error}"
    if student == "unpacked":
        return "unpacked", None
    return packing, "it does not keep packed documents apart" if packing == "unpacked" else None


def why_not_comparable(folder: Path, job: StudentJob) -> str | None:
    """Why a model cannot be measured against a student's teacher; None where it can.

    Args:
        folder: the model's local directory.
    """
    field = "the champion"
    try:
        tokenizer = load_tokenizer(folder, field)
        code = job.family.trusts_code(job.name)
        config = load_config(folder, field, code)
        rows = embedding_rows(config, field)
        probe_config(config, field, code)
        same = tokenizer_fingerprint(tokenizer) == job.teacher.tokenizer
        teachers = tokenizer if same else load_tokenizer(on_this_node(job.teacher.folder), "the teacher")
        if difference := token_difference(tokenizer, teachers):
            return f"it has another tokenizer than the teacher: {difference}"
    except UserError as error:
        return str(error)
    if rows < job.teacher.vocabulary:
        return f"its embedding has {rows} rows, the teacher's vocabulary {job.teacher.vocabulary} tokens"
    longest, length = getattr(config, "max_position_embeddings", None), job.family.corpus.sequence_length
    if longest and length > longest:
        return f"it reads at most {longest} tokens, corpus.sequence_length is {length}"
    return None
