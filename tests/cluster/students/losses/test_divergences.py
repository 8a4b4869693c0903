"""Each divergence against what is known of it, and its slopes against autograd."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor

from cluster.spec import Divergence
from cluster.spec.loss import MIXED
from cluster.students.losses.divergences import terms_of
from tests.cluster.students.losses.plain import DIVERGENCES, plain_divergence

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
mixes = pytest.mark.parametrize("mix", [0.05, 0.5, 0.9])


def pair(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a teacher and a student, [50, 12]."""
    logits = scale * torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1)
    return log_p, log_q


def value(divergence: str, log_p: Tensor, log_q: Tensor, mix: float = 0.5) -> Tensor:
    return terms_of(cast(Divergence, divergence), mix, log_p, log_q)[0].sum(-1)


def disjoint() -> tuple[Tensor, Tensor]:
    """A teacher and a student that are each sure of another token."""
    log_p, log_q = torch.full((1, 4), -1e3, dtype=torch.float64), torch.full((1, 4), -1e3, dtype=torch.float64)
    log_p[0, 0] = log_q[0, 1] = 0.0
    return log_p, log_q


@every_divergence
@mixes
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_values_and_slopes_are_those_of_the_plain_formula(divergence: Divergence, mix: float, scale: float) -> None:
    log_p, log_q = pair(scale)
    log_q.requires_grad_()
    plain = plain_divergence(divergence, mix, log_p, log_q)
    slope = torch.autograd.grad(plain.sum(), log_q)[0]
    values, slopes = terms_of(divergence, mix, log_p, log_q.detach())
    torch.testing.assert_close(values.sum(-1), plain.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slopes, slope, rtol=1e-9, atol=1e-12)


@every_divergence
@mixes
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_a_divergence_is_never_below_zero(divergence: Divergence, mix: float, scale: float) -> None:
    values = value(divergence, *pair(scale), mix)
    assert values.isfinite().all() and (values > 0).all()


@every_divergence
@mixes
def test_equal_distributions_have_none_and_pull_nowhere(divergence: Divergence, mix: float) -> None:
    log_p, _ = pair()
    values, slopes = terms_of(divergence, mix, log_p, log_p)
    assert values.sum(-1).abs().max() < 1e-12
    gradient = slopes - log_p.exp() * slopes.sum(-1, keepdim=True)
    assert gradient.abs().max() < 1e-12


@every_divergence
def test_float32_is_finite_where_the_two_exclude_each_other(divergence: Divergence) -> None:
    log_p, log_q = (10 * side.float() for side in disjoint())
    values, slopes = terms_of(divergence, 0.5, log_p, log_q)
    assert values.isfinite().all() and slopes.isfinite().all()
    assert values.sum() > 0.5


def test_reverse_is_forward_with_the_sides_swapped() -> None:
    log_p, log_q = pair()
    torch.testing.assert_close(value("reverse_kl", log_p, log_q), value("forward_kl", log_q, log_p))
    torch.testing.assert_close(value("skewed_reverse_kl", log_p, log_q, 0.1), value("skewed_kl", log_q, log_p, 0.1))


def test_jensen_shannon_with_half_a_mix_is_symmetric_and_at_most_log_two() -> None:
    log_p, log_q = pair()
    values = value("jensen_shannon", log_p, log_q)
    torch.testing.assert_close(values, value("jensen_shannon", log_q, log_p))
    assert (values < math.log(2)).all()
    assert float(value("jensen_shannon", *disjoint())) == pytest.approx(math.log(2))


@mixes
def test_jensen_shannon_mirrors_its_mix(mix: float) -> None:
    log_p, log_q = pair()
    swapped = value("jensen_shannon", log_q, log_p, 1 - mix)
    torch.testing.assert_close(value("jensen_shannon", log_p, log_q, mix), swapped)


def test_jensen_shannon_tends_to_the_two_kls_at_its_ends() -> None:
    log_p, log_q = pair(1.0)
    near, tiny = {"rtol": 1e-3, "atol": 1e-6}, 1e-5
    torch.testing.assert_close(
        value("jensen_shannon", log_p, log_q, tiny) / tiny, value("forward_kl", log_p, log_q), **near
    )
    torch.testing.assert_close(
        value("jensen_shannon", log_p, log_q, 1 - tiny) / tiny, value("reverse_kl", log_p, log_q), **near
    )


@pytest.mark.parametrize(("skewed", "plain"), [("skewed_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")])
def test_a_skewed_kl_grows_to_the_plain_one_as_its_mix_goes_to_zero(skewed: str, plain: str) -> None:
    log_p, log_q = pair()
    whole = value(plain, log_p, log_q)
    less = [value(skewed, log_p, log_q, mix) for mix in (0.9, 0.5, 0.1, 1e-3, 1e-9)]
    assert all((a < b).all() for a, b in zip(less, [*less[1:], whole], strict=True))
    torch.testing.assert_close(less[-1], whole, rtol=1e-4, atol=0)


def test_a_skewed_kl_is_bounded_however_wrong_the_student_is() -> None:
    assert float(value("skewed_kl", *disjoint(), 0.1)) == pytest.approx(-math.log(0.1))
    assert float(value("skewed_reverse_kl", *disjoint(), 0.1)) == pytest.approx(-math.log(0.1))


def test_total_variation_is_symmetric_and_at_most_one() -> None:
    log_p, log_q = pair()
    values = value("total_variation", log_p, log_q)
    torch.testing.assert_close(values, value("total_variation", log_q, log_p))
    assert (values < 1).all()
    assert float(value("total_variation", *disjoint())) == pytest.approx(1.0)


def test_total_variation_obeys_pinsker_s_inequality() -> None:
    log_p, log_q = pair()
    assert (2 * value("total_variation", log_p, log_q) ** 2 <= value("forward_kl", log_p, log_q)).all()


def test_adaptive_kl_lies_between_the_two_kls() -> None:
    log_p, log_q = pair()
    forward, reverse = value("forward_kl", log_p, log_q), value("reverse_kl", log_p, log_q)
    values = value("adaptive_kl", log_p, log_q)
    assert (torch.minimum(forward, reverse) <= values).all() and (values <= torch.maximum(forward, reverse)).all()


@pytest.mark.parametrize(
    ("p", "q", "forward_share"),
    [
        # The head is the first token alone: it reaches half of the mass.
        ([0.5, 0.3, 0.2], [0.5, 0.2, 0.3], 0.0),
        ([0.5, 0.3, 0.2], [0.4, 0.3, 0.3], 0.5),
        # The second token is the one that reaches it.
        ([0.2, 0.4, 0.3, 0.1], [0.2, 0.3, 0.4, 0.1], 1.0),
        ([0.2, 0.4, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1], 0.5),
    ],
)
def test_adaptive_kl_weighs_by_the_gaps_in_head_and_tail(p: list[float], q: list[float], forward_share: float) -> None:
    log_p, log_q = torch.tensor([p]).double().log(), torch.tensor([q]).double().log()
    forward, reverse = value("forward_kl", log_p, log_q), value("reverse_kl", log_p, log_q)
    # The gaps are written in float32, so the shares are exact to that.
    expected = forward_share * forward + (1 - forward_share) * reverse
    torch.testing.assert_close(value("adaptive_kl", log_p, log_q), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in MIXED])
def test_a_mix_has_no_effect_where_the_spec_allows_none(divergence: Divergence) -> None:
    log_p, log_q = pair()
    assert torch.equal(value(divergence, log_p, log_q, 0.1), value(divergence, log_p, log_q, 0.9))
