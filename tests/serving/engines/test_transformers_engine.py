"""The engine with a real model: what it generates, alone and in a batch, when it stops, what it survives."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import RunError
from serving.engines.base import Load, Refused, Sampling
from serving.engines.transformers import TransformersEngine
from tests.serving.engines.reading import logits, reference, text_of

GREEDY = Sampling(max_tokens=24, temperature=0)
WORDS = ("hello", "sky", "tree", "stone", "river", "a much longer prompt than the others", "b", "cloud")


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_model, dtype="float32", slots=4)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def prompt(engine: TransformersEngine) -> list[int]:
    """A prompt whose greedy continuation runs on: random weights end some of them at once."""
    for word in WORDS:
        ids = engine.encode(word)
        answer = reference(engine, ids, 24)
        if len(set(answer)) > 8 and len(answer) == 24:
            return ids
    raise AssertionError("no prompt with a long greedy continuation")


@pytest.fixture
def endless(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends a text, so an answer is as long as was asked for."""
    monkeypatch.setattr(engine._model, "ends", frozenset())


def idle(engine: TransformersEngine) -> bool:
    """Whether nobody is left in the engine; waits for the step that is under way."""
    deadline = time.monotonic() + 30
    while engine.load != Load(0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    return engine.load == Load(0, 0)


def test_greedy_is_the_model_s_argmax(engine: TransformersEngine, prompt: list[int], ask: Any) -> None:
    (deltas,) = ask(engine, (prompt, GREEDY))
    whole = engine._tokenizer.decode(prompt + reference(engine, prompt, 24))
    assert engine._tokenizer.decode(prompt) + text_of(deltas) == whole
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].completion_tokens == 24
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_a_batch_says_what_each_says_alone(engine: TransformersEngine, ask: Any) -> None:
    """Twice as many as there are slots, of different lengths, greedy and drawn: some join when others leave."""
    requests = [
        (engine.encode(word), Sampling(max_tokens=8 + 9 * at, temperature=at % 2, top_p=1 - at / 20, seed=at))
        for at, word in enumerate(WORDS)
    ]
    alone = [ask(engine, request)[0] for request in requests]
    assert [text_of(deltas) for deltas in ask(engine, *requests)] == [text_of(deltas) for deltas in alone]
    assert text_of(alone[2]) in engine._tokenizer.decode(
        requests[2][0] + reference(engine, requests[2][0], requests[2][1].max_tokens or 0)
    )
    assert len({text_of(deltas) for deltas in alone}) == len(WORDS)


def test_requests_share_forward_passes(
    engine: TransformersEngine, prompt: list[int], ask: Any, monkeypatch: Any
) -> None:
    rows: list[int] = []
    real = engine._model.step
    monkeypatch.setattr(engine._model, "step", lambda tokens, cache: (rows.append(len(tokens)), real(tokens, cache))[1])
    ask(engine, *[(prompt, GREEDY)] * 4)
    # One token of each comes of its prompt; without sharing it would be 4 * 23 passes of one row.
    assert sum(rows) == 4 * 23
    assert max(rows) == 4
    assert len(rows) < 2 * 23


def test_who_comes_later_joins_those_who_are_generating(
    engine: TransformersEngine, prompt: list[int], endless: None
) -> None:
    async def late() -> list[int]:
        order = []
        async with aclosing(engine.generate(prompt, replace(GREEDY, max_tokens=400))) as long:
            await anext(long)
            async for delta in engine.generate(engine.encode("sky"), replace(GREEDY, max_tokens=4)):
                order.append(delta.completion_tokens)
            assert [request.gone for request in engine._scheduler._running].count(False) == 1  # the first one still is
        return order

    assert asyncio.run(late())[-1] <= 4
    assert idle(engine)


