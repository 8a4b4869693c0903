"""What labels cost the teacher: scoring with each kind next to the bare forward pass of the same model.

The bare pass has no head and makes no labels. A pass with the head's matrix product and no labels is timed too,
so the table says both what the whole scorer reaches and what is left once the head, which no label can do without, is
taken off.
``python benchmarks/teacher.py`` measures the demo teacher; ``--shape 8b`` or ``70b``, on a GPU, a Llama of that shape
with random weights, and the share of the card's measured bfloat16 matrix rate that the whole scorer uses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import numpy.typing as npt
import torch
from common import TEACHER, arguments, device, hardware, packed_text, seconds_in_turn, turns, write
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from cluster.heads import head_of
from cluster.labels.make import make_labels
from cluster.labels.wire import Stamp, encode
from cluster.loading import load_model
from cluster.memory import keep_memory
from cluster.prefill import backbone_of, last_hidden
from cluster.spec import HiddenLabels, LabelsSpec, SampledLabels, TopKLabels

STAMP = Stamp("00" * 8, "00" * 8, "00" * 8, "00" * 16)
KINDS: dict[str, LabelsSpec] = {
    "topk K=64": TopKLabels(),
    "sampled N=24": SampledLabels(kind="sampled", draws=24),
    "sampled N=50": SampledLabels(kind="sampled"),
    "hidden": HiddenLabels(kind="hidden"),
}
# Llama 3's configurations: width, inner width, layers, heads, key-value heads.
SHAPES = {"8b": (4096, 14336, 32, 32, 8), "70b": (8192, 28672, 80, 64, 8)}


def load(shape: str | None, dtype: torch.dtype, on: torch.device) -> Any:
    """The demo teacher, or a Llama of some shape whose weights are random."""
    if shape is None:
        return load_model(TEACHER, dtype=dtype).to(on)
    width, inner, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device(on):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Scorer:
    """A teacher, some sequences for it, and the parts of scoring them as calls."""

    def __init__(self, model: Any, tokens_BS: Tensor, chunk: int) -> None:
        self.model, self.tokens_BS, self.chunk = model, tokens_BS, chunk
        self.vocabulary = model.config.vocab_size
        self.mask_BS = np.ones(tuple(tokens_BS.shape), dtype=np.bool_)
        self.mask_BS[:, -1] = False

    def hidden(self) -> Tensor:
        """The bare forward pass."""
        return last_hidden(backbone_of(self.model), self.tokens_BS, None)

    def logits(self) -> None:
        """The forward pass with the head's matrix product over the tokens that carry loss."""
        head, hidden_BSD = self.model.get_output_embeddings(), self.hidden()
        hidden_TD = hidden_BSD[torch.from_numpy(self.mask_BS).to(hidden_BSD.device)]
        for rows in hidden_TD.split(self.chunk):
            head(rows)

    def score(self, spec: LabelsSpec) -> None:
        """All of it: forward pass, head, labels, bytes."""
        options: dict[str, Any] = {"vocabulary": self.vocabulary, "address": "0" * 32, "chunk": self.chunk}
        labels = make_labels(spec, self.hidden(), self.mask_BS, head_of(self.model).logits, **options)
        assert labels is not None
        encode(labels, STAMP)

    @torch.inference_mode()
    def measure(self, rounds: int) -> dict[str, npt.NDArray[np.float64]]:
        """Seconds of the bare pass, of the pass with the head, and of scoring in each kind, in every round."""
        works: dict[str, Any] = {"bare": self.hidden, "logits": self.logits}
        for name, spec in KINDS.items():
            works[name] = lambda spec=spec: self.score(spec)
        return {name: np.array(seconds) for name, seconds in turns(works, rounds).items()}


def flops(model: Any, tokens_BS: Tensor) -> tuple[float, float]:
    """Floating-point operations of the bare pass, every weight that multiplies and attention, and of the head."""
    config, (sequences, length) = model.config, tokens_BS.shape
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - embedding.numel()
    weights -= 0 if head is embedding else head.numel()
    # Queries by keys and weights by values, of which a causal mask needs half.
    attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * length / 2
    return sequences * length * (2 * weights + attention), sequences * length * 2.0 * head.numel()


@torch.inference_mode()
def matrix_rate(on: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product."""
    size = 8192 if on.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=on, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_in_turn({"product": lambda: a @ b}, 10)["product"]


def table(
    rounds: dict[str, npt.NDArray[np.float64]], tokens: int, work: tuple[float, float], peak: float
) -> list[dict[str, Any]]:
    """Print a row per kind, and return them. A ratio is the median of the rounds' own: neighbours in time are alike."""
    bare = rounds.pop("bare")
    head = rounds.pop("logits") - bare
    print(
        f"bare forward pass {tokens / np.median(bare):,.0f} tokens/s; "
        f"the head's product takes {np.median(head / bare):.3f} of its time"
    )
    print(f"{'labels':14} {'tokens/s':>9} {'/ bare':>7} {'/ bare, head taken off':>23} {'of matrix rate':>15}")
    rows = []
    for name, took in rounds.items():
        # Hidden labels need no head.
        without, done = (took, work[0]) if name == "hidden" else (took - head, sum(work))
        speed, ratio, alone = (float(np.median(each)) for each in (tokens / took, bare / took, bare / without))
        used = done / tokens * speed / peak
        rows.append({"kind": name, "tokens_per_s": speed, "ratio": ratio, "ratio_without_head": alone})
        rows[-1]["of_matrix_rate"] = used
        print(f"{name:14} {speed:9,.0f} {ratio:7.3f} {alone:23.3f} {used:15.3f}")
    return rows


def main() -> None:
    """Measure, print one table."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="a Llama of this shape with random weights; wants a GPU")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--chunk", type=int, default=128, help="tokens whose logits exist at a time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_memory()  # as a teacher's shard does
    torch.manual_seed(0)
    on, dtype = device(), getattr(torch, given.dtype)
    model = load(given.shape, dtype, on)
    if given.shape:
        tokens_BS = torch.randint(model.config.vocab_size, (given.sequences, given.length), device=on)
    else:
        tokens_BS = packed_text(given.sequences, given.length).to(on)
    peak, work = matrix_rate(on, dtype), flops(model, tokens_BS)
    size = f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters"
    print(f"{size}, {given.sequences} x {given.length} tokens, {given.dtype}, matrix rate {peak / 1e12:.2f} TFLOP/s")
    print(hardware())
    rows = table(Scorer(model, tokens_BS, given.chunk).measure(given.rounds), tokens_BS.numel(), work, peak)
    write(given.out, "teacher", {"model": size, "matrix_rate": peak, "rows": rows})


if __name__ == "__main__":
    main()
