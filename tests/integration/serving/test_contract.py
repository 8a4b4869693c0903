"""Every parameter that OpenAI's own client knows, against two arms: honoured, harmless, or refused by name.

``STILLHOUSE_TEST_ENDPOINT=http://127.0.0.1:8000`` has a running endpoint stand for the folder's own.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from serving.ingress.relay import ARM_HEADER

pytestmark = pytest.mark.integration

CHATS, TEXTS = "chat", "completions"
KNOWN = {
    CHATS: {*chat_create_params.CompletionCreateParamsNonStreaming.__annotations__, "stream"},
    TEXTS: {*completion_create_params.CompletionCreateParamsNonStreaming.__annotations__, "stream"},
}


@dataclass(frozen=True)
class Caller:
    """OpenAI's client, with short requests that stay the same but for what a test says."""

    client: openai.OpenAI
    endpoint: str
    arms: tuple[str, ...]

    def ask(self, api: str, **given: Any) -> Any:
        """The answer to a short request."""
        prompt = (
            {"messages": [{"role": "user", "content": "What is a list?"}]} if api == CHATS else {"prompt": "A list"}
        )
        fields = {"model": self.arms[0], "max_tokens": 12, "temperature": 0, **prompt, **given}
        fields = {name: value for name, value in fields.items() if value is not None}
        return self._of(api).create(**fields)

    def arm_of(self, api: str, **given: Any) -> str:
        """The arm that answers a request to the split."""
        raw = self._of(api).with_raw_response.create(
            **{"model": self.endpoint, "max_tokens": 1, **given},
            **({"messages": [{"role": "user", "content": "x"}]} if api == CHATS else {"prompt": "x"}),
        )
        return str(raw.headers[ARM_HEADER])

    def _of(self, api: str) -> Any:
        return self.client.chat.completions if api == CHATS else self.client.completions


def text_of(answer: Any, choice: int = 0) -> str:
    """Of either kind of answer."""
    chosen = answer.choices[choice]
    return str(chosen.message.content if hasattr(chosen, "message") else chosen.text)


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> str:
    given = os.environ.get("STILLHOUSE_TEST_ENDPOINT")
    return given or request.getfixturevalue("endpoint").url


@pytest.fixture(scope="module")
def caller(url: str) -> Iterator[Caller]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        endpoint, *arms = [model.id for model in client.models.list()]
        assert len(arms) == 2
        yield Caller(client, endpoint, tuple(arms))


# ---- what is honoured: each asserts that the parameter does what it says ----


def model(caller: Caller, api: str) -> None:
    texts = [text_of(caller.ask(api, model=arm, max_tokens=24)) for arm in caller.arms]
    assert texts[0] != texts[1]
    with pytest.raises(openai.NotFoundError):
        caller.ask(api, model="none-such")


def messages(caller: Caller, api: str) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a list?"}]
    whole = caller.ask(api)
    assert text_of(caller.ask(api, messages=[{"role": "user", "content": parts}])) == text_of(whole)
    # Long, for a model's template may have something to say to the system where the caller says nothing.
    system = {"role": "system", "content": "Be brief. " * 20}
    longer = caller.ask(api, messages=[system, {"role": "user", "content": parts}])
    assert longer.usage.prompt_tokens > whole.usage.prompt_tokens


def prompt(caller: Caller, api: str) -> None:
    assert text_of(caller.ask(api, prompt="A list")) == text_of(caller.ask(api, prompt=["A list"]))
    assert caller.ask(api, prompt=[65, 66, 67]).usage.prompt_tokens == 3


def limit(name: str) -> Callable[[Caller, str], None]:
    def check(caller: Caller, api: str) -> None:
        answer = caller.ask(api, **{"max_tokens": None, name: 3})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")

    return check


def temperature(caller: Caller, api: str) -> None:
    assert text_of(caller.ask(api, temperature=0)) == text_of(caller.ask(api, temperature=0))
    assert len({text_of(caller.ask(api, temperature=2)) for _ in range(4)}) > 1


def top_p(caller: Caller, api: str) -> None:
    assert text_of(caller.ask(api, temperature=1, top_p=1e-9)) == text_of(caller.ask(api, temperature=0))


def seed(caller: Caller, api: str) -> None:
    drawn = [text_of(caller.ask(api, temperature=1.5, seed=number)) for number in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]


