"""The fused loss against the plain formula in float64, where it is exact and where it must not break."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.labels.from_hidden import topk_of_logits
from cluster.students.losses.divergence import TILE, TopKTargets, distillation_loss

VOCABULARY, PADDED, WIDTH = 40, 48, 16
Losses = tuple[Tensor, Tensor, Tensor]


@dataclass
class Case:
    """A student, a teacher and a text over random tokens; the teacher's logits decide the labels."""

    tokens: int = 2 * TILE + 5
    k: int = 6
    temperature: float = 1.0
    hard: float = 0.1
    soft: float = 0.9
    chunk: int = 512
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.tokens, WIDTH, generator=generator)
        weight = self.scale * torch.randn(PADDED, WIDTH, generator=generator) / 2
        self.teacher_TV = 3 * self.scale * torch.randn(self.tokens, VOCABULARY, generator=generator)
        self.next_T = torch.randint(0, VOCABULARY, (self.tokens,), generator=generator).to(self.device)
        self.hidden_TD = hidden.to(self.device, self.dtype).requires_grad_()
        self.weight_VD = weight.to(self.device, self.dtype).requires_grad_()

    def target(self) -> TopKTargets:
        columns = topk_of_logits(self.teacher_TV.to(self.device) / self.temperature, self.k)
        return TopKTargets(self.next_T, *columns)

    def learn_from_itself(self) -> None:
        """Make the student the teacher."""
        self.teacher_TV = (self.hidden_TD @ self.weight_VD[:VOCABULARY].T).detach().float()

    def fused(self, target: TopKTargets | None = None) -> Losses:
        weights = {"hard": self.hard, "soft": self.soft, "temperature": self.temperature}
        shape = {"vocabulary": VOCABULARY, "chunk": self.chunk}
        return distillation_loss(self.hidden_TD, self.weight_VD, target or self.target(), **weights, **shape)  # type: ignore[arg-type]

    def plain(self, hidden_TD: Tensor, weight_VD: Tensor) -> Losses:
        """hard * CE + soft * T^2 * KL over K + 1 buckets, as it is written down; the labels are taken as given."""
        target, z_TV = self.target(), hidden_TD @ weight_VD[:VOCABULARY].T
        cross_entropy = F.cross_entropy(z_TV, target.next_T, reduction="sum")
        log_q_TV = (z_TV / self.temperature).log_softmax(-1)
        log_p_TK, log_q_TK = target.logprobs_TK.double(), log_q_TV.gather(1, target.ids_TK)
        kl = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum()
        if self.k < VOCABULARY:
            log_r_T = target.log_tail_T.double()
            log_q_rest_T = log_q_TV.scatter(1, target.ids_TK, -torch.inf).logsumexp(-1)
            kl = kl + (log_r_T.exp() * (log_r_T - log_q_rest_T)).sum()
        return self.hard * cross_entropy + self.soft * self.temperature**2 * kl, kl, cross_entropy

    def plain_gradients(self) -> tuple[Losses, Tensor, Tensor]:
        hidden = self.hidden_TD.detach().double().requires_grad_()
        weight = self.weight_VD.detach().double().requires_grad_()
        losses = self.plain(hidden, weight)
        grad_hidden, grad_weight = torch.autograd.grad(losses[0], (hidden, weight))
        return losses, grad_hidden, grad_weight


def gradients(case: Case, losses: Losses | None = None) -> tuple[Tensor, Tensor]:
    hidden, weight = torch.autograd.grad((losses or case.fused())[0], (case.hidden_TD, case.weight_VD))
    return hidden, weight


def off(got: Tensor, true: Tensor) -> float:
    """Error relative to the whole tensor's size."""
    return float((got.double() - true).norm() / true.norm())


