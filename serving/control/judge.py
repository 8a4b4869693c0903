"""Scores answers that arms gave: the teacher's pool says what it would have thought of every token.

KL is over the teacher's K likeliest tokens and one bucket for all others, as in training on ``topk`` labels: what it
leaves out makes it smaller than the exact one, never larger (data-processing inequality). Agreement asks whether the
arm's likeliest token, among the teacher's K, is the teacher's likeliest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import ByteSize
from ray import serve

from cluster.corpus.batches import Batch, content_address
from cluster.labels.kinds import TopK, joined
from cluster.labels.wire import decode
from cluster.memory import SERVED_TOKENS, shape_of, teacher_estimate
from cluster.models import TeacherModel, load_config, local_model
from cluster.spec import CorpusSpec, TeacherSpec, TopKLabels
from cluster.teacher.pool import TeacherPool
from serving.experiment import Quality
from serving.launch import ARM_DEPLOYMENT
from serving.records import Scored

_K = 64
_LEAST = np.float32(-80.0)


class Judge:
    """An actor that holds the teacher's pool for as long as an experiment samples answers."""

    def __init__(self, spec: TeacherSpec, routes: dict[str, str], tracking_uri: str | None) -> None:
        self._spec, self._tracking_uri = spec, tracking_uri
        self._arms = {
            arm: serve.get_deployment_handle(ARM_DEPLOYMENT, route, _check_exists=False)
            for arm, route in routes.items()
        }
        self._pool: TeacherPool | None = None
        self._count = 0

    async def start(self) -> None:
        """Load the teacher, and score a probe.

        Raises:
            StillhouseError: there is no such model, or no place for it.
        """
        spec = self._spec
        folder = local_model(
            spec.model,
            revision=spec.revision,
            tracking_uri=self._tracking_uri or "",
            field="teacher.model",
            code=spec.trust_remote_code,
        )
        config = load_config(folder, "teacher.model", spec.trust_remote_code).get_text_config()
        model = TeacherModel(str(folder), config.vocab_size, "0" * 16, "0" * 16)
        if spec.memory_per_shard is None:
            spec = spec.model_copy(update={"memory_per_shard": _shard_bytes(spec, folder)})
        pool = TeacherPool(spec, TopKLabels(k=min(_K, config.vocab_size)), model, blocks=1)
        pool.start()
        self._pool = pool
        await self._labels((1, 2, 3))  # 0 may be the padding, of which models know nothing

    async def score(self, arm: str, at: float, answer: Scored) -> Quality | None:
        """The quality of one answer; None for one without a token."""
        ids = (*answer.prompt_ids, *answer.answer_ids)
        if not answer.answer_ids or not answer.prompt_ids:
            return None
        labels = await self._labels(ids)
        # Row t is about token t + 1; the last row is about one that there is not.
        rows = slice(len(answer.prompt_ids) - 1, len(ids) - 1)
        teacher_TK, tail_T = labels.buckets()
        ids_TK = labels.ids_TK.astype(np.int64)
        student_TK = await self._arms[arm].score.remote(list(ids), np.vstack([ids_TK, ids_TK[-1:]]))
        kl, agreement = compared(teacher_TK[rows], tail_T[rows], student_TK[rows])
        return Quality(arm, at, len(answer.answer_ids), kl, agreement)

    async def _labels(self, ids: tuple[int, ...]) -> TopK:
        assert self._pool is not None
        tokens_BS = np.array([ids], dtype=np.int32)
        mask_BS = np.ones(tokens_BS.shape, dtype=np.bool_)
        mask_BS[:, -1] = False
        positions_BS = np.arange(len(ids), dtype=np.int32)[None]
        self._count += 1
        batch = Batch(self._count, tokens_BS, mask_BS, positions_BS, content_address(tokens_BS))
        blocks = [await ref for ref in await self._pool.score(batch)]
        labels = joined([decode(block)[0] for block in blocks])
        assert isinstance(labels, TopK)
        return labels


def _shard_bytes(spec: TeacherSpec, folder: Path) -> ByteSize:
    """Host memory of a shard that labels one answer at a time."""
    code = spec.trust_remote_code
    shape = shape_of(load_config(folder, "teacher.model", code), "teacher.model", code)
    one = CorpusSpec(paths=["-"], batch_sequences=1, sequence_length=SERVED_TOKENS)
    return ByteSize(teacher_estimate(shape, spec, one).host)


def compared(teacher_TK: np.ndarray, tail_T: np.ndarray, student_TK: np.ndarray) -> tuple[float, float]:
    """Mean KL(teacher || student) over K + 1 buckets in nats, and the share of agreement.

    Args:
        teacher_TK, tail_T: the teacher's log-probabilities of its K likeliest tokens, and of all others together.
        student_TK: the student's log-probabilities of the same tokens.
    """
    teacher_TK, student_TK = teacher_TK.astype(np.float64), student_TK.astype(np.float64)
    left_T = np.log(np.clip(1.0 - np.exp(student_TK).sum(-1), np.exp(_LEAST), 1.0))
    kl_T = (np.exp(teacher_TK) * (teacher_TK - np.maximum(student_TK, _LEAST))).sum(-1)
    kl_T += np.exp(tail_T) * (np.maximum(tail_T, _LEAST) - left_T)
    agreed_T = student_TK.argmax(-1) == teacher_TK.argmax(-1)
    return float(kl_T.mean()), float(agreed_T.mean())
