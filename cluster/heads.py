"""How a causal language model turns its last hidden states into logits, and the probe that proves it does only that."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cluster.errors import UserError
from cluster.shrink import shrunk, small_model

if TYPE_CHECKING:  # the stream and the label store handle heads without torch
    from torch import Tensor

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

# Settings that multiply the logits, with the power that they are raised to. Names as in transformers 5.17.
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1, "logits_mup_width_multiplier": -1}
# Model types that use such a name in another way: HyperCLOVA X multiplies, MPT ignores it.
_SCALES_OF = {("hyperclovax", "logits_scaling"): 1, ("mpt", "logit_scale"): 0}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

PROBE_TOKENS = 16
# Largest difference from a model's own logits, relative to its largest logit. A model that scales or caps in 16 bits
# rounds each of those steps; the loss takes them in float32.
_TOLERANCE = {2: 2e-2, 4: 1e-5, 8: 1e-5}


@dataclass(frozen=True)
class OutputHead(Generic[A]):
    """``logits = cap * tanh(z / cap)`` with ``z = scale * (hidden @ weight.T + bias)``; z itself without a cap.

    The soft-cap is that of Gemma 2 (Gemma Team, 2024, section 2).

    Attributes:
        weight_VD, bias_V: tensors, or arrays as :func:`cluster.labels.make.kept` gives them.
    """

    weight_VD: A
    bias_V: A | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the product with the weight (and the bias) already is the logits."""
        return self.scale == 1.0 and self.softcap is None

    def map(self, change: Callable[[A], B]) -> OutputHead[B]:
        """The head with its weight and its bias changed alike."""
        bias_V = None if self.bias_V is None else change(self.bias_V)
        return OutputHead(change(self.weight_VD), bias_V, self.scale, self.softcap)

    def cut(self, vocabulary: int) -> OutputHead[A]:
        """The head without the rows past the vocabulary, which are padding."""
        return self.map(lambda rows: rows[:vocabulary])  # type: ignore[index]

    def product(self: OutputHead[Tensor], hidden_TD: Tensor) -> Tensor:
        """``hidden @ weight.T + bias`` in the precision of the weight, a new tensor."""
        from torch.nn.functional import linear

        return linear(hidden_TD, self.weight_VD, self.bias_V)

    def finish(self, product_TV: Tensor) -> Tensor:
        """Logits from their product; float32 or wider where there is a scale or a cap. May overwrite the product."""
        if self.is_linear:
            return product_TV
        z_TV = product_TV if product_TV.dtype.itemsize > 2 else product_TV.float()
        if self.softcap is None:
            return z_TV.mul_(self.scale)
        return z_TV.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def product_gradient(self, grad_TV: Tensor, logits_TV: Tensor) -> Tensor:
        """Gradient by the product from that by the logits: times ``scale * (1 - tanh^2)``. Overwrites ``grad_TV``."""
        if self.softcap is not None:
            grad_TV = grad_TV.mul_(1 - (logits_TV / self.softcap).square_())
        return grad_TV if self.scale == 1.0 else grad_TV.mul_(self.scale)

    def logits(self: OutputHead[Tensor], hidden_TD: Tensor) -> Tensor:
        """Logits of hidden states; not for autograd."""
        return self.finish(self.product(hidden_TD))


