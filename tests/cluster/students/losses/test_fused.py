"""The fused loss against the plain formula in float64, where it is exact and where it must not break."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.labels.reduce import probabilities_and_entropy, systematic_draws
from cluster.spec import Divergence
from cluster.students.losses import fused as fused_module
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.targets import BucketTargets, FullTargets, SampledTargets, Soft, Tile, softmax
from tests.cluster.students.losses.plain import KINDS, PADDED, PAIRS, VOCABULARY, WIDTH, Case, gradients, off

OF_TOPK = [divergence for kind, divergence in PAIRS if kind == "topk"]
every_pair = pytest.mark.parametrize(("kind", "divergence"), PAIRS)
every_kind = pytest.mark.parametrize("kind", KINDS)

SETTINGS = {
    "the defaults": Case(),
    "soft only": Case(hard=0.0, soft=1.0),
    "a hot temperature": Case(temperature=4.0),
    "a cold temperature": Case(temperature=0.5, hard=0.7, soft=2.0),
    "one token": Case(tokens=1),
    "one token a chunk": Case(chunk=1, temperature=2.0),
    "an odd chunk": Case(chunk=7),
    "a sharp student and teacher": Case(scale=2.0),
    "a biased head": Case(bias=True),
    "a scaled head": Case(logit_scale=0.25),
    "a capped head": Case(softcap=3.0),
    "a biased, scaled and capped head": Case(bias=True, logit_scale=2.0, softcap=5.0, temperature=3.0, chunk=7),
}

HEADS: dict[str, dict[str, Any]] = {
    "a linear head": {},
    "a head with all": {"bias": True, "logit_scale": 2.0, "softcap": 5.0},
}


def worst(case: Case) -> float:
    """The largest relative error of the loss, the sums and the gradients against the plain formula."""
    true_loss, true_sums, *true = case.plain_gradients()
    loss, sums = case.fused()
    found = gradients(case, loss)
    assert not any(padded[VOCABULARY:].any() for padded in found[1:])
    fused, plain = (loss.detach(), *sums, *found), (true_loss, *true_sums, *true)
    return max(off(got, true) for got, true in zip(fused, plain, strict=True))


def largest_share(some: tuple[Tensor, ...], of: tuple[Tensor, ...]) -> float:
    return max(float(part.norm() / whole.norm()) for part, whole in zip(some, of, strict=True))


@every_pair
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradients_are_those_of_the_plain_formula(kind: str, divergence: Divergence, setting: Case) -> None:
    case = replace(setting, kind=kind, divergence=divergence)
    assert worst(case) < 1e-5
    assert worst(replace(case, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize("k", [1, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("divergence", OF_TOPK)
def test_any_number_of_kept_tokens_is_exact(divergence: Divergence, k: int) -> None:
    case = Case(divergence=divergence, k=k, temperature=2.0)
    assert worst(case) < 1e-5
    assert worst(replace(case, dtype=torch.float64)) < 1e-10


@every_kind
def test_the_corpus_alone_can_be_learnt_from(kind: str) -> None:
    assert worst(Case(kind=kind, hard=1.0, soft=0.0)) < 1e-5


@pytest.mark.gpu
@every_pair
def test_a_gpu_gives_what_the_plain_formula_gives(kind: str, divergence: Divergence) -> None:
    assert worst(Case(kind=kind, divergence=divergence, device="cuda", temperature=2.0, chunk=7)) < 1e-5


# adaptive_kl's weights count as constants, which finite differences cannot know.
@pytest.mark.parametrize(("kind", "divergence"), [pair for pair in PAIRS if pair[1] != "adaptive_kl"])
def test_the_gradient_in_float64_is_that_of_finite_differences(kind: str, divergence: Divergence) -> None:
    case = Case(kind, divergence, tokens=3, temperature=2.0, chunk=2, dtype=torch.float64)
    target = case.target()

    class Loss(torch.autograd.Function):
        """gradcheck goes backward twice, and the fused loss may once: so it is made again for each backward."""

        @staticmethod
        def forward(ctx: object, *_: Tensor) -> Tensor:
            return case.fused(target)[0].detach()

        @staticmethod
        def backward(ctx: object, upstream: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return tuple(upstream * gradient for gradient in gradients(case, case.fused(target)[0]))

    assert torch.autograd.gradcheck(Loss.apply, (case.hidden_TD, case.weight_VD), rtol=1e-6, atol=1e-8, fast_mode=True)


@every_pair
@pytest.mark.parametrize("chunk", [1, 5, 36, 37])
def test_chunks_and_tiles_do_not_show(
    kind: str, divergence: Divergence, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(kind, divergence)
    loss, sums = case.fused()
    whole = gradients(case, loss)
    monkeypatch.setattr(fused_module, "TILE_FLOATS", 3 * VOCABULARY)
    case.chunk = chunk
    cut_loss, cut_sums = case.fused()
    torch.testing.assert_close(cut_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(cut_sums, sums, rtol=1e-6, atol=0)
    assert max(off(cut, true) for cut, true in zip(gradients(case, cut_loss), whole, strict=True)) < 1e-6


@every_kind
def test_what_the_padded_rows_hold_does_not_matter(kind: str) -> None:
    case = Case(kind)
    loss, (hidden, weight) = case.fused()[0], gradients(case)
    with torch.no_grad():
        case.weight_VD[VOCABULARY:] = torch.inf
    assert torch.equal(case.fused()[0], loss)
    assert all(map(torch.equal, gradients(case), (hidden, weight)))
    assert not weight[VOCABULARY:].any()


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("kind", "divergence"), [pair for pair in PAIRS if pair[0] != "sampled"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    kind: str, divergence: Divergence, temperature: float, head: dict[str, Any]
) -> None:
    case = Case(kind, divergence, temperature=temperature, hard=0.0, soft=1.0, **head)
    stranger = gradients(case)
    case.learn_from_itself()
    loss, sums = case.fused()
    assert sums[:2].abs().max() / case.tokens < 1e-6
    assert abs(float(loss.detach())) / case.tokens < 1e-6 * max(1.0, temperature**2)
    if divergence != "total_variation":  # its slope is a sign, and here it is that of a rounding error
        assert largest_share(gradients(case), stranger) < 1e-5


@pytest.mark.parametrize("k", [1, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("divergence", OF_TOPK)
def test_however_many_are_kept_of_its_own_a_student_has_nothing_to_learn(divergence: Divergence, k: int) -> None:
    case = Case(divergence=divergence, k=k, hard=0.0, soft=1.0)
    stranger = gradients(case)
    case.learn_from_itself()
    assert case.fused()[1][:2].abs().max() / case.tokens < 1e-6
    if divergence != "total_variation":
        assert largest_share(gradients(case), stranger) < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_over_all_draws_a_student_that_is_the_teacher_has_nothing_to_learn(temperature: float) -> None:
    """Evenly spaced offsets together are systematic draws many times as dense, off by at most one of those."""
    case, offsets = Case("sampled", tokens=4, temperature=temperature, hard=0.0, soft=1.0), 5000
    stranger = gradients(case)
    case.learn_from_itself()
    p_TV, entropy_T, _ = probabilities_and_entropy(case.teacher_TV, temperature)
    p_NV, even_N = p_TV.repeat_interleave(offsets, 0), (torch.arange(4 * offsets) % offsets + 0.5) / offsets
    ids_NK, counts_NK = systematic_draws(p_NV, even_N.double(), case.draws)
    next_N, entropy_N = case.next_T.repeat_interleave(offsets), entropy_T.repeat_interleave(offsets)
    target = SampledTargets(next_N, ids_NK, counts_NK / case.draws, entropy_N)
    case.chunk = len(even_N)
    many_ND = case.hidden_TD.repeat_interleave(offsets, 0)
    loss, sums = distillation_loss(many_ND, case.head, target, case.objective, vocabulary=VOCABULARY)
    assert abs(float(sums[0])) / len(even_N) < 1e-3
    assert largest_share(gradients(case, loss / offsets), stranger) < 1e-3


def tile_of(case: Case, copies: int) -> Tile:
    z_TV = (case.hidden_TD.detach() @ case.weight_VD.detach()[:VOCABULARY].T / case.temperature).double()
    z_NV = z_TV.repeat(copies, 1)
    return Tile(z_NV, *softmax(z_NV))


def drawn(case: Case, copies: int) -> Soft:
    """The loss of sampled labels over independent offsets, [copies * tokens]."""
    p_TV, entropy_T, _ = probabilities_and_entropy(case.teacher_TV, case.temperature)
    offsets_N = torch.rand(copies * case.tokens, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ids_NK, counts_NK = systematic_draws(p_TV.repeat(copies, 1), offsets_N, case.draws)
    target = SampledTargets(case.next_T.repeat(copies), ids_NK, counts_NK / case.draws, entropy_T.repeat(copies))
    return target.soft(tile_of(case, copies), case.objective, 0.0)


# How often the labels are drawn: less often where a drawing costs more and errs less.
@pytest.mark.parametrize(("draws", "most"), [(1, 4096), (8, 2048), (50, 1024)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased_and_their_error_falls_with_their_number(draws: int, most: int, temperature: float) -> None:
    case = Case("sampled", tokens=24, draws=draws, temperature=temperature, hard=0.0, soft=1.0)
    exact = FullTargets(case.next_T, case.teacher_TV).soft(tile_of(case, 1), case.objective, 0.0)
    soft = drawn(case, most)
    assert soft.grad_CV is not None and exact.grad_CV is not None
    for got, true in ((soft.divergence_C[:, None], exact.divergence_C[:, None]), (soft.grad_CV, exact.grad_CV)):
        error_NTX = got.view(most, 24, -1) - true
        # The root mean square over tokens and groups of n draws: 1 / sqrt(n) for independent ones.
        grouped = {n: error_NTX.unflatten(0, (-1, n)).mean(1) for n in (16, 256, most)}
        rms = {n: float(error.square().mean().sqrt()) for n, error in grouped.items()}
        assert rms[256] < rms[16] / 3
        assert rms[most] < rms[16] / (most / 16) ** 0.5 * 2
        # 5 standard errors, and ten draws more or less of a token too rare for its deviation to be seen.
        allowed_TX = 5 * error_NTX.std(0) / most**0.5 + 10 * temperature / (most * draws)
        assert (error_NTX.mean(0).abs() <= allowed_TX).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", OF_TOPK)
def test_a_whole_vocabulary_kept_gives_the_full_divergence(divergence: Divergence, temperature: float) -> None:
    kept = Case("topk", divergence, k=VOCABULARY, temperature=temperature)
    full = Case("dense", divergence, temperature=temperature)
    (loss, sums), (full_loss, full_sums) = kept.fused(), full.fused()
    assert max(off(loss.detach(), full_loss.detach()), off(sums, full_sums)) < 1e-5
    both = zip(gradients(kept, loss), gradients(full, full_loss), strict=True)
    assert max(off(got, want) for got, want in both) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", [divergence for kind, divergence in PAIRS if kind == "hidden"])
def test_hidden_states_give_what_their_logits_give(divergence: Divergence, temperature: float) -> None:
    hidden, dense = (Case(kind, divergence, temperature=temperature, chunk=7) for kind in ("hidden", "dense"))
    (loss, sums), (dense_loss, dense_sums) = hidden.fused(), dense.fused()
    assert max(off(loss.detach(), dense_loss.detach()), off(sums, dense_sums)) < 1e-6
    both = zip(gradients(hidden, loss), gradients(dense, dense_loss), strict=True)
    assert max(off(got, want) for got, want in both) < 1e-5


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("divergence", OF_TOPK)
def test_the_buckets_divergence_is_never_above_the_full_one_nor_below_nothing(
    divergence: Divergence, scale: float
) -> None:
    full = float(Case("dense", divergence, scale=scale).fused()[1][0])
    kept = [float(Case("topk", divergence, k=k, scale=scale).fused()[1][0]) for k in (1, 6, 20, VOCABULARY - 1)]
    assert all(few <= more * (1 + 1e-6) for few, more in zip(kept, [*kept[1:], full], strict=True))
    assert kept[0] > 0


EXTREMES = {
    "a student that is sure": (80.0, 1.0),
    "a teacher that is sure": (1.0, 80.0),
    "both are sure and disagree": (80.0, 80.0),
    "a one-hot teacher": (1.0, 1e4),
    "a teacher that excludes tokens": (1.0, float("inf")),
    "a sure student, a teacher that excludes tokens": (80.0, float("inf")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_pair
@pytest.mark.parametrize(("student", "teacher"), EXTREMES.values(), ids=EXTREMES)
def test_extreme_logits_give_finite_numbers(
    student: float, teacher: float, kind: str, divergence: Divergence, dtype: torch.dtype
) -> None:
    if kind == "hidden" and teacher == torch.inf:
        teacher = 1e30  # hidden states are finite
    for k in (1, 6, VOCABULARY) if kind == "topk" else (6,):
        for temperature in (0.5, 1.0):
            case = Case(kind, divergence, k=k, dtype=dtype, temperature=temperature)
            likely = torch.randn(case.tokens, VOCABULARY, generator=torch.Generator().manual_seed(2)) > 1
            case.learn_from_logits(torch.where(likely, teacher if teacher < 1e30 else 0.0, -teacher))
            with torch.no_grad():
                case.hidden_TD.copy_(F.one_hot(torch.arange(case.tokens) % WIDTH, WIDTH))
                case.weight_VD.copy_(student * (case.weight_VD > 0).to(dtype) * 2 - student)
            loss, sums = case.fused()
            assert loss.isfinite() and sums.isfinite().all()
            assert all(gradient.isfinite().all() for gradient in gradients(case, loss))


@every_kind
def test_an_unlikely_tail_is_still_pulled_up(kind: str) -> None:
    """The teacher's mass lies where the student has next to none: the gradient must not vanish with it."""
    case = Case(kind, tokens=4, k=1, hard=0.0, soft=1.0)
    with torch.no_grad():
        case.hidden_TD.copy_(torch.eye(WIDTH)[:4])
        case.weight_VD.copy_(torch.randn(PADDED, WIDTH, generator=torch.Generator().manual_seed(3)))
        case.weight_VD[7] += 60
    teacher_TV = torch.zeros(4, VOCABULARY)
    teacher_TV[:, 7] = 1.0
    case.learn_from_logits(teacher_TV)
    *_, hidden, weight = case.plain_gradients()
    assert max(off(got, want) for got, want in zip(gradients(case), (hidden, weight), strict=True)) < 1e-4
    assert hidden.norm() > 0.1


