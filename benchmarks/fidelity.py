"""How far each label kind's gradient lies from the exact one, against what it weighs on the wire.

A student of 24 of the demo teacher's 30 layers is trained a little (to KL about 0.9), then the gradient of all its
parameters is taken over 8,192 tokens with every kind, and held against the dense one: angle and ratio of the norms,
dot products in float64. Beside it the angle that a training run logs: of the head's gradient on 128 tokens. Bytes are
those of real encoded blocks. ``python benchmarks/fidelity.py``.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from common import TEACHER, arguments, device, hardware, packed_text, write
from torch import Tensor

from cluster.heads import head_of
from cluster.labels.kinds import Labels, TopK
from cluster.labels.make import make_labels
from cluster.labels.wire import Stamp, encode
from cluster.loading import load_model
from cluster.spec import DenseLabels, LabelsSpec, SampledLabels, TeacherLayers, TopKLabels
from cluster.students.angle import angle_sums
from cluster.students.initial import initial_student
from cluster.students.losses.from_labels import targets_of
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import Targets

LENGTH, SEQUENCES = 256, 32
SOFT = Objective(hard=0.0, soft=1.0)
STAMP = Stamp("00" * 8, "00" * 8, "00" * 8, "00" * 16)


def kinds() -> dict[str, LabelsSpec]:
    """The kinds that are measured, by the name they have in the table."""
    named: dict[str, LabelsSpec] = {f"top-{k}": TopKLabels(k=k) for k in (12, 64, 256)}
    for draws in (12, 24, 40, 50, 96):
        named[f"sampled N={draws}"] = SampledLabels(kind="sampled", draws=draws)
    return {"dense": DenseLabels(kind="dense"), **named}


def mask_of(tokens_BS: Tensor) -> np.ndarray:
    """All positions but the last of each sequence."""
    mask = np.ones(tuple(tokens_BS.shape), dtype=np.bool_)
    mask[:, -1] = False
    return mask


def renormalised(labels: TopK) -> Labels:
    """Top-k labels as many systems keep them: the tail dropped and the rest scaled up to 1."""
    return TopK(
        labels.loss_mask_BS,
        labels.vocabulary,
        1.0,
        labels.ids_TK,
        labels.codes_TK,
        np.full_like(labels.log_tail_T, -80.0),
    )


@dataclass
class Measured:
    """What one pass over the sequences gives, by kind.

    Attributes:
        gradients: of all parameters.
        nbytes: per loss token; not for labels that are never sent.
        logged: degrees as a run logs them.
        kl: the student's, in nats.
    """

    gradients: dict[str, list[Tensor]]
    nbytes: dict[str, float]
    logged: dict[str, float]
    kl: float


class Bench:
    """Teacher and student on one device, and the labels between them."""

    def __init__(self) -> None:
        self.on = device()
        self.teacher = load_model(TEACHER, dtype=torch.float32).to(self.on)
        init = TeacherLayers(source="teacher", layers=24)
        where: dict[str, Any] = {"teacher_dir": str(TEACHER), "student_dir": None, "dtype": torch.float32}
        self.student = initial_student(init, **where).to(self.on)
        self.vocabulary = self.teacher.config.vocab_size

    @torch.no_grad()
    def labels(self, spec: LabelsSpec, hidden_BSD: Tensor, tokens_BS: Tensor, address: str) -> Labels:
        """Labels of some sequences from the teacher's hidden states."""
        options: dict[str, Any] = {"vocabulary": self.vocabulary, "address": address, "chunk": 128}
        made = make_labels(spec, hidden_BSD, mask_of(tokens_BS), head_of(self.teacher).logits, **options)
        assert made is not None
        return made

    @torch.no_grad()
    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """The teacher's last hidden states."""
        return self.teacher.model(tokens_BS.to(self.on)).last_hidden_state

    def target(self, labels: Labels, tokens_BS: Tensor) -> Targets:
        """Labels as the loss takes them."""
        return targets_of(labels, tokens_BS[:, 1:].reshape(-1).to(self.on), None)

    def loss(self, labels: Labels, hidden_TD: Tensor, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The fused soft loss of a student's hidden states, and its sums."""
        target = self.target(labels, tokens_BS)
        return distillation_loss(hidden_TD, head_of(self.student), target, SOFT, vocabulary=self.vocabulary)

    def student_hidden(self, tokens_BS: Tensor) -> Tensor:
        """The student's hidden states at the loss tokens."""
        return self.student.model(tokens_BS.to(self.on)).last_hidden_state[:, :-1].flatten(0, 1)

    def train(self, tokens_NS: Tensor, steps: int, batch: int = 4) -> None:
        """Part of a training run on top-64 labels: a linear fall from 3e-4."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(steps):
            tokens_BS = tokens_NS[step * batch : (step + 1) * batch]
            labels = self.labels(TopKLabels(k=64), self.hidden(tokens_BS), tokens_BS, "0" * 32)
            hidden_TD = self.student_hidden(tokens_BS)
            loss, sums = self.loss(labels, hidden_TD, tokens_BS)
            (loss / len(hidden_TD)).backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
            print(f"\rtraining: step {step + 1}/{steps}, KL {float(sums[1]) / len(hidden_TD):.2f}", end="", flush=True)
        print()

    def gradients(self, tokens_NS: Tensor) -> Measured:
        """The gradient of all parameters per kind, and what else is measured on the way."""
        parameters = list(self.student.parameters())
        sums: dict[str, list[Tensor]] = {}
        size: dict[str, int] = {}
        kl = 0.0
        for number, tokens_BS in enumerate(tokens_NS.split(4)):
            teacher_BSD = self.hidden(tokens_BS)
            made = {name: self.labels(spec, teacher_BSD, tokens_BS, f"{number:032x}") for name, spec in kinds().items()}
            for name, labels in made.items():
                size[name] = size.get(name, 0) + encode(labels, STAMP).nbytes
            for k in (12, 64):
                whole = made[f"top-{k}"]
                assert isinstance(whole, TopK)
                made[f"top-{k} renormalised"] = renormalised(whole)
            hidden_TD = self.student_hidden(tokens_BS)
            for name, labels in made.items():
                loss, parts = self.loss(labels, hidden_TD, tokens_BS)
                kl += float(parts[1]) if name == "dense" else 0.0
                found = torch.autograd.grad(loss, parameters, retain_graph=True)
                mine = sums.setdefault(name, [torch.zeros_like(p) for p in parameters])
                torch._foreach_add_(mine, list(found))
            print(f"\rgradients: {4 * (number + 1)}/{len(tokens_NS)} sequences", end="", flush=True)
        print()
        tokens = len(tokens_NS) * (LENGTH - 1)
        logged = {name: self.angle_logged(each, made["dense"], hidden_TD, tokens_BS) for name, each in made.items()}
        return Measured(sums, {name: nbytes / tokens for name, nbytes in size.items()}, logged, kl / tokens)

    @torch.no_grad()
    def angle_logged(self, labels: Labels, dense: Labels, hidden_TD: Tensor, tokens_BS: Tensor) -> float:
        """Degrees between the head's gradient and the exact one on few tokens, as a run logs it."""
        target, exact = self.target(labels, tokens_BS), self.target(dense, tokens_BS)
        options = {"target": target, "exact": exact, "objective": SOFT, "vocabulary": self.vocabulary}
        dot, own, whole = angle_sums(hidden_TD, head_of(self.student), **options).tolist()
        return math.degrees(math.acos(min(1.0, dot / math.sqrt(own * whole))))


def against(own: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Angle in degrees between two gradients, and the ratio of their norms; in float64."""

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    norms = math.sqrt(dot(own, own)), math.sqrt(dot(exact, exact))
    return math.degrees(math.acos(min(1.0, dot(own, exact) / (norms[0] * norms[1])))), norms[0] / norms[1]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Angle against bytes per token, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for family, mark in (("sampled", "o-"), ("top-", "s-")):
        own = [r for r in rows if r["kind"].startswith(family) and r["bytes"] and r["degrees"] > 0]
        axes.plot([r["bytes"] for r in own], [r["degrees"] for r in own], mark, label=family.rstrip("-"))
        for row in own:
            axes.annotate(
                row["kind"], (row["bytes"], row["degrees"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    axes.set(xscale="log", yscale="log", xlabel="bytes per token", ylabel="degrees from the dense gradient")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=150)


def main() -> None:
    """Train, measure, print one table and draw one plot."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="draw angle against bytes per token into this file")
    parser.add_argument("--steps", type=int, default=12, help="training steps of 1,024 tokens before measuring")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help=f"sequences of {LENGTH} tokens measured")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    bench = Bench()
    bench.train(packed_text(4 * given.steps, LENGTH, skip=given.sequences), given.steps)
    found = bench.gradients(packed_text(given.sequences, LENGTH))
    rows = []
    print(f"student's KL {found.kl:.2f}, {given.sequences * LENGTH} tokens; {hardware()}")
    print(f"{'labels':22} {'bytes/token':>11} {'degrees':>8} {'norm ratio':>10} {'degrees as logged':>18}")
    for name, own in found.gradients.items():
        degrees, ratio = against(own, found.gradients["dense"])
        nbytes, logged = found.nbytes.get(name), found.logged[name]
        rows.append({"kind": name, "bytes": nbytes, "degrees": degrees, "norm_ratio": ratio, "logged": logged})
        shown = "" if nbytes is None else f"{nbytes:.1f}"
        print(f"{name:22} {shown:>11} {degrees:8.2f} {ratio:10.4f} {logged:18.2f}")
    if given.plot:
        plot(rows, given.plot)
    write(given.out, "fidelity", {"student_kl": found.kl, "rows": rows})


if __name__ == "__main__":
    main()
