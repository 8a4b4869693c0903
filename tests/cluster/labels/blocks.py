"""Label blocks of random content: right in form, and made without a teacher."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.labels.bits import bits_for, smallest_uint
from cluster.labels.kinds import Dense, Hidden, Labels, Sampled, TopK

# Each kind, in each precision it is kept in.
FORMS = ("topk", "sampled", "hidden uint16", "hidden float32", "dense uint16", "dense float32")

Column = npt.NDArray[Any]


def random_mask(shape: tuple[int, int], share: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(shape) < share


def ragged_mask() -> npt.NDArray[np.bool_]:
    """Six sequences of five positions, the first, a middle and the last one without a loss token."""
    mask_BS = random_mask((6, 5), 0.6)
    mask_BS[[0, 3, 5]] = False
    return mask_BS


def random_labels(
    form: str, mask_BS: npt.NDArray[np.bool_], *, vocabulary: int = 300, width: int = 3, seed: int = 0
) -> Labels:
    """A block of one of ``FORMS``; ``width`` is K, N or D. Floats have random bits: NaN and infinity are among them."""
    rng = np.random.default_rng(seed)
    kind, _, precision = form.partition(" ")
    tokens, id_type = int(mask_BS.sum()), smallest_uint(bits_for(vocabulary))
    about_all: dict[str, Any] = {"loss_mask_BS": mask_BS, "vocabulary": vocabulary, "temperature": 0.1 + rng.random()}

    def bits(*shape: int, dtype: str = "float32") -> Column:
        size = np.dtype(dtype).itemsize
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * size), dtype=dtype).reshape(shape)

    match kind:
        case "topk":
            ids_TK = np.zeros((tokens, width), dtype=id_type)
            for row in ids_TK:
                row[:] = rng.choice(vocabulary, width, replace=False)
            codes_TK = bits(tokens, width, dtype="uint16")
            return TopK(**about_all, ids_TK=ids_TK, codes_TK=codes_TK, log_tail_T=bits(tokens))
        case "sampled":
            ids_TN, counts_TN = np.zeros((tokens, width), dtype=id_type), np.zeros((tokens, width), dtype=np.uint16)
            for ids, counts in zip(ids_TN, counts_TN, strict=True):
                # From a sure teacher, whose draws are all one id, to one that knows nothing.
                first = rng.integers(vocabulary)
                drawn, often = np.unique(rng.integers(first, vocabulary, width), return_counts=True)
                ids[: drawn.size], counts[: drawn.size] = drawn, often
            return Sampled(**about_all, ids_TN=ids_TN, counts_TN=counts_TN, entropy_T=bits(tokens), draws=width)
        case "hidden":
            return Hidden(**about_all, hidden_TD=bits(tokens, width, dtype=precision))
        case _:
            return Dense(**about_all, logits_TV=bits(tokens, vocabulary, dtype=precision))


def columns(labels: Labels) -> dict[str, Column]:
    return {name: getattr(labels, name) for name in labels.columns()}


def _bits(array: Column) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """What two arrays have in common exactly when they are the same to the bit, NaN included."""
    return array.dtype, array.shape, array.tobytes()


def same(one: Labels, other: Labels) -> bool:
    """Whether two blocks are the same in every field and to the bit."""
    if type(one) is not type(other):
        return False
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return all(_bits(a) == _bits(b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)
