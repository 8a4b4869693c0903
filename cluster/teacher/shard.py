"""One rank of the teacher: holds its part of the weights, prefills, and (rank 0) turns hidden states into labels."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from cluster.corpus.batches import Batch
from cluster.labels.kinds import Hidden, Labels, TopK
from cluster.spec import LabelsSpec, TeacherSpec

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Receipt:
    """What a shard says of one batch it took part in: seconds of work, and bytes of labels it made."""

    seconds: float
    nbytes: int


class Shard:
    """A Ray actor. ``join`` first, on all ranks of the replica at once; then every call goes to all ranks.

    Args:
        model_dir: local directory of the teacher.
        vocabulary: the tokenizer's real size; the head's columns past it are padding.
        blocks: parts that a batch's labels are returned in.
    """

    def __init__(
        self, spec: TeacherSpec, labels: LabelsSpec, model_dir: str, vocabulary: int, blocks: int, rank: int
    ) -> None:
        self._spec, self._labels, self._model_dir = spec, labels, model_dir
        self._vocabulary, self._blocks, self._rank = vocabulary, blocks, rank

    def free_address(self) -> tuple[str, int]:
        """Host and a free port on it, for the replica's process group."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, host: str, port: int) -> None:
        """Form the replica's process group and load this rank's part of the weights."""
        import torch
        from transformers import AutoModelForCausalLM

        self._device = torch.device("cuda", 0) if self._spec.gpus_per_shard else torch.device("cpu")
        torch.set_num_threads(max(1, int(self._spec.cpus_per_shard)))
        options: dict[str, Any] = {}
        if self._spec.shards > 1:
            options["distributed_config"] = self._tensor_parallel(host, port)
        else:
            options["device_map"] = self._device
        self._model = AutoModelForCausalLM.from_pretrained(
            self._model_dir,
            dtype=getattr(torch, self._spec.dtype),
            use_safetensors=True,
            trust_remote_code=self._spec.trust_remote_code,
            **options,
        ).eval()

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

    def _hidden(self, tokens_BS: np.ndarray) -> Any:
        """Last hidden states after the final norm; no KV cache, no logits."""
        import torch

        tokens = torch.from_numpy(tokens_BS.astype(np.int64)).to(self._device)
        return self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    def _topk(self, tokens_BS: np.ndarray) -> TopK | None:
        import torch

        from cluster.labels.from_hidden import topk_labels

        with torch.inference_mode():
            labels = topk_labels(
                self._hidden(tokens_BS),
                self._model.get_output_embeddings(),
                k=self._labels.k,
                temperature=self._labels.temperature,
                vocabulary=self._vocabulary,
                chunk=self._spec.tokens_per_chunk,
                keep=self._rank == 0,
            )
        if labels is not None and not np.isfinite(labels.logprobs_BSK).all():
            raise FloatingPointError("the teacher's output is not finite")
        return labels

    def score(self, batch: Batch) -> Any:
        """Labels of a batch.

        Raises:
            FloatingPointError: the teacher's output is not finite.

        Returns:
            On rank 0 a receipt and then one ``TopK`` per block, as separate return values so that a rank of a
            student fetches only its own. On other ranks a receipt.
        """
        started = time.perf_counter()
        labels = self._topk(batch.tokens_BS)
        if labels is None:
            return Receipt(time.perf_counter() - started, 0)
        return Receipt(time.perf_counter() - started, labels.nbytes), *_cut(labels, self._blocks)

    def hidden(self, batch: Batch) -> Any:
        """The last hidden states of a batch as labels, cut like :meth:`score`."""
        import torch

        from cluster.labels.from_hidden import hidden_labels

        started = time.perf_counter()
        with torch.inference_mode():
            hidden: Hidden = hidden_labels(self._hidden(batch.tokens_BS))
        if self._rank:
            return Receipt(time.perf_counter() - started, 0)
        return Receipt(time.perf_counter() - started, hidden.nbytes), *_cut(hidden, self._blocks)

    def head(self) -> np.ndarray | None:
        """The teacher's head weight [V, D] without padding, as :class:`Hidden` keeps its states; None off rank 0."""
        import torch

        from cluster.labels.from_hidden import hidden_labels

        with torch.inference_mode():
            weight = self._model.get_output_embeddings().weight
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            return None if self._rank else hidden_labels(whole[: self._vocabulary]).hidden_BSD

    def probe(self) -> np.ndarray | None:
        """Probabilities of the likeliest tokens on a fixed text, by which replicas are held against each other."""
        tokens_BS = (np.arange(PROBE_TOKENS, dtype=np.int32) * 7919 % self._vocabulary)[None]
        labels = self._topk(tokens_BS)
        return None if labels is None else np.exp(labels.logprobs_BSK)


def _cut(labels: Labels, blocks: int) -> list[Labels]:
    size = labels.sequences // blocks
    return [labels.rows(i * size, (i + 1) * size) for i in range(blocks)]
