"""What a model says, computed without any code of ours, for the tests to hold an engine's answers against."""

from collections.abc import Sequence

import torch

from serving.engines.base import Delta
from serving.engines.transformers import TransformersEngine


def text_of(deltas: Sequence[Delta]) -> str:
    """The whole answer."""
    return "".join(delta.text for delta in deltas)


def logits(engine: TransformersEngine, ids: list[int]) -> torch.Tensor:
    """[token, V] of a text, without cache, batch or any code of ours."""
    with torch.inference_mode():
        out: torch.Tensor = engine._model.network(torch.tensor([ids])).logits[0]
    return out


def reference(engine: TransformersEngine, prompt: list[int], length: int) -> list[int]:
    """Greedy decoding by hand."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(logits(engine, ids)[-1].argmax()))
        if ids[-1] in engine._model.ends:
            break
    return ids[len(prompt) :]
