"""Which models the transformers engine batches, and that it refuses the others before they take a request."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import UserError
from serving.engines.base import Sampling
from serving.engines.cache import Rows, Step
from serving.engines.transformers import TransformersEngine
from tests.serving.engines.reading import reference

GREEDY = Sampling(max_tokens=24, temperature=0, logprobs=0)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "qwen2"])
def test_other_families_say_in_a_batch_what_they_say_alone(
    tiny_model: Path, tmp_path: Path, ask: Any, family: str
) -> None:
    """Learned positions, windows on all layers and on some, biases; the prompts are longer than the windows."""
    save_model(family, tiny_model, tmp_path)
    engine = TransformersEngine(tmp_path, dtype="float32")
    prompts = [engine.encode("hello, how are you, my dear?"), engine.encode("a" * 40), engine.encode("sky")]
    answers = ask(engine, *[(prompt, GREEDY) for prompt in prompts])
    for prompt, deltas in zip(prompts, answers, strict=True):
        assert [one.token_id for delta in deltas for one in delta.logprobs] == reference(engine, prompt, 24)
    asyncio.run(engine.close())


def test_a_model_without_positions_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_model("bloom", tiny_model, tmp_path)
    with pytest.raises(UserError, match=r"a bloom model is not told at which positions.*use the vllm engine"):
        TransformersEngine(tmp_path, dtype="float32")


def test_a_model_with_layers_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_model("qwen2", tiny_model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["full_attention", "chunked_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has layers of kind chunked_attention"):
        TransformersEngine(tmp_path, dtype="float32")


@pytest.mark.parametrize("fault", ["blind to positions", "blind to rows", "another interface"])
def test_a_model_that_batches_wrongly_is_refused_at_the_start(tiny_model: Path, monkeypatch: Any, fault: str) -> None:
    """The proof finds what no list of architectures would: here the model is right and its batching is not."""
    mask, step = Step.mask, Rows.step

    def shifted(rows: Rows) -> Step:
        cache = step(rows)
        cache.position_B = cache.position_B.flip(0)
        return cache

    if fault == "blind to positions":
        monkeypatch.setattr(Rows, "step", shifted)
    elif fault == "blind to rows":
        monkeypatch.setattr(Step, "mask", lambda *given: mask(*given).roll(5, -1))
    else:
        monkeypatch.setattr(Step, "update", lambda *given: None)
    with pytest.raises(UserError, match=r"cannot batch this model.*use the vllm engine"):
        TransformersEngine(tiny_model, dtype="float32")


def save_model(family: str, tokenizer: Path, directory: Path) -> None:
    """A tiny model of another architecture with the tiny tokenizer; it has no end token."""
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    grouped = {**shape, "num_key_value_heads": 2, "max_position_embeddings": 256}
    none: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.3}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
        "mistral": ("Mistral", {**grouped, "sliding_window": 8}),
        "gemma3": ("Gemma3Text", {**grouped, "sliding_window": 8, "head_dim": 8, "sliding_window_pattern": 2}),
        "qwen2": ("Qwen2", grouped),
        "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    }
    name, given = configs[family]
    model = {"gemma3": "Gemma3ForCausalLM", "gpt2": "GPT2LMHeadModel"}.get(family, f"{name}ForCausalLM")
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(vocab_size=260, **given, **none)
    getattr(transformers, model)(config).save_pretrained(directory)
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            (directory / file.name).write_bytes(file.read_bytes())
    settings = (directory / "tokenizer_config.json").read_text()
    (directory / "tokenizer_config.json").write_text(settings.replace('"eos_token"', '"former_eos_token"'))
