"""What a bfloat16 student learns is what its gradients say, summed in float32: real DeepSpeed engines on real ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.spec import StudentSpec

pytestmark = pytest.mark.integration
STAGES = (1, 2, 3)
STEPS = 6
SEQUENCES = 8


def _spec(stage: int, ranks: int, micro: int) -> StudentSpec:
    return StudentSpec.model_validate(
        {
            "init": {"source": "teacher", "layers": 1},
            "zero_stage": stage,
            "ranks": ranks,
            "micro_batch": micro,
            "precision": "bfloat16",
            "lr": 1e-2,
            # Never reached: ranks sum the norm in another order, and its last bit is not what is asked here.
            "optimizer": {"clip": 1e6},
        }
    )


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).bfloat16()


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SEQUENCES, 32, generator=generator).bfloat16() for _ in range(STEPS)]


def _loss(outputs: Tensor) -> Tensor:
    return outputs.float().square().mean()


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights.values()])


def _process(rank: int, ranks: int, micro: int, folder: str) -> None:
    """Train by each stage and save the weights as ``{stage}.pt``, and what plain PyTorch comes to as ``plain.pt``."""
    import deepspeed

    from cluster.students.zero import adamw, gathered_state, reduce_nothing, schedule_of, use_plain_gloo, zero_config

    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    use_plain_gloo()
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for stage in STAGES:
        spec, model = _spec(stage, ranks, micro), _network()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, spec),
            lr_scheduler=schedule_of(spec, STEPS),
            config=zero_config(spec, SEQUENCES),
            dist_init_required=False,
        )
        if ranks == 1:
            reduce_nothing(engine)
        for batch in _batches():
            for part in batch.chunk(ranks)[rank].split(micro):
                engine.backward(_loss(engine(part)))
                engine.step()
        weights = gathered_state(model, keep=rank == 0)
        if rank == 0:
            torch.save(_flat(weights), Path(folder) / f"{stage}.pt")
        engine.destroy()
    if rank == 0:
        torch.save(_plain(ranks, micro), Path(folder) / "plain.pt")
    # Together: gloo's threads in a rank whose peer has left first may end the process with it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _plain(ranks: int, micro: int) -> Tensor:
    """The same in plain PyTorch: bfloat16 forward and backward; float32 sums, master weights and AdamW."""
    from cluster.students.zero import adamw, schedule_of

    spec, model, master = _spec(1, ranks, micro), _network(), _network().float()
    optimizer = adamw(master, spec)
    schedule = schedule_of(spec, STEPS)(optimizer)
    for batch in _batches():
        optimizer.zero_grad()
        for block in batch.chunk(ranks):
            for part in block.split(micro):
                model.zero_grad()
                (_loss(model(part)) / (len(block) // micro)).backward()
                for whole, weight in zip(master.parameters(), model.parameters(), strict=True):
                    share = weight.grad.float() / ranks
                    whole.grad = share if whole.grad is None else whole.grad + share
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for whole, weight in zip(master.parameters(), model.parameters(), strict=True):
                weight.copy_(whole)
    return _flat(dict(model.named_parameters()))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 1), (2, 4), (2, 1)])
def test_gradients_are_summed_in_float32_over_micro_batches_and_ranks(ranks: int, micro: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (ranks, micro, str(tmp_path)), nprocs=ranks)
    expected = torch.load(tmp_path / "plain.pt")
    assert not torch.equal(expected, _flat(dict(_network().named_parameters()))), "nothing was learnt"
    for stage in STAGES:
        assert torch.equal(torch.load(tmp_path / f"{stage}.pt"), expected), f"ZeRO-{stage}"
