"""Chooses the next token of every request of a batch. Each request draws from its own generator, so a seed gives the
same text whoever else is in the batch."""

from collections.abc import Sequence

import torch

from serving.engines.answer import Chances
from serving.engines.base import Sampling

# Logits divided by less than this overflow, and the best two tokens would tie at infinity.
_GREEDY_BELOW = 1e-5


def is_greedy(sampling: Sampling) -> bool:
    """Whether only the most likely token can be chosen."""
    return sampling.temperature < _GREEDY_BELOW or sampling.top_p <= 0


def generator_for(sampling: Sampling) -> torch.Generator | None:
    """Where a request draws from, one number a token, so on the CPU everywhere; None when it draws nothing."""
    if is_greedy(sampling):
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(
    logits_BV: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int]:
    """The next token of each row: the most likely one, or a draw from softmax(logits / temperature) within top_p."""
    chosen = logits_BV.argmax(-1)
    drawn = [row for row, generator in enumerate(generators) if generator is not None]
    if drawn:
        device = logits_BV.device
        temperature_D1 = torch.tensor([[samplings[row].temperature] for row in drawn], device=device)
        p_DV = torch.softmax(logits_BV[drawn].float() / temperature_D1, -1)
        for at, row in enumerate(drawn):
            if samplings[row].top_p < 1:
                p_DV[at] = nucleus(p_DV[at], samplings[row].top_p)
        u_D1 = torch.stack([_uniform(generators[row]) for row in drawn])[:, None].to(device)
        chosen[drawn] = draw(p_DV, u_D1)
    tokens: list[int] = chosen.tolist()
    return tokens


def nucleus(p_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The fewest most likely tokens that have ``top_p`` of the mass together; the others get 0. Not normalised.

    Holtzman et al. 2020, "The curious case of neural text degeneration".
    """
    sorted_V, order_V = p_V.sort(descending=True)
    before_V = sorted_V.double().cumsum(0) - sorted_V
    return torch.zeros_like(p_V).index_copy_(0, order_V, sorted_V.masked_fill(before_V >= top_p, 0.0))


def draw(p_DV: torch.Tensor, u_D1: torch.Tensor) -> torch.Tensor:
    """One token per row by inversion of the cumulative distribution; ``u`` is uniform on [0, 1).

    In float64: in float32 the running sum over a large vocabulary would lose its rare tokens.
    """
    cdf_DV = p_DV.double().cumsum(-1)
    # right: a token of probability 0 is an empty interval and never hit.
    hit_D1 = torch.searchsorted(cdf_DV, u_D1 * cdf_DV[:, -1:], right=True)
    return hit_D1[:, 0].clamp_(max=p_DV.shape[-1] - 1)


def chances(logits_BV: torch.Tensor, tokens: Sequence[int], samplings: Sequence[Sampling]) -> list[Chances | None]:
    """What the model itself thought, for the rows that ask for log-probabilities."""
    out: list[Chances | None] = [None] * len(tokens)
    asking = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
    if not asking:
        return out
    logp_AV = torch.log_softmax(logits_BV[asking].float(), -1)
    most = max(samplings[row].logprobs or 0 for row in asking)
    values_AK, ids_AK = logp_AV.topk(min(most, logp_AV.shape[-1]))
    for at, row in enumerate(asking):
        k = samplings[row].logprobs or 0
        top = list(zip(ids_AK[at, :k].tolist(), values_AK[at, :k].tolist(), strict=True))
        out[row] = Chances(float(logp_AV[at, tokens[row]]), top)
    return out


def _uniform(generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand((), generator=generator, dtype=torch.float64)
