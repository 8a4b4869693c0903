"""Whether a model keeps documents apart that are packed into one sequence, found by running it.

Many models accept ``position_ids`` and restart their positions with them, but attend across documents all the same, or
carry a convolution's or a recurrence's state over. So a probe changes the first of two packed documents and requires
that the states of the second do not change, and that they are those of the second document alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from cluster.errors import RunError, UserError, first_line
from cluster.models import Packing
from cluster.prefill import backbone_of, last_hidden
from cluster.shrink import shrunk, small_model

log = logging.getLogger(__name__)

# Tokens of a probe: longer than the windows and chunks of a shrunk model.
LENGTH = 48
# Lengths of the documents before the last one, a row each. A convolution sees only what is next to the boundary, and a
# sliding window only what lies deep inside a document.
FIRST_DOCUMENTS = ((1,), (5,), (17,), (5, 12))
# Largest relative change of a state that counts as rounding, by bytes of a float. In float32 every causal model type of
# transformers 5.17 stays below 1e-4 or leaks by more than 0.5 (benchmarks/model_types.md). Deep models in 16 bits round
# by some percent.
TOLERANCE = {2: 0.1, 4: 1e-3, 8: 1e-3}
# States next to the boundary, where every leak is largest, by which a 16-bit model is judged.
NEAREST = 4


class NotCausalError(Exception):
    """A later token changes an earlier state, so no layout of documents helps."""


def architecture_packing(config: Any, field: str, trust_remote_code: bool = False) -> tuple[Packing, str]:
    """How models of an architecture keep packed documents apart, found on a small random one; once per process.

    Args:
        config: the real model's transformers configuration.
        field: what names the model, for the error.

    Returns:
        The outcome, and the reason where it is ``unpacked``.

    Raises:
        UserError: such models are not causal.
    """
    try:
        with _quiet_transformers():
            small = shrunk(config)
        # Not where it came from, which its JSON names too.
        fields = {name: value for name, value in small.to_dict().items() if name != "_name_or_path"}
        known = (type(small), json.dumps(fields, sort_keys=True, default=str))
        if known not in _found:
            with _quiet_transformers():
                _found[known] = probe_packing(backbone_of(small_model(small, trust_remote_code)))
    except NotCausalError as error:
        raise UserError(
            f"{field}: a {config.model_type} model with this configuration is not causal: {error}; give a causal "
            f"language model"
        ) from None
    except Exception as error:  # a model may raise anything in untried sizes
        log.info("no small %s could be built and run", config.model_type, exc_info=error)
        return "unpacked", f"{config.model_type} models could not be tried in small ({first_line(error)})"
    packing = _found[known]
    return packing, "" if packing != "unpacked" else f"{config.model_type} models carry one document into the next"


_found: dict[tuple[type, str], Packing] = {}


def probe_packing(backbone: Any) -> Packing:
    """How a model keeps packed documents apart.

    Args:
        backbone: a transformers model without its head, in evaluation mode.

    Raises:
        NotCausalError: a later token changes an earlier state.
    """
    _require_causal(backbone)
    outcomes: tuple[Packing, ...] = ("exact", "masked")
    for packing in outcomes:
        try:
            if leak(backbone, packing) <= _tolerance(backbone):
                return packing
        except Exception as error:  # whatever a model raises that does not take such positions or such a mask
            log.info("%s does not run as %s: %s", type(backbone).__name__, packing, error)
    return "unpacked"


def verify_packing(model: Any, packing: Packing, who: str) -> None:
    """Require of a loaded model what its architecture promised. On a sharded model every rank must call it.

    Args:
        packing: the outcome for its architecture; for ``unpacked`` it has only to be causal.
        who: the model, for the error.

    Raises:
        UserError: it leaks all the same, or is not causal; names the model.
        RunError: it cannot be run as its architecture can, which may be for want of memory.
    """
    name, backbone = f"{who} ({type(model).__name__})", backbone_of(model)
    with _evaluating(model):
        try:
            _require_causal(backbone)
            change = 0.0 if packing == "unpacked" else leak(backbone, packing)
        except NotCausalError as error:
            raise UserError(f"{name} is not causal: {error}; give a causal language model") from None
        except Exception as error:
            raise RunError(f"{name} cannot read packed documents ({packing}): {first_line(error)}") from error
    if not change <= _tolerance(backbone):
        raise UserError(
            f"{name} does not keep packed documents apart: a document's states change by {change:.2g} of their size "
            f"with the document before it, although its architecture was found to be {packing}; use another model"
        )


@torch.no_grad()
def leak(backbone: Any, packing: Packing) -> float:
    """How much a document's states depend on the document packed before it, as a share of their size.

    The larger of two changes: when the document before it is another one, and against the document alone.

    Args:
        packing: how documents are kept apart, ``exact`` or ``masked``.
    """
    tokens_S, other_S = _tokens(backbone, 0), _tokens(backbone, 1)
    rows = [lengths for lengths in FIRST_DOCUMENTS if sum(lengths) < len(tokens_S) - 1]
    changed_BS = torch.stack([torch.cat([other_S[: row[0]], tokens_S[row[0] :]]) for row in rows])
    positions_BS = torch.stack([_positions(row, len(tokens_S)) for row in rows]).to(tokens_S.device)
    packed_BSD = last_hidden(backbone, tokens_S.repeat(len(rows), 1), positions_BS, packing)
    changed_BSD = last_hidden(backbone, changed_BS, positions_BS, packing)
    changes = []
    for packed_SD, changed_SD, row in zip(packed_BSD, changed_BSD, rows, strict=True):
        changes.append(_change(packed_SD[row[0] :], changed_SD[row[0] :]))
        last = sum(row)
        alone_SD = last_hidden(backbone, tokens_S[None, last:], None)[0]
        changes.append(_change(alone_SD, packed_SD[last:]))
    return float(torch.stack(changes).max())  # not a number if any is


def _require_causal(backbone: Any) -> None:
    tokens_S = _tokens(backbone, 0)
    half = len(tokens_S) // 2
    other_S = torch.cat([tokens_S[:half], _tokens(backbone, 1)[half:]])
    with torch.no_grad():
        before_SD, after_SD = (last_hidden(backbone, each[None], None)[0, :half] for each in (tokens_S, other_S))
    change = float(_change(before_SD.flip(0), after_SD.flip(0)))
    if not change <= _tolerance(backbone):
        raise NotCausalError(f"a later token changes earlier states by {change:.2g} of their size")


def _tokens(backbone: Any, salt: int) -> Tensor:
    """Tokens from the middle of the vocabulary, for special ones lie at its ends; another salt changes each of them."""
    config = backbone.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, longest) if longest > 0 else LENGTH  # XLNet gives -1
    quarter = max(2, config.vocab_size // 4)
    place_S = torch.arange(length, device=backbone.device)
    return quarter + (place_S * 7919 + salt * (quarter // 2)) % quarter


def _positions(first: tuple[int, ...], length: int) -> Tensor:
    return torch.cat([torch.arange(each) for each in (*first, length - sum(first))])


def _tolerance(backbone: Any) -> float:
    return TOLERANCE[backbone.dtype.itemsize]


def _change(before_SD: Tensor, after_SD: Tensor) -> Tensor:
    """Largest change of a state as a share of its norm; of 16-bit states the median of those next to the boundary.

    There rounding can send a single token of a mixture of experts elsewhere, while a leak changes them all.
    """
    change_S = (after_SD.float() - before_SD.float()).norm(dim=-1) / before_SD.float().norm(dim=-1)
    return change_S.max() if after_SD.dtype.itemsize > 2 else change_S[:NEAREST].median()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Warnings about a small model's sizes would be taken for the real one's."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
