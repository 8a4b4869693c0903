"""The losses as they are written down, in float64, and labels of each kind from one teacher's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.labels.reduce import probabilities_and_entropy, systematic_draws, top_k
from cluster.spec import DenseLabels, Divergence, HiddenLabels, LossSpec, SampledLabels, TopKLabels
from cluster.spec.loss import why_not
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import BucketTargets, FullTargets, HiddenTargets, SampledTargets, Targets

VOCABULARY, PADDED, WIDTH = 40, 48, 16
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
KINDS = {
    "topk": TopKLabels(),
    "sampled": SampledLabels(kind="sampled"),
    "dense": DenseLabels(kind="dense"),
    "hidden": HiddenLabels(kind="hidden"),
}
# Every kind with every divergence that the spec lets it have.
PAIRS = [(kind, d) for kind, spec in KINDS.items() for d in DIVERGENCES if not why_not(spec, LossSpec(divergence=d))]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def plain_divergence(divergence: Divergence, mix: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D of each row."""
    p, q = log_p.exp(), log_q.exp()
    match divergence:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jensen_shannon":
            log_m = (mix * p + (1 - mix) * q).log()
            return mix * kl(log_p, log_m) + (1 - mix) * kl(log_q, log_m)
        case "skewed_kl":
            return kl(log_p, (mix * p + (1 - mix) * q).log())
        case "skewed_reverse_kl":
            return kl(log_q, (mix * q + (1 - mix) * p).log())
        case "total_variation":
            return 0.5 * (p - q).abs().sum(-1)
        case "adaptive_kl":
            ranked, order = p.sort(-1, descending=True)
            head = torch.zeros_like(p).scatter(-1, order, (ranked.cumsum(-1) - ranked < 0.5).to(p.dtype))
            gap = (p - q).abs().detach()
            share = (gap * head).sum(-1) / gap.sum(-1)
            return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


@dataclass
class Case:
    """A student, a teacher and a text over random tokens; the teacher's logits decide the labels."""

    kind: str = "topk"
    divergence: Divergence = "forward_kl"
    tokens: int = 37
    k: int = 6
    draws: int = 8
    temperature: float = 1.0
    hard: float = 0.1
    soft: float = 0.9
    mix: float = 0.3
    chunk: int = 512
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(self.dtype, torch.float32)
        hidden = torch.randn(self.tokens, WIDTH, generator=generator)
        weight = self.scale * torch.randn(PADDED, WIDTH, generator=generator) / 2
        teacher_TD = torch.randn(self.tokens, WIDTH, generator=generator).to(self.device, wide)
        teacher_VD = self.scale * torch.randn(VOCABULARY, WIDTH, generator=generator).to(self.device, wide) / 2
        self.next_T = torch.randint(0, VOCABULARY, (self.tokens,), generator=generator).to(self.device)
        self.offsets_T = torch.rand(self.tokens, generator=generator, dtype=torch.float64).to(self.device)
        self.hidden_TD = hidden.to(self.device, self.dtype).requires_grad_()
        self.weight_VD = weight.to(self.device, self.dtype).requires_grad_()
        self.learn_from(teacher_TD, teacher_VD)

    def learn_from(self, teacher_TD: Tensor, teacher_VD: Tensor) -> None:
        """Take another teacher: hidden states and head."""
        self.teacher_TD, self.teacher_VD, self.teacher_TV = teacher_TD, teacher_VD, teacher_TD @ teacher_VD.T

    def learn_from_logits(self, teacher_TV: Tensor) -> None:
        """A teacher with any logits: they are its hidden states, under a head that changes nothing."""
        self.teacher_TD, self.teacher_VD = teacher_TV, torch.eye(VOCABULARY)
        self.teacher_TV = teacher_TV

    def learn_from_itself(self) -> None:
        """Make the student the teacher."""
        self.learn_from(self.hidden_TD.detach(), self.weight_VD.detach()[:VOCABULARY])

    @property
    def objective(self) -> Objective:
        return Objective(self.hard, self.soft, self.temperature, self.divergence, self.mix)

    def target(self) -> Targets:
        if self.kind == "hidden":
            return HiddenTargets(self.next_T, self.teacher_TD, self.teacher_VD)
        if self.kind == "dense":
            return FullTargets(self.next_T, self.teacher_TV)
        p_TV, entropy_T, _ = probabilities_and_entropy(self.teacher_TV, self.temperature)
        if self.kind == "topk":
            return BucketTargets(self.next_T, *top_k(p_TV, self.k))
        ids_TN, counts_TN = systematic_draws(p_TV, self.offsets_T, self.draws)
        return SampledTargets(self.next_T, ids_TN, counts_TN.float() / self.draws, entropy_T)

    def fused(self, target: Targets | None = None) -> tuple[Tensor, Tensor]:
        return distillation_loss(
            self.hidden_TD,
            self.weight_VD,
            target or self.target(),
            self.objective,
            vocabulary=VOCABULARY,
            chunk=self.chunk,
        )

    def plain(self, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and sums of D, forward KL and cross-entropy, all in float64; the labels are taken as given."""
        target, z_TV = self.target(), hidden_TD @ weight_VD[:VOCABULARY].T
        ce = F.cross_entropy(z_TV, self.next_T, reduction="sum")
        log_q = (z_TV / self.temperature).log_softmax(-1)
        if isinstance(target, SampledTargets):
            shares, entropy = target.shares_TK.double(), target.entropy_T.double()
            d = forward = -(shares * log_q.gather(1, target.ids_TK)).sum() - entropy.sum()
        else:
            if isinstance(target, BucketTargets):
                log_p, log_q = self._buckets(target, log_q)
            elif isinstance(target, HiddenTargets):
                teacher_TV = target.hidden_TD.double() @ target.teacher_head_VD.double().T
                log_p = (teacher_TV / self.temperature).log_softmax(-1)
            else:
                log_p = (self.teacher_TV.double() / self.temperature).log_softmax(-1)
            d, forward = plain_divergence(self.divergence, self.mix, log_p, log_q).sum(), kl(log_p, log_q).sum()
        return self.hard * ce + self.soft * self.temperature**2 * d, torch.stack([d, forward, ce])

    def _buckets(self, target: BucketTargets, log_q_TV: Tensor) -> tuple[Tensor, Tensor]:
        log_p_TK, log_q_TK = target.logprobs_TK.double(), log_q_TV.gather(1, target.ids_TK)
        if self.k == VOCABULARY:
            return log_p_TK, log_q_TK
        log_rest_T1 = log_q_TV.scatter(1, target.ids_TK, -torch.inf).logsumexp(-1, keepdim=True)
        log_p = torch.cat([log_p_TK, target.log_tail_T.double()[:, None]], -1)
        return log_p, torch.cat([log_q_TK, log_rest_T1], -1)

    def plain_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, sums, and the gradients by hidden states and weight."""
        hidden = self.hidden_TD.detach().double().requires_grad_()
        weight = self.weight_VD.detach().double().requires_grad_()
        loss, sums = self.plain(hidden, weight)
        return loss.detach(), sums.detach(), *torch.autograd.grad(loss, (hidden, weight))


def gradients(case: Case, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
    hidden, weight = torch.autograd.grad(case.fused()[0] if loss is None else loss, (case.hidden_TD, case.weight_VD))
    return hidden, weight


def off(got: Tensor, true: Tensor) -> float:
    """Error relative to the whole tensor's size."""
    return float((got.double() - true.double()).norm() / true.double().norm())
