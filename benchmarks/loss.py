"""What a distillation loss costs next to plain cross-entropy: time and memory, all in one run.

Every fused loss goes through the same chunked head as the plain cross-entropy that it is divided by; the naive
formula on full logits is the third column. ``python benchmarks/loss.py`` (with ``--tokens 1024`` on a small machine).
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from common import arguments, device, hardware, seconds_in_turn, write
from torch import Tensor

from cluster.heads import OutputHead
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import (
    BucketTargets,
    FullTargets,
    HiddenTargets,
    SampledTargets,
    Soft,
    Targets,
    Tile,
    TileTargets,
)

LOSSES = ("cross-entropy", "topk", "sampled", "hidden", "naive")


@dataclass(frozen=True)
class NoTargets(TileTargets):
    """No teacher at all: what is left of the fused loss is plain cross-entropy."""

    def soft(self, tile: Tile, objective: Objective, hard: float | None) -> Soft:
        """Nothing but the cross-entropy's own share of the gradient."""
        nothing_C = tile.log_norm_C.new_zeros(len(tile.log_norm_C))
        return Soft(nothing_C, nothing_C, None if hard is None else tile.q_CV)


@dataclass(frozen=True)
class Size:
    """Shape of the case."""

    tokens: int
    vocabulary: int
    width: int
    dtype: torch.dtype


def targets(name: str, size: Size, on: torch.device) -> Targets:
    """Random labels of a kind in the sizes that real ones have: K = 64, and about 20 ids of N = 50 draws."""
    tokens, vocabulary = size.tokens, size.vocabulary
    next_T = torch.randint(vocabulary, (tokens,), device=on)
    if name == "topk":
        ids_TK = (torch.randint(vocabulary, (tokens, 1), device=on) + 131 * torch.arange(64, device=on)) % vocabulary
        masses = torch.rand(tokens, 65, device=on)
        logs = (masses / masses.sum(-1, keepdim=True)).log()
        return BucketTargets(next_T, ids_TK, logs[:, :64].contiguous(), logs[:, 64].contiguous())
    if name == "sampled":
        shares = torch.rand(tokens, 20, device=on)
        ids_TK = torch.randint(vocabulary, (tokens, 20), device=on)
        return SampledTargets(next_T, ids_TK, shares / shares.sum(-1, keepdim=True), torch.ones(tokens, device=on))
    if name == "hidden":
        hidden = torch.randn(tokens, size.width, device=on, dtype=size.dtype)
        return HiddenTargets(
            next_T, hidden, OutputHead(torch.randn(vocabulary, size.width, device=on, dtype=size.dtype) * 0.05)
        )
    return NoTargets(next_T)


def naive(hidden_TD: Tensor, weight_VD: Tensor, target: FullTargets, objective: Objective) -> Tensor:
    """The formula as one would write it first: all logits of both sides, autograd does the rest."""
    log_q_TV = (hidden_TD @ weight_VD.T).float().log_softmax(-1)
    log_p_TV = target.logits_TV.float().log_softmax(-1)
    hard = -log_q_TV.gather(1, target.next_T[:, None]).sum()
    return objective.hard * hard + objective.soft * (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum()


class Case:
    """Hidden states and a head, and one step of any loss on them: forward, and backward to both."""

    def __init__(self, size: Size, on: torch.device) -> None:
        self.size, self.on = size, on
        hidden_TD = torch.randn(size.tokens, size.width, device=on, dtype=size.dtype)
        weight_VD = torch.randn(size.vocabulary, size.width, device=on, dtype=size.dtype) * 0.05
        self.hidden_TD, self.weight_VD = hidden_TD.requires_grad_(), weight_VD.requires_grad_()

    def step(self, name: str) -> Callable[[], None]:
        """One step of a loss."""
        # The same weights for all: with cross-entropy alone they only scale it.
        objective = Objective(hard=1.0, soft=0.0) if name == "cross-entropy" else Objective(hard=0.1, soft=0.9)
        target = targets("hidden" if name == "naive" else name, self.size, self.on)

        def step() -> None:
            if isinstance(target, HiddenTargets) and name == "naive":
                loss = naive(self.hidden_TD, self.weight_VD, target.chunk(slice(None)), objective)
            else:
                options = {"vocabulary": self.size.vocabulary}
                loss, _ = distillation_loss(self.hidden_TD, OutputHead(self.weight_VD), target, objective, **options)
            loss.backward()
            self.hidden_TD.grad = self.weight_VD.grad = None

        return step


def peak_above_now(step: Callable[[], None], on: torch.device) -> int:
    """Bytes that a step adds, at its peak, to what the process holds before it."""
    gc.collect()
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = _status("VmHWM")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def memory(case: Case, name: str, arguments: list[str]) -> int:
    """Bytes that one step adds at its peak to what its inputs take; on a CPU measured in a process of its own."""
    if case.on.type == "cuda":
        return peak_above_now(case.step(name), case.on)
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", name, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def in_turn(case: Case, rounds: int, options: list[str]) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of each loss."""
    seconds = seconds_in_turn({name: case.step(name) for name in LOSSES}, rounds)
    return {name: (took, memory(case, name, options)) for name, took in seconds.items()}


def main() -> None:
    """Measure all losses in turn, several times, and print ratios."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--small", action="store_true", help="a vocabulary of 32,064 and 1,024 wide")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2, help="times that each loss is timed")
    parser.add_argument("--memory-of", choices=LOSSES, help="only this loss' memory")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    shape = (given.tokens, *((32_064, 1024) if given.small else (128_256, 2048)))
    size, on = Size(*shape, getattr(torch, given.dtype)), device()
    if given.memory_of:
        print(peak_above_now(Case(size, on).step(given.memory_of), on))
        return
    options = ["--tokens", str(given.tokens), "--dtype", given.dtype, "--threads", str(given.threads)]
    options += ["--small"] if given.small else []
    figures: dict[str, Any] = {"size": {"tokens": shape[0], "vocabulary": shape[1], "width": shape[2]}}
    print(f"{shape[0]} tokens, vocabulary {shape[1]}, width {shape[2]}, {given.dtype}; {hardware()}")
    rows = in_turn(Case(size, on), given.rounds, options)
    plain_s, plain_bytes = rows["cross-entropy"]
    print(f"{'':16} {'seconds':>8} {'/ plain CE':>10} {'/ naive':>8} {'peak MB':>8} {'/ plain CE':>10} {'/ naive':>8}")
    for name, (took, held) in rows.items():
        figures[name] = {
            "seconds": took,
            "time_ratio": took / plain_s,
            "bytes": held,
            "memory_ratio": held / plain_bytes,
        }
        print(
            f"{name:16} {took:8.3f} {took / plain_s:10.3f} {took / rows['naive'][0]:8.3f} {held / 1e6:8.0f} "
            f"{held / plain_bytes:10.3f} {held / rows['naive'][1]:8.3f}"
        )
    write(given.out, "loss", figures)


if __name__ == "__main__":
    main()
