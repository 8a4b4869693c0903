"""The state of a student that changes its number of ranks: real DeepSpeed engines in processes of their own."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.heads import OutputHead

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly]
CASES = [(stage, precision) for stage in (1, 2, 3) for precision in ("float32", "bfloat16")]
STEPS = 5
SEQUENCES = 4


def _engine(stage: int, precision: str, ranks: int, universal: bool) -> tuple[Any, Any]:
    """An engine and its model, a small student: its width is odd, so that two ranks share nothing without padding."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    from cluster.spec import StudentSpec
    from cluster.students.module import Student
    from cluster.students.zero import adamw, schedule_of, use_plain_gloo, zero_config

    use_plain_gloo()
    spec = StudentSpec.model_validate(
        {
            "init": {"source": "teacher", "layers": 2},
            "zero_stage": stage,
            "ranks": ranks,
            "precision": precision,
            "lr": 1e-2,
            # Strong, so that a vector that is decayed by mistake is seen.
            "optimizer": {"weight_decay": 1.0},
        }
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=15,
        intermediate_size=26,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=14,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    module = Student(model)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw(module, spec),
        lr_scheduler=schedule_of(spec, 2 * STEPS),
        config=zero_config(spec, SEQUENCES, load_universal=universal),
        dist_init_required=False,
    )
    return engine, model


def _cross_entropy(hidden_TD: Tensor, head: OutputHead[Tensor], next_T: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(head.product(hidden_TD).float(), next_T)


def _steps(engine: Any, first: int, rank: int, ranks: int) -> None:
    from functools import partial

    from cluster.students.module import Inputs

    share = SEQUENCES // ranks
    for step in range(first, first + STEPS):
        tokens = torch.randint(37, (SEQUENCES, 12), generator=torch.Generator().manual_seed(step))
        for row in range(rank * share, (rank + 1) * share):
            inputs = Inputs(tokens[row : row + 1], None, torch.ones(1, 12, dtype=torch.bool))
            engine.backward(engine(inputs, partial(_cross_entropy, next_T=inputs.next_T)))
            engine.step()


def _process(rank: int, ranks: int, port: int, folder: str, before: int) -> None:
    """Take every case up from ``before`` ranks (0: from the start), go on, and save what it came to.

    Writes ``{stage}-{precision}-{ranks}[-from-{before}].pt``, and from the start also a checkpoint half way.
    """
    from cluster.students.elastic import ZERO_FOLDER, load_universal, make_universal
    from cluster.students.zero import gathered_state

    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    for stage, precision in CASES:
        case = f"{stage}-{precision}"
        for lost in (False, True) if before else (False,):
            engine, model = _engine(stage, precision, ranks, universal=bool(before))
            name = f"{case}-{ranks}"
            if before:
                name += f"-from-{before}" + ("-lost" if lost else "")
                aside = Path(folder) / f"{name}-universal"
                if rank == 0:
                    make_universal(Path(folder) / f"{case}-{before}-saved", aside)
                torch.distributed.barrier()
                load_universal(engine, aside)
                if lost:
                    for state in engine.optimizer.optimizer.state.values():
                        for value in state.values():
                            value.zero_()
            else:
                _steps(engine, 0, rank, ranks)
                engine.save_checkpoint(f"{folder}/{name}-saved", tag=ZERO_FOLDER)
            loaded = gathered_state(model, keep=rank == 0)
            _steps(engine, STEPS, rank, ranks)
            state = gathered_state(model, keep=rank == 0)
            if rank == 0:
                rate = engine.get_lr()[0]
                torch.save({"loaded": loaded, "state": state, "rate": rate}, f"{folder}/{name}.pt")
            engine.destroy()
    torch.distributed.destroy_process_group()


def _run(ranks: int, folder: Path, before: int = 0) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (ranks, port, str(folder), before), nprocs=ranks)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every case comes to on one and on two ranks throughout, and with a change half way."""
    folder = tmp_path_factory.mktemp("universal")
    for ranks in (1, 2):
        _run(ranks, folder)
    for ranks in (1, 2):
        _run(ranks, folder, before=3 - ranks)
    return folder


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Mean absolute difference of two states' weights."""
    assert one.keys() == other.keys()
    return float(torch.cat([(one[name].double() - other[name].double()).abs().flatten() for name in one]).mean())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_student_goes_on_where_another_number_of_ranks_stopped(
    saved: Path, stage: int, precision: str, before: int, after: int
) -> None:
    whole = torch.load(saved / f"{stage}-{precision}-{before}.pt")
    changed = torch.load(saved / f"{stage}-{precision}-{after}-from-{before}.pt")
    lost = torch.load(saved / f"{stage}-{precision}-{after}-from-{before}-lost.pt")
    assert all(torch.equal(whole["loaded"][name], weight) for name, weight in changed["loaded"].items())
    assert changed["rate"] == whole["rate"]
    error, control = (_distance(whole["state"], state["state"]) for state in (changed, lost))
    # Only the order of sums differs; a student that had lost its moments, or counted its steps wrongly, would be far.
    assert error < (1e-4 if precision == "float32" else 0.1) * control
