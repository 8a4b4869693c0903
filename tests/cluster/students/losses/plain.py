"""The losses as they are written down, in float64, and labels of each kind from one teacher's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.heads import OutputHead
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


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


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
    bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(self.dtype, torch.float32)
        hidden = torch.randn(self.tokens, WIDTH, generator=generator)
        weight = self.scale * torch.randn(PADDED, WIDTH, generator=generator) / 2
        teacher_TD = torch.randn(self.tokens, WIDTH, generator=generator).to(self.device, wide)
        teacher_VD = self.scale * torch.randn(VOCABULARY, WIDTH, generator=generator).to(self.device, wide) / 2
        biases = [torch.randn(rows, generator=torch.Generator().manual_seed(rows)) for rows in (VOCABULARY, PADDED)]
        self.next_T = torch.randint(0, VOCABULARY, (self.tokens,), generator=generator).to(self.device)
        self.offsets_T = torch.rand(self.tokens, generator=generator, dtype=torch.float64).to(self.device)
        self.hidden_TD = hidden.to(self.device, self.dtype).requires_grad_()
        self.weight_VD = weight.to(self.device, self.dtype).requires_grad_()
        self.bias_V = biases[1].to(self.device, self.dtype).requires_grad_() if self.bias else None
        teacher_V = biases[0].to(self.device, wide) if self.bias else None
        self.learn_from(teacher_TD, OutputHead(teacher_VD, teacher_V, self.logit_scale, self.softcap))

    @property
    def head(self) -> OutputHead[Tensor]:
        return OutputHead(self.weight_VD, self.bias_V, self.logit_scale, self.softcap)

    def learn_from(self, teacher_TD: Tensor, head: OutputHead[Tensor]) -> None:
        """Take another teacher: hidden states and head."""
        self.teacher_TD, self.teacher_head = teacher_TD, head
        self.teacher_TV = plain_logits(teacher_TD, head.weight_VD, head.bias_V, head.scale, head.softcap)

    def learn_from_logits(self, teacher_TV: Tensor) -> None:
        """A teacher with any logits: they are its hidden states, under a head that changes nothing."""
        self.learn_from(teacher_TV, OutputHead(torch.eye(VOCABULARY)))
        self.teacher_TV = teacher_TV

    def learn_from_itself(self) -> None:
        """Make the student the teacher."""
        self.learn_from(self.hidden_TD.detach(), self.head.cut(VOCABULARY).map(Tensor.detach))

    @property
    def objective(self) -> Objective:
        return Objective(self.hard, self.soft, self.temperature, self.divergence, self.mix)

    def target(self) -> Targets:
        if self.kind == "hidden":
            return HiddenTargets(self.next_T, self.teacher_TD, self.teacher_head)
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
            self.head,
            target or self.target(),
            self.objective,
            vocabulary=VOCABULARY,
            chunk=self.chunk,
        )

    def plain(self, hidden_TD: Tensor, *head: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and sums of D, forward KL and cross-entropy, all in float64; the labels are taken as given."""
        weight_V, bias_V = (*(each[:VOCABULARY] for each in head), None)[:2]
        assert weight_V is not None
        target, z_TV = self.target(), plain_logits(hidden_TD, weight_V, bias_V, self.logit_scale, self.softcap)
        ce = F.cross_entropy(z_TV, self.next_T, reduction="sum")
        log_q = (z_TV / self.temperature).log_softmax(-1)
        if isinstance(target, SampledTargets):
            shares, entropy = target.shares_TK.double(), target.entropy_T.double()
            d = forward = -(shares * log_q.gather(1, target.ids_TK)).sum() - entropy.sum()
        else:
            if isinstance(target, BucketTargets):
                log_p, log_q = self._buckets(target, log_q)
            elif isinstance(target, HiddenTargets):
                head64 = target.teacher_head.map(Tensor.double)
                settings = (head64.weight_VD, head64.bias_V, head64.scale, head64.softcap)
                teacher_TV = plain_logits(target.hidden_TD.double(), *settings)
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

    @property
    def learnt(self) -> tuple[Tensor, ...]:
        """Hidden states, weight and, where there is one, bias."""
        return tuple(each for each in (self.hidden_TD, self.weight_VD, self.bias_V) if each is not None)

    def plain_gradients(self) -> tuple[Tensor, ...]:
        """Loss, sums, and the gradients by hidden states, weight and bias."""
        wide = [each.detach().double().requires_grad_() for each in self.learnt]
        loss, sums = self.plain(*wide)
        return loss.detach(), sums.detach(), *torch.autograd.grad(loss, wide)


def gradients(case: Case, loss: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(case.fused()[0] if loss is None else loss, case.learnt)


def off(got: Tensor, true: Tensor) -> float:
    """Error relative to the whole tensor's size."""
    return float((got.double() - true.double()).norm() / true.double().norm())
