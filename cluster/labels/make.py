"""Labels from the teacher's last hidden states, one chunk of tokens at a time.

The full ``[tokens, vocabulary]`` matrix of logits never exists: a chunk's logits are reduced to its labels before
the next chunk is made. Only loss tokens are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import LabelError
from cluster.labels.kinds import LOGPROB_RANGE, Dense, Hidden, Labels, Sampled, TopK
from cluster.labels.reduce import (
    draw_offsets,
    probabilities,
    probabilities_and_entropy,
    systematic_draws,
    tiles,
    top_k,
)
from cluster.spec import DenseLabels, HiddenLabels, LabelsSpec, SampledLabels, TopKLabels

Head = Callable[[Tensor], Tensor]
Columns = dict[str, Tensor]

# A teacher that nowhere gives a token more than this times its share of a uniform distribution has no weights.
UNIFORM_WITHIN = 1.01


class HostColumns:
    """Collects a batch's columns in host memory, chunk by chunk.

    From a CUDA device the copies run on a stream of their own into pinned memory, so that the teacher computes the
    next chunk meanwhile; only :meth:`arrays` waits.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens = tokens
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._columns: Columns = {}

    def put(self, first: int, chunk: Columns) -> None:
        """Copy a chunk whose first row is ``first``."""
        for name, values in chunk.items():
            if name not in self._columns:
                shape = (self._tokens, *values.shape[1:])
                self._columns[name] = torch.empty(shape, dtype=values.dtype, pin_memory=self._aside is not None)
            into = self._columns[name][first : first + len(values)]
            if self._aside is None:
                into.copy_(values)
                continue
            self._aside.wait_stream(torch.cuda.current_stream(values.device))
            with torch.cuda.stream(self._aside):
                into.copy_(values, non_blocking=True)
            values.record_stream(self._aside)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The columns, once all copies have arrived."""
        if self._aside is not None:
            self._aside.synchronize()
        return {name: _array(column) for name, column in self._columns.items()}


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor on the host as numpy; bfloat16 and 16-bit numbers as uint16."""
    if tensor.dtype in (torch.bfloat16, torch.int16):
        bits: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    return tensor.numpy()


def _short(numbers: Tensor) -> Tensor:
    """Whole numbers below 65,536 as the 16 bits of an int16, which every device can copy."""
    return numbers.to(torch.int32).to(torch.int16)


def _ids(ids: Tensor, vocabulary: int) -> Tensor:
    return _short(ids) if vocabulary <= 2**16 else ids.to(torch.int32)


def _as_kept(values: Tensor) -> Tensor:
    """In a precision that a block knows: bfloat16 as it is, all else as float32 (float16 would overflow)."""
    return values if values.dtype == torch.bfloat16 else values.float()


def _topk(spec: TopKLabels, logits_CV: Tensor, offsets_C: Tensor) -> Columns:
    ids_CK, logprobs_CK, log_tail_C = top_k(probabilities(logits_CV, spec.temperature), spec.k)
    codes_CK = ((logprobs_CK / -LOGPROB_RANGE).clamp(0.0, 1.0).sqrt() * 65535).round()
    return {
        "ids_TK": _ids(ids_CK, logits_CV.shape[1]),
        "codes_TK": _short(codes_CK.nan_to_num()),  # what is not finite shows in the likeliest
        "log_tail_T": log_tail_C,
        "likeliest_T": logprobs_CK[:, 0].exp(),
    }


def _sampled(spec: SampledLabels, logits_CV: Tensor, offsets_C: Tensor) -> Columns:
    p_CV, entropy_C, likeliest_C = probabilities_and_entropy(logits_CV, spec.temperature)
    ids_CN, counts_CN = systematic_draws(p_CV, offsets_C, spec.draws)
    return {
        "ids_TN": _ids(ids_CN, logits_CV.shape[1]),
        "counts_TN": _short(counts_CN),
        "entropy_T": entropy_C,
        "likeliest_T": likeliest_C,
    }


def _dense(spec: DenseLabels, logits_CV: Tensor, offsets_C: Tensor) -> Columns:
    return {"logits_TV": _as_kept(logits_CV), "likeliest_T": probabilities(logits_CV, 1.0).amax(-1)}


_REDUCED: dict[type, Callable[[Any, Tensor, Tensor], Columns]] = {
    TopKLabels: _topk,
    SampledLabels: _sampled,
    DenseLabels: _dense,
}


