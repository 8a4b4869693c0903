"""A chunk's logits reduced to labels: the K likeliest tokens, or systematic draws. On any device, in float32.

Both first shrink the vocabulary to blocks of ``BLOCK`` neighbours, one pass that runs at memory speed, and then look
into the few blocks that matter: sorting or accumulating all of a large vocabulary would cost more than the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.labels.kinds import LOGPROB_RANGE

# Neighbouring tokens that are looked at as one.
BLOCK = 64
# Rows whose float32 columns are worked on at a time on a CPU, so that they stay in its cache.
TILE = 32
# Stands for the logit -inf of a token that the teacher excludes.
EXCLUDED = -1e30


def tiles(rows: int, device: torch.device) -> Iterator[slice]:
    """Cuts a chunk's rows for the functions below; one empty tile where there is none.

    On a CPU all that is made from a few rows then stays in its cache, and in memory that is already the process's: a
    whole chunk's would be fetched from the system, and given back, each time.
    """
    size = TILE if device.type == "cpu" else max(1, rows)
    for start in range(0, max(1, rows), size):
        yield slice(start, min(start + size, rows))


def _scaled(logits_CV: Tensor, temperature: float) -> Tensor:
    """Logits at a temperature, in float32, a copy."""
    z_CV = logits_CV.to(torch.float32, copy=True)
    return z_CV if temperature == 1.0 else z_CV.div_(temperature)


def probabilities(logits_CV: Tensor, temperature: float) -> Tensor:
    """Softmax of logits at a temperature, in float32; NaN where no token at all may follow."""
    return _scaled(logits_CV, temperature).softmax(-1)


def probabilities_and_entropy(logits_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of logits at a temperature, in float32, and its entropy.

    Returns:
        p_CV; entropy_C in nats; the likeliest token's probability, likeliest_C.
    """
    z_CV = _scaled(logits_CV, temperature)
    p_CV = z_CV.softmax(-1)
    # A floor: an excluded token's -inf times its probability 0 would be NaN.
    z_CV.clamp_min_(EXCLUDED)
    likeliest_C = p_CV.amax(-1)
    # log Z from the likeliest token, whose probability is never 0
    log_norm_C = z_CV.amax(-1) - likeliest_C.log()
    entropy_C = log_norm_C - z_CV.mul_(p_CV).sum(-1)
    return p_CV, entropy_C.clamp_min_(0.0), likeliest_C


def _blocks(p_CV: Tensor) -> Tensor:
    """[C, blocks, BLOCK] over a row's probabilities, filled up with 0 where the vocabulary ends."""
    short = -p_CV.shape[1] % BLOCK
    padded = torch.nn.functional.pad(p_CV, (0, short)) if short else p_CV
    return padded.view(len(p_CV), padded.shape[1] // BLOCK, BLOCK)


def largest(p_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are, largest first.

    They lie in the k blocks with the largest maxima, for each of those blocks holds at least one of the k.
    """
    blocks_CBW = _blocks(p_CV)
    if k >= blocks_CBW.shape[1] or p_CV.shape[1] % BLOCK:
        values_CK, ids_CK = p_CV.topk(k, dim=-1)
        return values_CK, ids_CK
    chosen_CK = blocks_CBW.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates_CN = blocks_CBW.gather(1, chosen_CK[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values_CK, at_CK = candidates_CN.topk(k, dim=-1)
    return values_CK, chosen_CK.gather(1, at_CK // BLOCK) * BLOCK + at_CK % BLOCK


def top_k(p_CV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens and the mass of all others. Overwrites ``p_CV``.

    The tail is summed over the other tokens themselves, not taken as one minus the kept mass, so that it stays
    exact when it is tiny. Where nothing is left it is the log of the smallest float32 above zero, not ``-inf``, for
    ``-inf`` times a zero weight is NaN; likewise no log-probability is below ``-LOGPROB_RANGE``.

    Returns:
        ids_CK (int64, likeliest first), logprobs_CK and log_tail_C (float32 nats).
    """
    values_CK, ids_CK = largest(p_CV, k)
    tail_C = p_CV.scatter_(1, ids_CK, 0.0).sum(-1)
    log_tail_C = tail_C.clamp_min(torch.finfo(torch.float32).tiny).log()
    return ids_CK, values_CK.log().clamp_min(-LOGPROB_RANGE), log_tail_C


def draw_offsets(address: str, tokens: int) -> npt.NDArray[np.float64]:
    """One offset in [0, 1) per loss token of a batch: a function of its content address and nothing else.

    Args:
        address: 32 hex digits; the key of a counter-based generator (Philox; Salmon et al., 2011).
    """
    return np.random.Generator(np.random.Philox(key=int(address, 16))).random(tokens)


def systematic_draws(p_CV: Tensor, offsets_C: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """N equally spaced points through each row's cumulative distribution, shifted by one random offset.

    Token v is drawn floor(N p_v) or ceil(N p_v) times and N p_v times in the mean, so counts / N are unbiased for p,
    with less variance than independent draws (systematic sampling; Madow, 1949).

    Args:
        p_CV: float32; need not sum to exactly 1.
        offsets_C: in [0, 1).

    Returns:
        ids_CN (int64): the ids that were drawn in rising order, filled up with 0; counts_CN (int64), 0 there.
    """
    blocks_CBW = _blocks(p_CV)
    mass_CB = blocks_CBW.sum(-1).double()
    edge_CB = mass_CB.cumsum(-1)
    total_C1 = edge_CB[:, -1:]
    points_CN = (torch.arange(draws, device=p_CV.device) + offsets_C.double()[:, None]) / draws * total_C1
    # Rounding must not carry a point past the end, into a block without mass.
    points_CN = torch.minimum(points_CN, total_C1 * (1 - 1e-15))
    # The clamp is for a row that is not finite, which is refused later.
    block_CN = torch.searchsorted(edge_CB, points_CN, right=True).clamp_max_(edge_CB.shape[1] - 1)
    inside_CN = points_CN - (edge_CB - mass_CB).gather(1, block_CN)
    edge_CNW = blocks_CBW.gather(1, block_CN[:, :, None].expand(-1, -1, BLOCK)).cumsum(-1)
    inside_CN = torch.minimum(inside_CN.float().clamp_min_(0.0), edge_CNW[:, :, -1] * (1 - 2e-7))
    # The first token whose edge lies above the point: it has mass of its own.
    drawn_CN = block_CN * BLOCK + (edge_CNW <= inside_CN[:, :, None]).sum(-1)
    return _counted(drawn_CN)


def _counted(drawn_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted draws with repeats as different ids and how often each was drawn."""
    begins_CN = torch.ones_like(drawn_CN)
    begins_CN[:, 1:] = drawn_CN[:, 1:] != drawn_CN[:, :-1]
    slot_CN = begins_CN.cumsum(-1) - 1
    ids_CN = torch.zeros_like(drawn_CN).scatter_(1, slot_CN, drawn_CN)
    counts_CN = torch.zeros_like(drawn_CN).scatter_add_(1, slot_CN, torch.ones_like(drawn_CN))
    return ids_CN, counts_CN
