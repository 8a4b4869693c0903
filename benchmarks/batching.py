"""What continuous batching gives: tokens/s of several clients at once over the same requests one at a time.

Both on one engine in one process, in turn; the figure is the ratio of each round. Without ``--model`` the model has
random weights, for speed does not depend on what they say, and the demo student's shape (88M parameters, 49k
vocabulary), or with ``--shape 1b``, for a GPU, that of Llama 3.2 1B.
The text is greedy and ends at its length only.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from common import arguments, device, hardware, turns, write

from serving.engines import ENGINES, open_engine
from serving.engines.base import Engine, Sampling

# Vocabulary, width, inner width, layers, heads, key-value heads.
SHAPES = {"demo": (49_152, 576, 1536, 17, 9, 3), "1b": (128_256, 2048, 8192, 16, 32, 8)}


def main() -> None:
    """Measure, print one figure."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.set_defaults(threads=2)
    parser.add_argument("--engine", choices=list(ENGINES), default="transformers")
    parser.add_argument("--model", type=Path, help="a model directory; default: random weights")
    parser.add_argument("--shape", choices=SHAPES, default="demo", help="of the random model")
    parser.add_argument("--layers", type=int, help="of the random model, instead of its shape's; 9 of the demo are 60M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(hardware())
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or random_model(Path(directory), options.shape, options.layers)
        engine = open_engine(options.engine, model, options.dtype, options.threads, options.clients)
        report(engine, options)


def report(engine: Engine, options: argparse.Namespace) -> None:
    """Measure and print."""
    prompts = [[(7 + 31 * client + at) % 251 for at in range(options.prompt)] for client in range(options.clients)]
    made = {"one at a time": 0, "together": 0}

    async def alone() -> None:
        made["one at a time"] = sum([await _tokens(engine, prompt, options.tokens) for prompt in prompts])

    async def together() -> None:
        made["together"] = sum(await asyncio.gather(*(_tokens(engine, prompt, options.tokens) for prompt in prompts)))

    works = {"one at a time": lambda: asyncio.run(alone()), "together": lambda: asyncio.run(together())}
    seconds = turns(works, options.rounds)
    ratios = [
        (made["together"] / fast) / (made["one at a time"] / slow)
        for slow, fast in zip(seconds["one at a time"], seconds["together"], strict=True)
    ]
    rates = {name: [made[name] / each for each in took] for name, took in seconds.items()}
    for name, each in rates.items():
        print(f"{name:14s} {statistics.median(each):8.1f} tokens/s  ({min(each):.1f} to {max(each):.1f})")
    print(
        f"{options.clients} clients at once ÷ one at a time: {statistics.median(ratios):.2f} "
        f"(rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )
    asyncio.run(engine.close())
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    write(options.out, "batching", {"tokens_per_s": rates, "ratios": ratios, "settings": settings})


async def _tokens(engine: Engine, prompt: Sequence[int], length: int) -> int:
    """Run one request to its end; how many tokens it got."""
    got = 0
    async for delta in engine.generate(prompt, Sampling(max_tokens=length, temperature=0)):
        got = delta.completion_tokens
    return got


def random_model(directory: Path, shape: str, layers: int | None) -> Path:
    """A Llama of a shape with random weights, with a byte-level tokenizer whose other tokens are made up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary, width, inner, all_layers, heads, kv_heads = SHAPES[shape]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{at}" for at in range(vocabulary - len(alphabet))]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(alphabet + words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with device():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
