"""Labels from the teacher's last hidden states, one chunk of tokens at a time.

The full ``[tokens, vocabulary]`` matrix of logits never exists: a chunk's logits are reduced to its labels before
the next chunk is made.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cluster.labels.kinds import Hidden, TopK, id_dtype

Head = Callable[[Tensor], Tensor]

# Stands for a token that the teacher rules out: its probability is 0 in float32, and 0 times it is 0, not NaN.
LOGPROB_FLOOR = -1e4


def topk_of_logits(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K likeliest tokens of each row and the log of the mass that is left.

    The tail is summed over the other tokens themselves, not taken as one minus the kept mass, so that it stays
    exact when it is tiny. With k equal to the vocabulary it is the log of the smallest float32 above zero, not
    ``-inf``, for ``-inf`` times a zero weight is NaN.

    Args:
        logits_TV: float32 logits, already divided by the temperature.

    Returns:
        ids_TK (int64, likeliest first), logprobs_TK and log_tail_T (float32, nats).
    """
    top_TK, ids_TK = logits_TV.topk(k, dim=-1)
    peak_T1 = top_TK[:, :1]
    weight_TV = (logits_TV - peak_T1).exp_()
    kept_T = (top_TK - peak_T1).exp().sum(-1)
    rest_T = weight_TV.scatter_(1, ids_TK, 0.0).sum(-1)
    total_T = kept_T + rest_T
    logprobs_TK = (top_TK - peak_T1 - total_T.log()[:, None]).clamp_min(LOGPROB_FLOOR)
    log_tail_T = (rest_T / total_T).clamp_min(torch.finfo(torch.float32).tiny).log()
    return ids_TK, logprobs_TK, log_tail_T


def topk_labels(
    hidden_BSD: Tensor, head: Head, *, k: int, temperature: float, vocabulary: int, chunk: int, keep: bool = True
) -> TopK | None:
    """Top-k labels of a batch.

    Args:
        hidden_BSD: last hidden states, after the final norm.
        head: maps hidden [tokens, D] to logits [tokens, at least ``vocabulary``].
        vocabulary: the tokenizer's real size; padded columns are cut before the softmax.
        chunk: tokens whose logits exist at a time.
        keep: False on the shards that only take part in the head's collective; returns None.
    """
    sequences, positions, width = hidden_BSD.shape
    flat_TD = hidden_BSD.reshape(-1, width)
    tokens = flat_TD.shape[0]
    ids_TK = np.empty((tokens, k), dtype=id_dtype(vocabulary))
    logprobs_TK = np.empty((tokens, k), dtype=np.float32)
    log_tail_T = np.empty(tokens, dtype=np.float32)
    for start in range(0, tokens, chunk):
        logits_CV = head(flat_TD[start : start + chunk])
        if not keep:
            continue
        scaled_CV = logits_CV[:, :vocabulary].float() / temperature
        rows = slice(start, start + scaled_CV.shape[0])
        ids, logprobs, log_tail = topk_of_logits(scaled_CV, k)
        ids_TK[rows] = ids.cpu().numpy()
        logprobs_TK[rows] = logprobs.cpu().numpy()
        log_tail_T[rows] = log_tail.cpu().numpy()
    if not keep:
        return None
    shape = (sequences, positions)
    return TopK(ids_TK.reshape(*shape, k), logprobs_TK.reshape(*shape, k), log_tail_T.reshape(shape))


def hidden_labels(hidden_BSD: Tensor) -> Hidden:
    """The hidden states themselves as labels."""
    hidden = hidden_BSD.detach().cpu().contiguous()
    return Hidden(hidden.view(torch.int16).numpy() if hidden.dtype == torch.bfloat16 else hidden.float().numpy())


def as_tensor(hidden: np.ndarray) -> Tensor:
    """Undo :func:`hidden_labels`: a tensor in the precision that the teacher computed."""
    # A copy, because arrays out of Ray's store are read-only and torch tensors cannot be.
    tensor = torch.from_numpy(hidden.copy())
    return tensor.view(torch.bfloat16) if hidden.dtype == np.int16 else tensor