def n(caller: Caller, api: str) -> None:
    answer = caller.ask(api, n=3, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({text_of(answer, index) for index in range(3)}) > 1


def stop(caller: Caller, api: str) -> None:
    whole = text_of(caller.ask(api))
    end = whole[len(whole) // 2 :][:3]
    for value in (end, ["never said, ever", end]):
        answer = caller.ask(api, stop=value)
        assert (text_of(answer), answer.choices[0].finish_reason) == (whole[: whole.index(end)], "stop")


def stream(caller: Caller, api: str) -> None:
    pieces = [chunk.choices[0] for chunk in caller.ask(api, stream=True)]
    said = [piece.delta.content or "" if api == CHATS else piece.text for piece in pieces]
    assert "".join(said) == text_of(caller.ask(api))
    assert pieces[-1].finish_reason == caller.ask(api).choices[0].finish_reason


def stream_options(caller: Caller, api: str) -> None:
    *_, last = caller.ask(api, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == caller.ask(api).usage
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        caller.ask(api, stream_options={"include_usage": True})


def logprobs(caller: Caller, api: str) -> None:
    if api == TEXTS:
        shown = caller.ask(api, logprobs=2).choices[0].logprobs
        assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == 12
        assert all(value <= 0 for value in shown.token_logprobs)
    else:
        content = caller.ask(api, logprobs=True).choices[0].logprobs.content
        assert len(content) == 12
        assert all(token.logprob <= 0 and token.top_logprobs == [] for token in content)
    assert caller.ask(api).choices[0].logprobs is None


def top_logprobs(caller: Caller, api: str) -> None:
    content = caller.ask(api, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for token in content:
        # Drawn at temperature 0: the token that was taken is the first of those that were likely.
        assert [each.logprob for each in token.top_logprobs] == sorted(
            (each.logprob for each in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].logprob == token.logprob
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        caller.ask(api, top_logprobs=3)


def who(name: str) -> Callable[[Caller, str], None]:
    def check(caller: Caller, api: str) -> None:
        assert len({caller.arm_of(api, **{name: "ada"}) for _ in range(6)}) == 1
        assert {caller.arm_of(api, **{name: f"user {index}"}) for index in range(24)} == set(caller.arms)

    return check


BOTH = {
    "model": model,
    "max_tokens": limit("max_tokens"),
    "temperature": temperature,
    "top_p": top_p,
    "seed": seed,
    "n": n,
    "stop": stop,
    "stream": stream,
    "stream_options": stream_options,
    "logprobs": logprobs,
    "user": who("user"),
}
HONOURED = {
    CHATS: {
        **BOTH,
        "messages": messages,
        "max_completion_tokens": limit("max_completion_tokens"),
        "top_logprobs": top_logprobs,
        "safety_identifier": who("safety_identifier"),
    },
    TEXTS: {**BOTH, "prompt": prompt},
}
# A value that is refused, and one that asks for nothing and is taken; none where every value asks for something.
REFUSED: dict[str, dict[str, tuple[Any, Any]]] = {
    CHATS: {
        "audio": ({"voice": "ash", "format": "wav"}, None),
        "frequency_penalty": (0.5, 0),
        "function_call": ("auto", "none"),
        "functions": ([{"name": "f"}], []),
        "logit_bias": ({"50": 5}, {}),
        "modalities": (["text", "audio"], ["text"]),
        "prediction": ({"type": "content", "content": "x"}, None),
        "presence_penalty": (0.5, 0),
        "reasoning_effort": ("high", "none"),
        "response_format": ({"type": "json_object"}, {"type": "text"}),
        "tool_choice": ("auto", "none"),
        "tools": ([{"type": "function", "function": {"name": "f"}}], []),
        "verbosity": ("low", None),
        "web_search_options": ({}, None),
    },
    TEXTS: {
        "best_of": (2, 1),
        "echo": (True, False),
        "frequency_penalty": (0.5, 0),
        "logit_bias": ({"50": 5}, {}),
        "presence_penalty": (0.5, 0),
        "suffix": ("end", ""),
    },
}
# What concerns OpenAI's own house, not the answer: taken, and of no effect, as at any other server.
HARMLESS: dict[str, dict[str, Any]] = {
    CHATS: {
        "metadata": {"a": "b"},
        "moderation": {"model": "omni-moderation-latest"},
        "parallel_tool_calls": True,
        "prompt_cache_key": "key",
        "prompt_cache_options": {},
        "prompt_cache_retention": "24h",
        "service_tier": "auto",
        "store": False,
    },
    TEXTS: {},
}


def cases(table: dict[str, dict[str, Any]]) -> list[Any]:
    """All of a table, one test each."""
    return [pytest.param(api, name, id=f"{api}-{name}") for api, names in table.items() for name in names]


@pytest.mark.parametrize("api", [CHATS, TEXTS])
def test_nothing_that_the_client_knows_is_left_out(api: str) -> None:
    tables: list[Any] = [HONOURED[api], REFUSED[api], HARMLESS[api]]
    assert sorted(name for table in tables for name in table) == sorted(KNOWN[api])


@pytest.mark.parametrize(("api", "name"), cases(HONOURED))
def test_what_is_honoured(caller: Caller, api: str, name: str) -> None:
    HONOURED[api][name](caller, api)


@pytest.mark.parametrize(("api", "name"), cases(REFUSED))
def test_what_is_refused_is_named(caller: Caller, api: str, name: str) -> None:
    refused, neutral = REFUSED[api][name]
    with pytest.raises(openai.BadRequestError) as caught:
        caller.ask(api, **{name: refused})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    if neutral is not None:
        assert text_of(caller.ask(api, **{name: neutral})) == text_of(caller.ask(api))


@pytest.mark.parametrize(("api", "name"), cases(HARMLESS))
def test_what_changes_nothing(caller: Caller, api: str, name: str) -> None:
    assert text_of(caller.ask(api, **{name: HARMLESS[api][name]})) == text_of(caller.ask(api))