@every_pair
def test_bfloat16_is_close_and_returns_gradients_of_its_own_kind(kind: str, divergence: Divergence) -> None:
    case = Case(kind, divergence, dtype=torch.bfloat16)
    true_loss, _, hidden, weight = case.plain_gradients()
    loss, _ = case.fused()
    assert loss.dtype == torch.float32
    assert off(loss.detach(), true_loss) < 0.01
    got_hidden, got_weight = gradients(case, loss)
    assert (got_hidden.dtype, got_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert max(off(got_hidden, hidden), off(got_weight, weight)) < 0.02


@every_kind
def test_the_gradient_is_scaled_by_what_comes_from_above(kind: str) -> None:
    case = Case(kind)
    once, (loss, sums) = gradients(case), case.fused()
    scaled = gradients(case, loss * 0.25)
    assert max(off(got, 0.25 * want) for got, want in zip(scaled, once, strict=True)) < 1e-6
    assert not sums.requires_grad


@every_kind
@pytest.mark.parametrize(("hidden", "weight"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient_and_changes_none(kind: str, hidden: bool, weight: bool) -> None:
    case, free = Case(kind), Case(kind)
    case.hidden_TD.requires_grad_(hidden)
    case.weight_VD.requires_grad_(weight)
    loss, sums = case.fused()
    torch.testing.assert_close((loss, sums), free.fused(), rtol=1e-6, atol=0)
    assert loss.requires_grad is (hidden or weight)
    if loss.requires_grad:
        loss.backward()
    got = (case.hidden_TD.grad, case.weight_VD.grad)
    for asked, mine, true in zip((hidden, weight), got, gradients(free), strict=True):
        assert (mine is not None and torch.equal(mine, true)) if asked else mine is None


@every_pair
def test_without_gradients_the_loss_is_the_same(kind: str, divergence: Divergence) -> None:
    for temperature in (1.0, 2.0):
        case = Case(kind, divergence, temperature=temperature)
        learnt = case.fused()
        case.hidden_TD, case.weight_VD = case.hidden_TD.detach(), case.weight_VD.detach()
        torch.testing.assert_close(case.fused(), learnt, rtol=1e-6, atol=0)


@every_pair
def test_no_loss_token_gives_no_loss_and_no_gradient(kind: str, divergence: Divergence) -> None:
    case = Case(kind, divergence)
    target, none = case.target().chunk(slice(0, 0)), case.hidden_TD.detach()[:0].requires_grad_()
    loss, sums = distillation_loss(none, case.head, target, case.objective, vocabulary=VOCABULARY)
    assert float(loss.detach()) == 0.0 and not sums.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (none, case.weight_VD)))


@every_kind
def test_the_loss_is_a_sum_over_its_tokens(kind: str) -> None:
    case = Case(kind)
    target, whole, total = case.target(), case.fused(), torch.zeros(4, dtype=torch.float64)
    for rows in (slice(0, 10), slice(10, case.tokens)):
        part = target.chunk(rows)
        loss, sums = distillation_loss(case.hidden_TD[rows], case.head, part, case.objective, vocabulary=VOCABULARY)
        total += torch.cat([loss.detach().double()[None], sums])
    torch.testing.assert_close(total, torch.cat([whole[0].detach().double()[None], whole[1]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@every_pair
def test_a_teacher_changed_at_one_token_moves_that_row_s_gradient_alone(
    kind: str, divergence: Divergence, head: dict[str, Any]
) -> None:
    case, row = Case(kind, divergence, chunk=7, **head), 12
    before = gradients(case)[0]
    case.teacher_TD[row] *= -1
    case.learn_from(case.teacher_TD, case.teacher_head)
    moved_T = (gradients(case)[0] - before).norm(dim=-1)
    assert float(moved_T[row]) > 1e-3
    assert moved_T.nonzero().flatten().tolist() == [row]


def test_a_target_is_cut_by_rows_in_every_column() -> None:
    target = Case("topk").target()
    assert isinstance(target, BucketTargets)
    part = target.rows(slice(3, 5))
    assert torch.equal(part.next_T, target.next_T[3:5]) and torch.equal(part.ids_TK, target.ids_TK[3:5])
    assert torch.equal(part.logprobs_TK, target.logprobs_TK[3:5])
    assert torch.equal(part.log_tail_T, target.log_tail_T[3:5])


@every_kind
def test_the_blocks_in_which_the_heads_gradient_is_added_change_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rows in (VOCABULARY, 7):
        monkeypatch.setitem(fused_module.PRODUCT_ROWS, "cpu", rows)
        case = Case(kind, dtype=torch.bfloat16, chunk=10)
        loss, _ = case.fused()
        found.append(gradients(case, loss)[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-4)
    assert found[0].any()
