"""What DeepSpeed is told, and the learning rate over a run."""

import itertools
from typing import Any, Literal

import pytest
from torch import nn

from cluster.spec import ScheduleSpec, StudentSpec
from cluster.students.zero import adamw, rate, schedule_of, zero_config

Kind = Literal["cosine", "linear", "constant"]


def student(**fields: Any) -> StudentSpec:
    return StudentSpec.model_validate({"init": {"source": "teacher", "layers": 2}, **fields})


def rates(total: int, kind: Kind, **fields: float) -> list[float]:
    schedule = ScheduleSpec(kind=kind, **fields)
    return [rate(schedule, batch, total) for batch in range(total)]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 8), (2, 2), (4, 1), (2, 4)])
def test_the_batch_is_ranks_times_micro_batches_times_accumulation(ranks: int, micro: int) -> None:
    config = zero_config(student(ranks=ranks, micro_batch=micro), 8)
    steps, per_rank = config["gradient_accumulation_steps"], config["train_micro_batch_size_per_gpu"]
    assert config["train_batch_size"] == 8 == ranks * per_rank * steps
    assert per_rank == micro


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stage_precision_and_clipping_are_the_student_s(stage: int, precision: str) -> None:
    config = zero_config(student(zero_stage=stage, precision=precision, optimizer={"clip": 0.5}), 1)
    assert config["zero_optimization"]["stage"] == stage
    assert config["bf16"]["enabled"] is (precision == "bfloat16")
    assert config["gradient_clipping"] == 0.5
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("universal", [False, True])
def test_a_universal_checkpoint_is_loaded_only_where_it_is_asked_for(universal: bool) -> None:
    assert zero_config(student(), 1, load_universal=universal)["checkpoint"] == {"load_universal": universal}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rate_rises_over_the_warm_up_and_never_after_it(kind: Kind) -> None:
    curve = rates(100, kind, warmup=0.2)
    assert curve[0] > 0
    assert all(a < b for a, b in itertools.pairwise(curve[:20]))
    assert max(curve) == curve[20] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(curve[20:]))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("total", [10, 1000])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_batch_has_the_final_rate(kind: Kind, total: int, final: float) -> None:
    curve = rates(total, kind, final=final)
    assert curve[-1] == pytest.approx(final, abs=1e-9)
    assert min(curve[total // 2 :]) >= final - 1e-9


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.333])
def test_the_rate_makes_no_jump(kind: Kind, warmup: float) -> None:
    steps = [abs(a - b) for a, b in itertools.pairwise(rates(1000, kind, warmup=warmup))]
    assert max(steps) < 1.1 / (warmup * 1000 + 1) + 2 / 1000


def test_half_way_down_the_shapes_are_what_their_names_say() -> None:
    assert rates(1001, "linear", warmup=0, final=0)[250] == pytest.approx(0.75, abs=1e-3)
    assert rates(1001, "cosine", warmup=0, final=0)[250] == pytest.approx((1 + 2**-0.5) / 2, abs=1e-3)
    assert set(rates(50, "constant", warmup=0)) == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_a_run_of_one_batch_learns_something(kind: Kind, warmup: float) -> None:
    assert 0 < rates(1, kind, warmup=warmup)[0] <= 1


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_optimiser_takes_the_schedule_s_rate_batch_for_batch(kind: Kind) -> None:
    chosen = student(lr=0.02, schedule={"kind": kind, "warmup": 0.3})
    optimizer = adamw(nn.Linear(2, 2), chosen)
    scheduler = schedule_of(chosen, 10)(optimizer)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.02 * r for r in rates(10, kind, warmup=0.3)])


def test_matrices_are_decayed_and_vectors_and_frozen_weights_are_not() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[3].weight.requires_grad_(False)
    chosen = student(lr=0.5, optimizer={"weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-6})
    optimizer = adamw(module, chosen)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.3 if p.dim() > 1 else 0.0 for p in module.parameters() if p is not module[3].weight}
    assert decay == expected
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(0.5, (0.8, 0.9), 1e-6)}


def test_a_tied_weight_is_learnt_once() -> None:
    module = nn.ModuleList([nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)])
    module[1].weight = module[0].weight
    assert sum(len(group["params"]) for group in adamw(module, student()).param_groups) == 1
