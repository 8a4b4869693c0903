"""The angle's sums against the gradients by the head's weight themselves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.spec import Divergence
from cluster.students.angle import MOST_TOKENS, angle_sums
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.targets import Targets
from tests.cluster.students.losses.plain import PAIRS, VOCABULARY, Case


def gradient(case: Case, target: Targets, tokens: int) -> Tensor:
    """The soft loss' gradient by the head's weight, from the first tokens."""
    rows, soft_only = slice(0, tokens), replace(case.objective, hard=0.0, soft=1.0)
    part = target.chunk(rows)
    loss, _ = distillation_loss(case.hidden_TD[rows], case.head, part, soft_only, vocabulary=VOCABULARY)
    return torch.autograd.grad(loss, case.weight_VD)[0].double()


def sums(case: Case, target: Targets, exact: Targets) -> Tensor:
    hidden_TD, head = case.hidden_TD.detach(), case.head.map(Tensor.detach)
    return angle_sums(hidden_TD, head, target=target, exact=exact, objective=case.objective, vocabulary=VOCABULARY)


@pytest.mark.parametrize(("kind", "divergence"), PAIRS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", [{}, {"bias": True, "logit_scale": 2.0, "softcap": 5.0}], ids=["linear", "all"])
def test_the_sums_are_the_products_of_the_two_gradients(
    kind: str, divergence: Divergence, temperature: float, head: dict[str, Any]
) -> None:
    case = Case(kind, divergence, temperature=temperature, **head)
    target, exact = case.target(), replace(case, kind="dense").target()
    own, whole = gradient(case, target, case.tokens), gradient(case, exact, case.tokens)
    products = torch.stack([(own * whole).sum(), own.square().sum(), whole.square().sum()])
    torch.testing.assert_close(sums(case, target, exact), products, rtol=1e-4, atol=0)


def test_no_more_than_the_first_tokens_count() -> None:
    case = Case("topk", tokens=MOST_TOKENS + 50)
    target, exact = case.target(), replace(case, kind="dense").target()
    own, whole = gradient(case, target, MOST_TOKENS), gradient(case, exact, MOST_TOKENS)
    products = torch.stack([(own * whole).sum(), own.square().sum(), whole.square().sum()])
    torch.testing.assert_close(sums(case, target, exact), products, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["dense", "hidden"])
def test_an_exact_kind_points_where_the_exact_gradient_points(kind: str) -> None:
    case = Case(kind)
    dot, own, whole = sums(case, case.target(), replace(case, kind="dense").target()).tolist()
    assert dot / (own * whole) ** 0.5 == pytest.approx(1.0, abs=1e-6)


def test_more_kept_tokens_point_closer() -> None:
    cosines = []
    for k in (1, 6, 20, VOCABULARY):
        case = Case("topk", k=k)
        dot, own, whole = sums(case, case.target(), replace(case, kind="dense").target()).tolist()
        cosines.append(dot / (own * whole) ** 0.5)
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.999 < cosines[-1]


def test_neither_the_weights_nor_the_corpus_change_the_angle() -> None:
    case = Case("topk")
    target, exact = case.target(), replace(case, kind="dense").target()
    first = sums(case, target, exact)
    case.hard, case.soft = 0.7, 3.0
    assert torch.equal(sums(case, target, exact), first)
