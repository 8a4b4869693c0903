"""The engine with a real model: what it generates, when it stops, that it can be stopped."""

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine import Delta, Refused, Sampling
from serving.transformers_engine import TransformersEngine, _GumbelNoise

GREEDY = Sampling(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(tiny_model, dtype="float32")


def run(engine: TransformersEngine, prompt: list[int], sampling: Sampling) -> list[Delta]:
    return list(engine.generate(prompt, sampling, threading.Event()))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def reference(engine: TransformersEngine, prompt: list[int], length: int) -> list[int]:
    """Greedy decoding by hand, without cache, streamer or generate()."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            ids.append(int(engine._model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in engine._eos:
                break
    return ids[len(prompt) :]


def greedy_prompt(engine: TransformersEngine) -> list[int]:
    """A prompt whose greedy continuation runs on: random weights end some of them at once."""
    for word in ("hello", "sky", "tree", "stone", "river"):
        prompt = engine.encode(word)
        if len(set(reference(engine, prompt, 24))) > 8 and len(reference(engine, prompt, 24)) == 24:
            return prompt
    raise AssertionError("no prompt with a long greedy continuation")


def test_greedy_is_the_model_s_argmax(engine: TransformersEngine) -> None:
    prompt = greedy_prompt(engine)
    deltas = run(engine, prompt, GREEDY)
    whole = engine._decode(prompt + reference(engine, prompt, 24))
    assert engine._decode(prompt) + text_of(deltas) == whole
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].completion_tokens == 24
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_the_end_token_ends_the_text_and_is_counted(engine: TransformersEngine, monkeypatch: Any) -> None:
    prompt = greedy_prompt(engine)
    tokens = reference(engine, prompt, 24)
    at = next(i for i in range(4, 24) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(engine, "_eos", frozenset([tokens[at]]))
    monkeypatch.setattr(engine._model.generation_config, "eos_token_id", [tokens[at]])
    deltas = run(engine, prompt, GREEDY)
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == ("stop", at + 1)
    assert engine._decode(prompt) + text_of(deltas) == engine._decode(prompt + tokens[:at])


def test_a_stop_string_ends_the_text_before_it(engine: TransformersEngine) -> None:
    prompt = greedy_prompt(engine)
    whole = text_of(run(engine, prompt, GREEDY))
    stop = whole[5:8]
    deltas = run(engine, prompt, replace(GREEDY, stop=(stop,)))
    assert text_of(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].completion_tokens < 24


def test_a_seed_means_the_same_text_whoever_else_is_generating(engine: TransformersEngine) -> None:
    prompt = engine.encode("hello")
    sampling = Sampling(max_tokens=40, temperature=1, seed=11)
    alone = text_of(run(engine, prompt, sampling))
    together: dict[int, str] = {}

    def one(seed: int) -> None:
        together[seed] = text_of(run(engine, prompt, replace(sampling, seed=seed)))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in (11, 12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together[11] == alone
    assert len(set(together.values())) == 3


def test_without_a_seed_answers_differ(engine: TransformersEngine) -> None:
    prompt = engine.encode("hello")
    assert len({text_of(run(engine, prompt, Sampling(max_tokens=20))) for _ in range(3)}) > 1


def test_sampling_draws_from_the_softmax() -> None:
    """Gumbel-max: 40,000 draws against the probabilities, within five standard deviations; a -inf never wins."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = 40_000
    noise = _GumbelNoise(torch.Generator().manual_seed(0))
    scores = probabilities.log().repeat(draws, 1)
    drawn = Counter(noise(torch.empty(0), scores).argmax(-1).tolist())
    for token, p in enumerate(probabilities.tolist()):
        assert abs(drawn[token] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("wish", [{"temperature": 1.0, "top_p": 0.0}, {"temperature": 1e-45}])
def test_sampling_at_its_narrowest_is_greedy(engine: TransformersEngine, wish: dict[str, Any]) -> None:
    prompt = greedy_prompt(engine)
    assert text_of(run(engine, prompt, replace(GREEDY, **wish))) == text_of(run(engine, prompt, GREEDY))


def test_a_reader_that_goes_away_ends_the_generation(engine: TransformersEngine) -> None:
    before = threading.active_count()
    gone = threading.Event()
    # Without end tokens a full run is 500 tokens; the check is on tokens, not on the clock.
    deltas = []
    for delta in engine.generate(greedy_prompt(engine), Sampling(max_tokens=480, temperature=0), gone):
        deltas.append(delta)
        gone.set()
    assert all(delta.finish_reason is None for delta in deltas)
    assert deltas[-1].completion_tokens < 200
    assert threading.active_count() == before


def test_closing_the_iterator_ends_the_generation(engine: TransformersEngine) -> None:
    before = threading.active_count()
    deltas = engine.generate(greedy_prompt(engine), Sampling(max_tokens=480, temperature=0), threading.Event())
    next(deltas)
    deltas.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_error_in_the_model_reaches_the_reader(engine: TransformersEngine, monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._model, "forward", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        run(engine, engine.encode("hello"), GREEDY)


def test_a_chat_goes_through_the_template(engine: TransformersEngine) -> None:
    ids = engine.encode_chat([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
    assert engine._tokenizer.decode(ids) == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    # Special tokens are one token each, so the template was not taken for plain text.
    assert len(ids) == len("behi") + 5


def test_what_the_model_cannot_take_is_refused(engine: TransformersEngine, monkeypatch: Any) -> None:
    with pytest.raises(Refused, match="the system speaks first"):
        engine.encode_chat([{"role": "user", "content": "hi"}, {"role": "system", "content": "be"}])
    with pytest.raises(Refused, match="Token id 260 is outside this model's 0 to 259"):
        engine.check_tokens([0, 259, 260])
    engine.check_tokens([0, 259])
    with pytest.raises(Refused, match="prompt is empty"):
        engine.encode("")
    monkeypatch.setattr(engine._tokenizer, "chat_template", None)
    with pytest.raises(Refused, match="no chat template; use /v1/completions"):
        engine.encode_chat([{"role": "user", "content": "hi"}])


def test_only_safetensors_are_read(tiny_model: Path, tmp_path: Path) -> None:
    """A directory with a pickle instead must not load, whatever is in it."""
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        TransformersEngine(tmp_path)
