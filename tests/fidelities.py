"""Held-out figures whose blocks add up to them."""

from __future__ import annotations

import math
import random
from typing import Any

from cluster.evaluate.figures import Block, Fidelity

BLOCKS, BLOCK_TOKENS = 10, 50


def fidelity(
    kl: float,
    agreement: float = 0.6,
    perplexity: float = 200.0,
    *,
    spread: float = 0.0,
    blocks: int = BLOCKS,
    seed: int = 0,
    **others: Any,
) -> Fidelity:
    """Figures on some blocks of equal size.

    Args:
        spread: standard deviation of the blocks' KL around ``kl``; their mean is ``kl`` all the same. 0 makes all
            blocks alike, so that every bound is the figure itself.
    """
    dice = random.Random(seed)
    own = [dice.gauss(0.0, spread) for _ in range(blocks)]
    middle = sum(own) / blocks
    n, loss = float(BLOCK_TOKENS), math.log(perplexity)
    made: list[Block] = [(n, (kl + each - middle) * n, agreement * n, loss * n) for each in own]
    figures: dict[str, Any] = {"teacher_perplexity": 150.0, "calibration_error": 0.1, "teacher_calibration_error": 0.1}
    return Fidelity(
        kl, agreement, perplexity, **{**figures, **others}, tokens=blocks * BLOCK_TOKENS, blocks=tuple(made)
    )