def test_a_long_prompt_holds_the_others_up_for_a_chunk_at_a_time(
    engine: TransformersEngine, prompt: list[int], ask: Any, monkeypatch: Any, endless: None
) -> None:
    """And read in pieces it means the same."""
    passes: list[str] = []
    step, prefill = engine._model.step, engine._model.prefill
    long = (engine.encode("abcdefgh" * 25), GREEDY)
    whole = ask(engine, long)[0]
    monkeypatch.setattr(engine._model, "chunk", 16)
    monkeypatch.setattr(engine._model, "step", lambda *given: (passes.append("step"), step(*given))[1])
    monkeypatch.setattr(engine._model, "prefill", lambda *given: (passes.append("read"), prefill(*given))[1])

    async def both() -> str:
        async with aclosing(engine.generate(prompt, replace(GREEDY, max_tokens=300))) as running:
            await anext(running)
            passes.clear()
            return text_of([delta async for delta in engine.generate(*long)])

    assert asyncio.run(both()) == text_of(whole)
    reads = [at for at, kind in enumerate(passes) if kind == "read"]
    assert len(reads) == 13  # 200 tokens, 16 at a time
    assert all(passes[at + 1] == "step" for at in reads)


def test_the_end_token_ends_the_text_and_is_counted(
    engine: TransformersEngine, prompt: list[int], ask: Any, monkeypatch: Any
) -> None:
    tokens = reference(engine, prompt, 24)
    at = next(i for i in range(4, 24) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(engine._model, "ends", frozenset([tokens[at]]))
    (deltas,) = ask(engine, (prompt, replace(GREEDY, logprobs=0)))
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == ("stop", at + 1)
    assert engine._tokenizer.decode(prompt) + text_of(deltas) == engine._tokenizer.decode(prompt + tokens[:at])
    assert [one.token_id for delta in deltas for one in delta.logprobs] == tokens[:at]


def test_a_stop_string_ends_the_text_before_it(engine: TransformersEngine, prompt: list[int], ask: Any) -> None:
    whole = text_of(ask(engine, (prompt, GREEDY))[0])
    stop = whole[5:8]
    (deltas,) = ask(engine, (prompt, replace(GREEDY, stop=(stop,))))
    assert text_of(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].completion_tokens < 24
    assert idle(engine)


def test_without_a_seed_answers_differ(engine: TransformersEngine, ask: Any) -> None:
    answers = ask(engine, *[(engine.encode("hello"), Sampling(max_tokens=20))] * 3)
    assert len({text_of(deltas) for deltas in answers}) > 1


@pytest.mark.parametrize("wish", [{"temperature": 1.0, "top_p": 0.0}, {"temperature": 1e-45}])
def test_sampling_at_its_narrowest_is_greedy(
    engine: TransformersEngine, prompt: list[int], ask: Any, wish: dict[str, Any]
) -> None:
    narrow, greedy = ask(engine, (prompt, replace(GREEDY, **wish)), (prompt, GREEDY))
    assert text_of(narrow) == text_of(greedy)


def test_logprobs_are_the_model_s_own(engine: TransformersEngine, prompt: list[int], ask: Any) -> None:
    """At any temperature: those of softmax(logits), in a batch whose others ask for none or for more."""
    wish = Sampling(max_tokens=12, temperature=1.7, top_p=0.9, seed=3, logprobs=4)
    deltas, *_ = ask(engine, (prompt, wish), (prompt, GREEDY), (prompt, replace(wish, logprobs=20)))
    told = [one for delta in deltas for one in delta.logprobs]
    assert len(told) == 12
    ids = prompt + [one.token_id for one in told]
    expected = torch.log_softmax(logits(engine, ids), -1)[len(prompt) - 1 :]
    for one, logp in zip(told, expected, strict=False):
        assert one.logprob == pytest.approx(float(logp[one.token_id]), abs=1e-4)
        assert [other.token_id for other in one.top] == logp.topk(4).indices.tolist()
        assert [other.logprob for other in one.top] == pytest.approx(logp.topk(4).values.tolist(), abs=1e-4)
        assert one.raw == engine._tokenizer.raw(one.token_id)


def test_closing_the_generator_frees_its_place_within_a_step(
    engine: TransformersEngine, prompt: list[int], monkeypatch: Any, endless: None
) -> None:
    steps = []
    real = engine._model.step
    monkeypatch.setattr(engine._model, "step", lambda *given: (steps.append(1), real(*given))[1])

    async def leave() -> int:
        async with aclosing(engine.generate(prompt, Sampling(max_tokens=480, temperature=0))) as deltas:
            await anext(deltas)
        return len(steps)

    at = asyncio.run(leave())
    assert idle(engine)
    assert len(steps) <= at + 1


def test_a_cancelled_reader_frees_its_place_also_while_it_waits_for_one(
    engine: TransformersEngine, prompt: list[int], endless: None
) -> None:
    async def crowd() -> None:
        async def read() -> None:
            async for _ in engine.generate(prompt, Sampling(max_tokens=450, temperature=0)):
                pass

        tasks = [asyncio.create_task(read()) for _ in range(6)]
        while engine.load != Load(2, 4):
            await asyncio.sleep(0.005)
            assert not any(task.done() for task in tasks)
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(crowd())
    assert idle(engine)


def test_who_is_looked_for_while_it_joins_is_counted_once(
    engine: TransformersEngine, prompt: list[int], ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Load] = []

    class Watched(list[Any]):
        """Somebody looks just when a request comes in among those running."""

        def append(self, request: Any) -> None:
            super().append(request)
            look = threading.Thread(target=lambda: seen.append(engine.load))
            look.start()
            look.join(timeout=0.2)

    monkeypatch.setattr(engine._scheduler, "_running", Watched())
    ask(engine, (prompt, GREEDY))
    assert idle(engine)
    assert seen == [Load(0, 1)]


def test_memory_is_bounded_and_who_does_not_fit_waits(tiny_model: Path, ask: Any) -> None:
    """Room for 512 tokens in all, four requests that come to 250 each: the youngest are put out and read again."""
    small = TransformersEngine(tiny_model, dtype="float32", slots=4, kv_tokens=512)
    most: list[int] = []
    reserve = small._scheduler._rows._reserve

    def watched(*given: Any) -> None:
        reserve(*given)
        rows, width = small._scheduler._rows._shape
        most.append(rows * width)

    small._scheduler._rows._reserve = watched  # type: ignore[method-assign]
    requests = [
        (small.encode(word), Sampling(max_tokens=240, temperature=0.7, seed=at)) for at, word in enumerate("abcd")
    ]
    together = ask(small, *requests)
    assert max(most) <= 512
    alone = [ask(small, request)[0] for request in requests]
    assert [text_of(deltas) for deltas in together] == [text_of(deltas) for deltas in alone]
    assert max(deltas[-1].completion_tokens for deltas in alone) > 128  # so that they did not fit together
    asyncio.run(small.close())


def test_a_context_that_memory_cannot_hold_is_cut(tiny_model: Path) -> None:
    small = TransformersEngine(tiny_model, dtype="float32", kv_tokens=100)
    assert small.context == 100
    asyncio.run(small.close())


def test_an_error_in_a_step_fails_those_in_it_and_nobody_after(
    engine: TransformersEngine, prompt: list[int], ask: Any, monkeypatch: Any
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("device lost")

    before = text_of(ask(engine, (prompt, GREEDY))[0])
    for part in ("step", "prefill"):
        with monkeypatch.context() as patch:
            patch.setattr(engine._model, part, broken)
            with pytest.raises(RuntimeError, match="device lost"):
                ask(engine, (prompt, GREEDY), (prompt, GREEDY))
            assert idle(engine)
        assert text_of(ask(engine, (prompt, GREEDY))[0]) == before


def test_numbers_that_are_not_finite_fail_their_request_only(
    engine: TransformersEngine, prompt: list[int], ask: Any, monkeypatch: Any
) -> None:
    before = text_of(ask(engine, (prompt, GREEDY))[0])
    real = engine._model.step

    def overflows(tokens: Any, rows: Any) -> torch.Tensor:
        logits_BV = real(tokens, rows)
        if len(tokens) == 2:
            logits_BV[1] = float("nan")
            rows._keys[0][1] = float("nan")
        return logits_BV

    async def one(errors: list[Exception]) -> str:
        try:
            return text_of([delta async for delta in engine.generate(prompt, GREEDY)])
        except RunError as error:
            errors.append(error)
            return ""

    async def both() -> tuple[list[str], list[Exception]]:
        errors: list[Exception] = []
        return list(await asyncio.gather(one(errors), one(errors))), errors

    monkeypatch.setattr(engine._model, "step", overflows)
    texts, errors = asyncio.run(both())
    assert sorted(texts) == ["", before]
    assert len(errors) == 1 and "not finite" in str(errors[0])
    # What it left behind harms nobody who gets its row.
    monkeypatch.setattr(engine._model, "step", real)
    assert [text_of(deltas) for deltas in ask(engine, *[(prompt, GREEDY)] * 3)] == [before] * 3


def test_a_defect_of_the_scheduler_is_told_to_everybody(tiny_model: Path, ask: Any, monkeypatch: Any) -> None:
    engine = TransformersEngine(tiny_model, dtype="float32")
    monkeypatch.setattr(engine._scheduler, "_let_go", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(engine, (engine.encode("a"), GREEDY))
    with pytest.raises(RunError, match="runs no more"):
        ask(engine, (engine.encode("a"), GREEDY))
    asyncio.run(engine.close())


def test_closing_fails_who_is_in_it_and_takes_nobody_more(tiny_model: Path, ask: Any, monkeypatch: Any) -> None:
    engine = TransformersEngine(tiny_model, dtype="float32")

    async def closing() -> None:
        monkeypatch.setattr(engine._model, "ends", frozenset())
        deltas = engine.generate(engine.encode("hello"), Sampling(max_tokens=480, temperature=0))
        await anext(deltas)
        await engine.close()
        with pytest.raises(RunError, match="engine was closed"):
            async for _ in deltas:
                pass

    asyncio.run(closing())
    assert not engine._scheduler._thread.is_alive()
    with pytest.raises(RunError, match="engine was closed"):
        ask(engine, (engine.encode("a"), GREEDY))


def test_a_score_is_the_log_softmax(engine: TransformersEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr("serving.engines.model._SCORE_CHUNK", 7)
    ids = engine.encode("the quick brown fox")
    ids_TK = np.random.default_rng(0).integers(0, 260, (len(ids), 5))
    expected = torch.log_softmax(logits(engine, ids), -1).gather(1, torch.from_numpy(ids_TK)).numpy()
    scores = engine.score(ids, ids_TK)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "ids", "message"),
    [
        ([1, 2], np.zeros((1, 3), int), "shape"),
        ([1] * 513, np.zeros((513, 1), int), "context of 512"),
        ([1, 260], np.zeros((2, 1), int), "260 is outside"),
        ([1, 2], np.full((2, 1), -1), "-1 is outside"),
    ],
)
def test_what_cannot_be_scored(engine: TransformersEngine, tokens: list[int], ids: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.score(tokens, ids)


def test_a_chat_goes_through_the_template(engine: TransformersEngine) -> None:
    ids = engine.encode_chat([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
    assert engine._tokenizer._inner.decode(ids) == "<|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    # Special tokens are one token each, so the template was not taken for plain text.
    assert len(ids) == len("behi") + 5


def test_what_the_model_cannot_take_is_refused(engine: TransformersEngine, prompt: list[int], monkeypatch: Any) -> None:
    with pytest.raises(Refused, match="the system speaks first"):
        engine.encode_chat([{"role": "user", "content": "hi"}, {"role": "system", "content": "be"}])
    with pytest.raises(Refused, match="Token id 260 is outside this model's 0 to 259"):
        engine.check_tokens([0, 259, 260])
    engine.check_tokens([0, 259])
    with pytest.raises(Refused, match="prompt is empty"):
        engine.encode("")
    monkeypatch.setattr(engine._tokenizer._inner, "chat_template", None)
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
