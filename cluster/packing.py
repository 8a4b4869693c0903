"""Whether a model keeps documents apart that are packed into one sequence, found by running it.

Many models accept ``position_ids`` and restart their positions with them, but attend across documents all the same, or
carry a convolution's or a recurrence's state over. So a probe changes the first of two packed documents and requires
that the states of the second do not change, and that they are those of the second document alone.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import RunError, UserError, first_line
from cluster.models import Packing
from cluster.prefill import backbone_of, last_hidden
from cluster.shrink import shrunk

# Tokens of a probe: longer than the windows and chunks of a shrunk model.
LENGTH = 48
# Lengths of the documents before the last one, a row each. A convolution sees only what is next to the boundary, and a
# sliding window only documents that are longer than it.
FIRST_DOCUMENTS = ((1,), (5,), (17,), (5, 12))
# Largest relative change of a state that counts as rounding. Leaks are of the size of the states: see
# benchmarks/model_types.md. Deep models in bfloat16 round by some percent.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class NotCausalError(Exception):
    """A later token changes an earlier state."""


def probe_packing(backbone: Any) -> Packing:
    """How a model keeps packed documents apart.

    Args:
        backbone: a transformers model without its head, in evaluation mode.

    Raises:
        NotCausalError: a later token changes an earlier state, so no layout helps.
    """
    if not (change := acausality(backbone)) <= _tolerance(backbone):
        raise NotCausalError(f"a later token changes earlier states by {change:.2g} of their size")
    for packing in ("exact", "masked"):
        try:
            if leak(backbone, packing) <= _tolerance(backbone):
                return packing
        except Exception:  # whatever a model raises that does not take such positions or such a mask
            continue
    return "unpacked"


@torch.no_grad()
def acausality(backbone: Any) -> float:
    """Largest relative change of the states of the first half of a sequence when the other half changes."""
    tokens_S = _tokens(backbone, 0)
    half = len(tokens_S) // 2
    other_S = torch.cat([tokens_S[:half], _tokens(backbone, 1)[half:]])
    before, after = (last_hidden(backbone, each[None], None)[:, :half] for each in (tokens_S, other_S))
    return _relative_change(before, after)


@torch.no_grad()
def leak(backbone: Any, packing: Packing) -> float:
    """How much a document's states depend on the document packed before it, relative to their size.

    The larger of two changes, the largest of all positions in float32 and the median of a document's in a coarser type:
    when the document before it changes, and against the document alone.

    Args:
        packing: how documents are kept apart, ``exact`` or ``masked``.
    """
    tokens_S, other_S = _tokens(backbone, 0), _tokens(backbone, 1)
    rows = [lengths for lengths in FIRST_DOCUMENTS if sum(lengths) < len(tokens_S) - 1]
    changed_BS = torch.stack([torch.cat([other_S[: row[0]], tokens_S[row[0] :]]) for row in rows])
    positions_BS = torch.stack([_positions(row, len(tokens_S)) for row in rows]).to(tokens_S.device)
    packed_BSD = last_hidden(backbone, tokens_S.expand(len(rows), -1), positions_BS, packing)
    changed_BSD = last_hidden(backbone, changed_BS, positions_BS, packing)
    changes = []
    for packed_SD, changed_SD, row in zip(packed_BSD, changed_BSD, rows, strict=True):
        changes.append(_relative_change(packed_SD[row[0] :], changed_SD[row[0] :]))
        last = sum(row)
        alone_SD = last_hidden(backbone, tokens_S[None, last:], None)[0]
        changes.append(_relative_change(alone_SD, packed_SD[last:]))
    return float(torch.tensor(changes).max())  # not a number if any is


def _tokens(backbone: Any, salt: int) -> Tensor:
    """Tokens from the middle of the vocabulary, for special ones lie at its ends; another salt changes each of them."""
    config = backbone.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    quarter = max(2, config.vocab_size // 4)
    place_S = torch.arange(length, device=backbone.device)
    return quarter + (place_S * 7919 + salt * (quarter // 2)) % quarter


def _positions(first: tuple[int, ...], length: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in (*first, length - sum(first))])


def _tolerance(backbone: Any) -> float:
    return TOLERANCE.get(backbone.dtype, TOLERANCE[torch.float32])


def _relative_change(before_SD: Tensor, after_SD: Tensor) -> float:
    """Of a state's norm; not a number where a state is not finite."""
    change_S = (after_SD.float() - before_SD.float()).norm(dim=-1) / before_SD.float().norm(dim=-1)
    # Rounding can send a single token of a mixture of experts elsewhere; a leak changes all that follows it.
    return float(change_S.max() if after_SD.dtype == torch.float32 else change_S.median())


def small_model(config: Any) -> Any:
    """A random model of a configuration's architecture, see :func:`cluster.shrink.shrunk`; float32, on the CPU.

    Its matrices are large enough for every layer to matter: some architectures begin with output projections of zero,
    which would hide what they leak.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shrunk(config), dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=(weight.numel() / weight.shape[0]) ** -0.5)
    return model
