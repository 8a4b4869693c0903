"""Fidelity of exported models to their teacher on one text file, with transformers alone.

    python benchmarks/frozen_text.py TEACHER TEXT.jsonl MODEL [MODEL ...]

It imports nothing of Stillhouse, so it compares two versions of it by the models that they export. Each document is
read by itself (no packing), in float32, over the whole vocabulary. It prints one JSON line per model: the mean over
tokens of KL(teacher || model) in nats, the share of tokens whose most likely successor agrees, and the perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def measure(teacher: torch.nn.Module, model: torch.nn.Module, documents: list[torch.Tensor]) -> dict[str, float]:
    """KL, agreement and perplexity, averaged over all tokens that have a successor.

    Args:
        documents: token ids of each document, int64 [1, S].
    """
    kl = agree = nll = tokens = 0.0
    with torch.inference_mode():
        for ids_1S in documents:
            teacher_SV = F.log_softmax(teacher(input_ids=ids_1S).logits[0, :-1].float(), dim=-1)
            model_SV = F.log_softmax(model(input_ids=ids_1S).logits[0, :-1].float(), dim=-1)
            kl += float((teacher_SV.exp() * (teacher_SV - model_SV)).sum())
            agree += float((teacher_SV.argmax(-1) == model_SV.argmax(-1)).sum())
            nll -= float(model_SV.gather(1, ids_1S[0, 1:, None]).sum())
            tokens += ids_1S.shape[1] - 1
    return {"kl": kl / tokens, "agreement": agree / tokens, "perplexity": math.exp(nll / tokens), "tokens": tokens}


def main() -> None:
    """Measure each model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("text", type=Path, help="JSON Lines with a `text` field")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=256, help="tokens that are read of each document (256)")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer = AutoTokenizer.from_pretrained(asked.teacher)
    rows = [json.loads(line)["text"] for line in asked.text.read_text(encoding="utf-8").splitlines()]
    pieces = [torch.tensor(tokenizer(row, add_special_tokens=False)["input_ids"]) for row in rows]
    documents = [piece[None, : asked.length] for piece in pieces if len(piece) > 1]
    teacher = AutoModelForCausalLM.from_pretrained(asked.teacher, dtype=torch.float32).eval()
    for folder in asked.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(json.dumps({"model": str(folder), **measure(teacher, model, documents)}), flush=True)


if __name__ == "__main__":
    main()