def head_of(model: Any) -> OutputHead[Tensor]:
    """A model's head: its own parameters, with the scale and the cap that its configuration names.

    Raises:
        UserError: the model has no single output embedding.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    if getattr(linear, "weight", None) is None:
        raise UserError(f"{type(model).__name__} has no output embedding; use a causal language model with one")
    scale = 1.0
    for name, power in _SCALES.items():
        power = _SCALES_OF.get((config.model_type, name), power)
        value = getattr(config, name, None)
        if power and value is not None:
            scale *= float(value) ** power
    caps = [cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None]
    return OutputHead(linear.weight, getattr(linear, "bias", None), scale, float(caps[0]) if caps else None)


def whole_head_of(model: Any) -> OutputHead[Tensor]:
    """The same, gathered from all ranks where the model is sharded; every rank must call it."""
    return head_of(model).map(lambda part: part.full_tensor() if hasattr(part, "full_tensor") else part)


def probe_head(model: Any, field: str, vocabulary: int | None = None) -> None:
    """Prove that a model's logits are what its :class:`OutputHead` makes of its hidden states, and that it is causal.

    Costs three forward passes over ``PROBE_TOKENS`` tokens. On a sharded model every rank must call it.

    Args:
        field: what named the model, for the error.
        vocabulary: the logits past it are padding and may be anything.

    Raises:
        UserError: it computes other logits, or a token changes the logits of earlier positions.
    """
    try:
        misfit = _misfit(model, vocabulary)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        misfit = f"cannot be run on tokens alone: {' '.join(str(error).split())[:200]}"
    if misfit:
        raise UserError(f"{field}: {type(model).__name__} {misfit}; use another model")


def _misfit(model: Any, vocabulary: int | None = None) -> str | None:
    """What keeps a model from being a teacher or a student; None where nothing does. Raises what the model raises."""
    import torch

    from cluster.prefill import backbone_of, last_hidden

    head, was_training = whole_head_of(model), model.training
    head = head.cut(vocabulary or len(head.weight_VD))
    rows = len(head.weight_VD)
    longest = getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS
    length = min(PROBE_TOKENS, longest) if longest > 0 else PROBE_TOKENS  # XLNet gives -1
    half, at_S = length // 2, torch.arange(length, device=head.weight_VD.device)
    tokens_S = at_S * 7919 % rows
    changed_S = torch.where(at_S < half, tokens_S, (tokens_S + 1) % rows)
    model.eval()  # dropout would make every pass differ
    try:
        with torch.no_grad():
            own_SV, again_SV = (
                model(input_ids=each[None], use_cache=False).logits[0, :, :rows] for each in (tokens_S, changed_S)
            )
            computed_SV = head.logits(last_hidden(backbone_of(model), tokens_S[None], None)[0])
    finally:
        model.train(was_training)
    checks = {
        "is not causal, a later token changes earlier logits": (again_SV - own_SV)[:half],
        # A model may cut its padded columns itself.
        "computes other logits than a linear head with a bias, a logit scale and a soft-cap": (
            own_SV - computed_SV[:, : own_SV.shape[1]]
        ),
    }
    largest = float(own_SV.abs().max())
    if not math.isfinite(largest):
        return "computes logits that are not finite, as if its weights were damaged"
    for what, off in checks.items():
        off_S, floats = off.abs().amax(-1), head.weight_VD.dtype.itemsize
        # In 16 bits, rounding can send a single token to other experts; what is looked for changes every token.
        difference = float(off_S.max() if floats > 2 else off_S.median())
        if not difference <= _TOLERANCE[floats] * largest:
            return f"{what}; they differ by {difference:.3g} where the largest is {largest:.3g}"
    return None


def probe_config(config: Any, field: str, trust_remote_code: bool = False) -> None:
    """Probe a tiny random model of a configuration's class, so that an unfit one is refused before a start.

    A class that cannot be made tiny is logged, and left to :func:`probe_head` on its real weights.

    Raises:
        UserError: as :func:`probe_head`.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = small_model(shrunk(config), trust_remote_code)
            head = head_of(model)
            for part in (head.weight_VD, head.bias_V):
                if part is not None:
                    part.normal_()  # so large that a bias and a soft-cap show
        misfit = _misfit(model)
    except Exception as error:  # an error of an untried small size tells nothing of the real model
        log.info("%s is probed when it starts, not before: no tiny %s: %s", field, config.model_type, error)
        return
    if misfit:
        raise UserError(f"{field}: {type(model).__name__} {misfit}; use another model")