CASES = {
    "the defaults": Case(),
    "soft only": Case(hard=0.0, soft=1.0),
    "hard only": Case(hard=1.0, soft=0.0),
    "a hot temperature": Case(temperature=4.0),
    "a cold temperature": Case(temperature=0.5, hard=0.7, soft=2.0),
    "one kept token": Case(k=1),
    "all but one kept": Case(k=VOCABULARY - 1, temperature=2.0),
    "all kept": Case(k=VOCABULARY, temperature=2.0),
    "one token": Case(tokens=1),
    "one token a chunk": Case(chunk=1, temperature=2.0),
    "an odd chunk": Case(chunk=7),
    "a chunk of one tile": Case(tokens=2 * TILE, chunk=TILE),
    "a chunk one over a tile": Case(tokens=2 * TILE + 2, chunk=TILE + 1),
    "a chunk one under a tile": Case(chunk=TILE - 1),
    "a sharp student and teacher": Case(scale=3.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_the_plain_formula(case: Case) -> None:
    losses = case.fused()
    true, hidden, weight = case.plain_gradients()
    assert [off(got.detach(), want.detach()) < 1e-5 for got, want in zip(losses, true, strict=True)] == [True] * 3
    got_hidden, got_weight = gradients(case, losses)
    assert off(got_hidden, hidden) < 1e-5
    assert off(got_weight, weight) < 1e-5
    assert not got_weight[VOCABULARY:].any()


@pytest.mark.gpu
def test_a_gpu_gives_what_the_plain_formula_gives() -> None:
    case = Case(device="cuda", temperature=2.0, chunk=TILE + 1)
    (loss, _, _), hidden, weight = case.plain_gradients()
    assert off(case.fused()[0].detach(), loss.detach()) < 1e-5
    assert max(off(got, want) for got, want in zip(gradients(case), (hidden, weight), strict=True)) < 1e-5


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_the_gradient_in_float64_is_that_of_finite_differences(k: int) -> None:
    case = Case(tokens=3, k=k, temperature=2.0, chunk=2, dtype=torch.float64)
    case.teacher_TV = case.teacher_TV.double()
    target = case.target()

    class Loss(torch.autograd.Function):
        """gradcheck goes backward twice, and the fused loss may once: so it is made again for each backward."""

        @staticmethod
        def forward(ctx: object, *_: Tensor) -> Tensor:
            return case.fused(target)[0].detach()

        @staticmethod
        def backward(ctx: object, upstream: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return tuple(upstream * gradient for gradient in gradients(case, case.fused(target)))

    inputs = (case.hidden_TD, case.weight_VD)
    assert torch.autograd.gradcheck(Loss.apply, inputs, rtol=1e-6, atol=1e-8, raise_exception=False)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 6, VOCABULARY - 1, VOCABULARY])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(k: int, temperature: float) -> None:
    case = Case(k=k, temperature=temperature, hard=0.0, soft=1.0)
    stranger = gradients(case)
    case.learn_from_itself()
    loss, kl, _ = case.fused()
    assert abs(float(kl)) / case.tokens < 1e-6
    assert abs(float(loss.detach())) / case.tokens < 1e-6 * max(1.0, temperature**2)
    for own, other in zip(gradients(case), stranger, strict=True):
        assert float(own.norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_whole_vocabulary_kept_gives_the_plain_full_divergence(temperature: float) -> None:
    case = Case(k=VOCABULARY, temperature=temperature)
    log_q = (case.hidden_TD.detach() @ case.weight_VD.detach()[:VOCABULARY].T / temperature).double().log_softmax(-1)
    log_p = (case.teacher_TV / temperature).double().log_softmax(-1)
    assert off(case.fused()[1], F.kl_div(log_q, log_p, reduction="sum", log_target=True)) < 1e-5


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_buckets_divergence_is_never_above_the_full_one_nor_below_nothing(scale: float) -> None:
    full = float(Case(k=VOCABULARY, scale=scale).fused()[1])
    kept = [float(Case(k=k, scale=scale).fused()[1]) for k in (1, 6, 20, VOCABULARY - 1)]
    assert kept == sorted(kept)
    assert 0 < kept[0] <= kept[-1] <= full * (1 + 1e-6)


EXTREMES = {
    "a student that is sure": (80.0, 1.0),
    "a teacher that is sure": (1.0, 80.0),
    "both are sure and disagree": (80.0, 80.0),
    "a one-hot teacher": (1.0, 1e4),
    "a teacher that excludes tokens": (1.0, float("inf")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 6, VOCABULARY])
@pytest.mark.parametrize(("student", "teacher"), EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits_give_finite_numbers(student: float, teacher: float, k: int, dtype: torch.dtype) -> None:
    case = Case(k=k, dtype=dtype)
    signs = torch.where(torch.randn(case.tokens, VOCABULARY, generator=torch.Generator().manual_seed(2)) > 1, 0.0, -1.0)
    case.teacher_TV = torch.where(signs < 0, -teacher, teacher if teacher < torch.inf else 0.0)
    with torch.no_grad():
        case.hidden_TD.copy_(F.one_hot(torch.arange(case.tokens) % WIDTH, WIDTH))
        case.weight_VD.copy_(student * (case.weight_VD > 0).to(dtype) * 2 - student)
    losses = case.fused()
    assert all(loss.isfinite() for loss in losses)
    assert all(gradient.isfinite().all() for gradient in gradients(case, losses))


def test_an_unlikely_tail_is_still_pulled_up() -> None:
    """The teacher's mass lies where the student has next to none: the gradient must not vanish with it."""
    case = Case(tokens=4, k=1, hard=0.0, soft=1.0)
    with torch.no_grad():
        case.hidden_TD.copy_(torch.eye(WIDTH)[:4])
        case.weight_VD.copy_(torch.randn(PADDED, WIDTH, generator=torch.Generator().manual_seed(3)))
        case.weight_VD[7] += 60
    case.teacher_TV = torch.zeros(4, VOCABULARY)
    case.teacher_TV[:, 7] = 1.0
    _, hidden, weight = case.plain_gradients()
    assert max(off(got, want) for got, want in zip(gradients(case), (hidden, weight), strict=True)) < 1e-4


def test_bfloat16_is_close_and_returns_gradients_of_its_own_kind() -> None:
    case = Case(dtype=torch.bfloat16)
    (loss, _, _), hidden, weight = case.plain_gradients()
    fused = case.fused()
    assert fused[0].dtype == torch.float32
    assert off(fused[0].detach(), loss.detach()) < 0.01
    got_hidden, got_weight = gradients(case, fused)
    assert (got_hidden.dtype, got_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert off(got_hidden, hidden) < 0.02
    assert off(got_weight, weight) < 0.02


def test_the_gradient_is_scaled_by_what_comes_from_above() -> None:
    case = Case()
    once, (loss, kl, _) = gradients(case), case.fused()
    scaled = torch.autograd.grad(loss * 0.25, (case.hidden_TD, case.weight_VD))
    assert max(off(got, 0.25 * want.double()) for got, want in zip(scaled, once, strict=True)) < 1e-6
    assert not kl.requires_grad


@pytest.mark.parametrize(("hidden", "weight"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient_and_changes_none(hidden: bool, weight: bool) -> None:
    case, free = Case(), Case()
    case.hidden_TD.requires_grad_(hidden)
    case.weight_VD.requires_grad_(weight)
    loss = case.fused()[0]
    assert torch.equal(loss, free.fused()[0])
    assert loss.requires_grad is (hidden or weight)
    if loss.requires_grad:
        loss.backward()
    got = (case.hidden_TD.grad, case.weight_VD.grad)
    for asked, mine, true in zip((hidden, weight), got, gradients(free), strict=True):
        assert (mine is not None and torch.equal(mine, true)) if asked else mine is None


def test_no_loss_token_gives_no_loss_and_no_gradient() -> None:
    case = Case(tokens=0)
    assert float(case.fused()[0].detach()) == 0.0
    assert not any(gradient.any() for gradient in gradients(case))


def test_the_loss_is_a_sum_over_its_tokens() -> None:
    case, target = Case(), Case().target()
    whole = float(case.fused()[0].detach())
    parts = 0.0
    for rows in (slice(0, 10), slice(10, case.tokens)):
        weights: dict[str, Any] = {
            "vocabulary": VOCABULARY,
            "hard": case.hard,
            "soft": case.soft,
            "temperature": case.temperature,
        }
        parts += float(
            distillation_loss(case.hidden_TD[rows], case.weight_VD, target.rows(rows), **weights)[0].detach()
        )
    assert parts == pytest.approx(whole, rel=1e-6)