def hidden_labels(hidden_BSD: Tensor, loss_mask_BS: npt.NDArray[np.bool_], vocabulary: int) -> Hidden:
    """The hidden states of the loss tokens themselves as labels."""
    hidden_TD = _as_kept(hidden_BSD[_on(loss_mask_BS, hidden_BSD.device)])
    host = HostColumns(len(hidden_TD), hidden_BSD.device)
    host.put(0, {"hidden_TD": hidden_TD})
    if not hidden_TD.isfinite().all():
        raise LabelError("the teacher's hidden states are not finite")
    return Hidden(loss_mask_BS, vocabulary, 1.0, **host.arrays())


def _on(mask: npt.NDArray[np.bool_], device: torch.device) -> Tensor:
    return torch.tensor(mask, device=device)


def kept(values: Tensor) -> npt.NDArray[Any]:
    """Hidden states, logits or a head as a block keeps them; :func:`as_tensor` undoes it."""
    return _array(_as_kept(values).detach().cpu().contiguous())


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """Hidden states, logits or a head as a tensor in the precision that the teacher computed."""
    # A copy, because arrays out of Ray's store are read-only and torch tensors cannot be.
    return (
        torch.from_numpy(values.copy().view(np.int16)).view(torch.bfloat16)
        if values.dtype == np.uint16
        else (torch.from_numpy(values.copy()))
    )


def make_labels(
    spec: LabelsSpec,
    hidden_BSD: Tensor,
    loss_mask_BS: npt.NDArray[np.bool_],
    head: Head,
    *,
    vocabulary: int,
    address: str,
    chunk: int,
    keep: bool = True,
) -> Labels | None:
    """Labels of a batch in the spec's kind.

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head: maps hidden [tokens, D] to logits [tokens, at least ``vocabulary``].
        vocabulary: the tokenizer's real size; padded columns are cut before the softmax.
        address: the batch's content address, which decides its draws.
        chunk: tokens whose logits exist at a time.
        keep: False on the shards that only take part in the head's collective; returns None.

    Raises:
        LabelError: the teacher's output is not finite, or uniform for every token.
    """
    if isinstance(spec, HiddenLabels):
        return hidden_labels(hidden_BSD, loss_mask_BS, vocabulary) if keep else None
    hidden_TD = hidden_BSD[_on(loss_mask_BS, hidden_BSD.device)]
    tokens, device = len(hidden_TD), hidden_TD.device
    host = HostColumns(tokens, device)
    offsets_T = torch.from_numpy(draw_offsets(address, tokens)).to(device)
    # One round at least, so that a batch without loss tokens has its columns too.
    for first in range(0, max(1, tokens), chunk):
        logits_CV = head(hidden_TD[first : first + chunk])[:, :vocabulary]
        if not keep:
            continue
        offsets_C = offsets_T[first : first + chunk]
        for rows in tiles(len(logits_CV), device):
            host.put(first + rows.start, _REDUCED[type(spec)](spec, logits_CV[rows], offsets_C[rows]))
    if not keep:
        return None
    columns = host.arrays()
    _refuse_noise(columns.pop("likeliest_T"), vocabulary)
    return _assembled(spec, loss_mask_BS, vocabulary, columns)


def _assembled(
    spec: LabelsSpec, loss_mask_BS: npt.NDArray[np.bool_], vocabulary: int, columns: dict[str, Any]
) -> Labels:
    """The kind around its columns."""
    ids = "ids_TK" if isinstance(spec, TopKLabels) else "ids_TN"
    if ids in columns and vocabulary > 2**16:
        columns[ids] = columns[ids].view(np.uint32)
    if isinstance(spec, SampledLabels):
        return Sampled(loss_mask_BS, vocabulary, spec.temperature, **columns, draws=spec.draws)
    if isinstance(spec, TopKLabels):
        return TopK(loss_mask_BS, vocabulary, spec.temperature, **columns)
    return Dense(loss_mask_BS, vocabulary, 1.0, **columns)


def _refuse_noise(likeliest_T: npt.NDArray[np.float32], vocabulary: int) -> None:
    """A teacher whose weights are broken or missing must not be learnt from.

    Args:
        likeliest_T: probability of the likeliest token.
    """
    if not np.isfinite(likeliest_T).all():
        raise LabelError("the teacher's logits are not finite")
    if likeliest_T.size and float(likeliest_T.max()) * vocabulary < UNIFORM_WITHIN:
        raise LabelError(
            f"the teacher gives all {vocabulary} tokens the same probability at every position: are its weights there?"
        )
