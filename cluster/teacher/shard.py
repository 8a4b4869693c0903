"""One rank of the teacher: holds its part of the weights, prefills, and (rank 0) turns hidden states into labels."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from cluster import tracing
from cluster.corpus.batches import Batch
from cluster.devices import see_no_gpu
from cluster.errors import LabelError
from cluster.flops import FORWARD, Work, parameters_of, peak_flops
from cluster.heads import OutputHead, head_of, probe_head, whole_head_of
from cluster.labels.kinds import Labels, TopK
from cluster.labels.wire import Stamp, encode
from cluster.loading import load_model
from cluster.memory import keep_memory
from cluster.models import TeacherModel
from cluster.registry import on_this_node
from cluster.spec import HiddenLabels, LabelsSpec, TeacherSpec, TopKLabels

PROBE_TOKENS, PROBE_LIKELIEST = 32, 64


@dataclass(frozen=True)
class Receipt:
    """What a shard says of one batch it took part in: seconds of work, bytes of labels made, the replica's MFU."""

    seconds: float
    nbytes: int
    mfu: float | None


class Shard:
    """A Ray actor. ``join`` first, on all ranks of the replica at once; then every call goes to all ranks.

    Args:
        model: the teacher; the head's columns past its vocabulary are padding.
        blocks: parts that a batch's labels are returned in.
    """

    def __init__(self, spec: TeacherSpec, labels: LabelsSpec, model: TeacherModel, blocks: int, rank: int) -> None:
        self._spec, self._labels, self._teacher = spec, labels, model
        self._blocks, self._rank = blocks, rank

    def free_address(self) -> tuple[str, int]:
        """Host and a free port on it, for the replica's process group."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, host: str, port: int) -> None:
        """Form the replica's process group, load this rank's part of the weights and probe the model.

        Raises:
            UserError: the weight files do not hold exactly the model's weights, or the model is no causal language
                model with a head that students can learn from.
            RunError: it does not keep packed documents apart as ``packing`` of the teacher states.
        """
        if not self._spec.gpus_per_shard:
            see_no_gpu()
        import torch

        from cluster.packing import verify_packing

        self._device = torch.device("cuda", 0) if self._spec.gpus_per_shard else torch.device("cpu")
        torch.set_num_threads(max(1, int(self._spec.cpus_per_shard)))
        keep_memory()
        options: dict[str, Any] = {}
        if self._spec.shards > 1:
            options["distributed_config"] = self._tensor_parallel(host, port)
        else:
            options["device_map"] = self._device
        self._model = load_model(
            on_this_node(self._teacher.folder),
            dtype=getattr(torch, self._spec.dtype),
            trust_remote_code=self._spec.trust_remote_code,
            **options,
        )
        probe_head(self._model, f"teacher.model: {self._teacher.folder}", self._teacher.vocabulary)
        verify_packing(self._model, self._teacher.packing, f"the teacher {self._teacher.folder}")
        self._work = Work(parameters_of(self._model), FORWARD, peak_flops(self._device), self._spec.shards)

    def _tensor_parallel(self, host: str, port: int) -> Any:
        import torch
        from transformers.distributed import DistributedConfig

        # Ray shows each actor only its own device, so the local rank is 0 on every one of them.
        os.environ.update(
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
            RANK=str(self._rank),
            WORLD_SIZE=str(self._spec.shards),
            LOCAL_RANK="0" if self._spec.gpus_per_shard else str(self._rank),
        )
        torch.distributed.init_process_group("nccl" if self._spec.gpus_per_shard else "gloo")
        return DistributedConfig(tp_size=self._spec.shards)

    def _hidden(self, batch: Batch) -> Any:
        """Last hidden states [B, S, D] of a batch."""
        import torch

        from cluster.prefill import backbone_of, last_hidden

        if (largest := int(batch.tokens_BS.max())) >= self._teacher.vocabulary:
            raise LabelError(
                f"batch {batch.number} holds token {largest}; the teacher's vocabulary ends at "
                f"{self._teacher.vocabulary - 1}: its tokenizer makes tokens that the model's embedding does not have"
            )
        tokens = torch.from_numpy(batch.tokens_BS.astype(np.int64)).to(self._device)
        positions = None
        if batch.packed:
            positions = torch.from_numpy(batch.positions_BS.astype(np.int64)).to(self._device)
        return last_hidden(backbone_of(self._model), tokens, positions, self._teacher.packing)

    def _labels_of(self, batch: Batch, spec: LabelsSpec) -> Labels | None:
        """Labels of a batch in a kind; None off rank 0."""
        import torch

        from cluster.labels.make import make_labels

        # The model's own module computes the product, for its weight may lie in parts on several ranks.
        product, finish = self._model.get_output_embeddings(), head_of(self._model).finish
        with torch.inference_mode():
            return make_labels(
                spec,
                self._hidden(batch),
                batch.loss_mask_BS,
                lambda hidden_TD: finish(product(hidden_TD)),
                vocabulary=self._teacher.vocabulary,
                address=batch.address,
                chunk=self._spec.tokens_per_chunk,
                keep=self._rank == 0,
            )

    def _answer(self, batch: Batch, spec: LabelsSpec, trace: str) -> Any:
        with tracing.span("score", trace, shard=self._rank, tokens=batch.tokens_BS.size):
            return self._labelled(batch, spec)

    def _labelled(self, batch: Batch, spec: LabelsSpec) -> Any:
        started = time.perf_counter()
        labels = self._labels_of(batch, spec)
        blocks = []
        if labels is not None:
            stamp = Stamp.of(self._teacher.fingerprint, self._teacher.tokenizer, spec, batch.address)
            blocks = [encode(part, stamp) for part in _cut(labels, self._blocks)]
        seconds = time.perf_counter() - started
        mfu = self._work.mfu(batch.tokens_BS.size, seconds)
        receipt = Receipt(seconds, sum(block.nbytes for block in blocks), mfu)
        return (receipt, *blocks) if blocks else receipt

    def score(self, batch: Batch, trace: str = "") -> Any:
        """Labels of a batch in the family's kind; ``trace`` is the one that it is part of.

        Raises:
            LabelError: the teacher's output is not finite, or uniform.

        Returns:
            On rank 0 a receipt and then the encoded blocks, as separate return values so that a rank of a student
            fetches only its own. On other ranks a receipt.
        """
        return self._answer(batch, self._labels, trace)

    def hidden(self, batch: Batch, trace: str = "") -> Any:
        """The last hidden states of a batch as labels, as :meth:`score` returns them."""
        return self._answer(batch, HiddenLabels(kind="hidden"), trace)

    def head(self) -> OutputHead[np.ndarray] | None:
        """The teacher's head without padding, as ``Hidden`` keeps its states; None off rank 0.

        Raises:
            LabelError: it is not finite.
        """
        import torch

        from cluster.labels.make import kept

        with torch.inference_mode():
            whole = whole_head_of(self._model)
            if self._rank:
                return None
            if not all(part.isfinite().all() for part in (whole.weight_VD, whole.bias_V) if part is not None):
                raise LabelError("the teacher's head is not finite")
            return whole.cut(self._teacher.vocabulary).map(kept)

    def probe(self) -> np.ndarray | None:
        """Probabilities of the likeliest tokens on a fixed text, by which replicas are held against each other."""
        vocabulary = self._teacher.vocabulary
        tokens_BS = (np.arange(PROBE_TOKENS, dtype=np.int32) * 7919 % vocabulary)[None]
        everywhere = np.ones(tokens_BS.shape, dtype=np.bool_)
        positions_BS = np.arange(PROBE_TOKENS, dtype=np.int32)[None]
        batch = Batch(0, tokens_BS, everywhere, positions_BS, "0" * 32)
        labels = self._labels_of(batch, TopKLabels(k=min(PROBE_LIKELIEST, vocabulary)))
        return np.exp(labels.buckets()[0]) if isinstance(labels, TopK) else None


def _cut(labels: Labels, blocks: int) -> list[Labels]:
    size = labels.sequences // blocks
    return [labels.rows(i * size, (i + 1) * size) for i in range(blocks)]
