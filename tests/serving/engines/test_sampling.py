"""How the next token is chosen: the right distribution, the request's own generator."""

from collections import Counter

import pytest
import torch

from serving.engines.base import Sampling
from serving.engines.sampling import chances, choose, draw, generator_for, nucleus

P = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])


def test_a_draw_follows_the_distribution() -> None:
    """40,000 draws against the probabilities, within five standard deviations; an impossible token never comes."""
    draws = 40_000
    u = torch.rand(draws, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = Counter(draw(P.repeat(draws, 1), u).tolist())
    for token, p in enumerate(P.tolist()):
        assert abs(drawn[token] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5


def test_the_ends_of_the_unit_interval_hit_possible_tokens() -> None:
    leading = torch.tensor([[0.0, 0.4, 0.6]])
    assert draw(leading, torch.zeros(1, 1, dtype=torch.float64)).item() == 1
    assert draw(P[None], torch.full((1, 1), 1 - 2**-53, dtype=torch.float64)).item() == 3


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.999, 4)])
def test_the_nucleus_is_the_fewest_tokens_with_that_mass(top_p: float, kept: int) -> None:
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    out = nucleus(P.double()[shuffled], top_p)[shuffled.argsort()]
    assert (out > 0).tolist() == [True] * kept + [False] * (5 - kept)
    assert out[:kept].tolist() == P.double()[:kept].tolist()


def test_each_row_is_drawn_as_it_asks() -> None:
    logits = P.clamp_min(1e-9).log().repeat(4, 1)
    wishes = [Sampling(temperature=0), Sampling(top_p=0.5, seed=1), Sampling(seed=5), Sampling(temperature=30, seed=5)]
    drawn = []
    generators = [generator_for(wish) for wish in wishes]
    for _ in range(300):
        drawn.append(choose(logits, wishes, generators))
    greedy, narrow, plain, hot = zip(*drawn, strict=True)
    assert set(greedy) == set(narrow) == {0}
    assert Counter(plain).most_common(1)[0][0] == 0 and len(set(plain)) == 4
    assert Counter(hot)[4] > 10  # at a high temperature even the rarest comes: 34 times are expected
    # A row's draws are its own: without the others they are the same.
    alone = generator_for(wishes[2])
    assert [choose(logits[2:3], [wishes[2]], [alone])[0] for _ in range(300)] == list(plain)


def test_chances_are_only_computed_for_who_asks() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0]]).repeat(3, 1)
    asked = chances(logits, [0, 1, 2], [Sampling(), Sampling(logprobs=0), Sampling(logprobs=2, temperature=9)])
    logp = torch.log_softmax(logits[0], -1).tolist()
    assert asked[0] is None
    assert asked[1] is not None and asked[1].top == [] and asked[1].logprob == pytest.approx(logp[1])
    assert asked[2] is not None and asked[2].logprob == pytest.approx(logp[2])
    assert [token for token, _ in asked[2].top] == [1, 0]
    assert [each for _, each in asked[2].top] == pytest.approx([logp[1], logp[0]])
