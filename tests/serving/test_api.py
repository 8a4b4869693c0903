"""OpenAI's wire shapes: what is taken, what is refused and by which name, what is sent."""

import json
from typing import Any

import pytest

from serving.api import ApiError, ChatRequest, CompletionRequest, Reply, Request, parse, sse
from serving.engine import Sampling

COMPLETION = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def read(kind: type[Request], **more: Any) -> Any:
    base = CHAT if kind is ChatRequest else COMPLETION
    return parse(kind, json.dumps({**base, **more}).encode())


def test_openai_s_defaults() -> None:
    assert read(CompletionRequest).sampling() == Sampling(max_tokens=16, temperature=1, top_p=1, stop=(), seed=None)
    assert read(ChatRequest).sampling() == Sampling(max_tokens=None, temperature=1, top_p=1, stop=(), seed=None)


def test_null_is_the_same_as_left_out() -> None:
    nothing = dict.fromkeys(["max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options"])
    refused = dict.fromkeys([*ChatRequest.unsupported, "max_completion_tokens"])
    assert read(ChatRequest, **nothing, **refused).sampling() == read(ChatRequest).sampling()


def test_the_wishes_arrive() -> None:
    sampling = read(ChatRequest, max_tokens=3, temperature=0, top_p=0.5, stop=["a", "b"], seed=7).sampling()
    assert sampling == Sampling(3, 0, 0.5, ("a", "b"), 7)
    assert read(ChatRequest, max_tokens=3, max_completion_tokens=4).sampling().max_tokens == 4
    assert read(CompletionRequest, stop="a").sampling().stop == ("a",)


@pytest.mark.parametrize("prompt", ["text", ["text"], [1, 2, 3], [[1, 2, 3]], ""])
def test_prompts(prompt: Any) -> None:
    inner = prompt[0] if prompt in (["text"], [[1, 2, 3]]) else prompt
    assert read(CompletionRequest, prompt=prompt).prompt == inner


def test_a_message_in_parts_is_joined_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read(ChatRequest, messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "c"}])
    assert [message.for_template() for message in request.messages] == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "c"},
    ]


def test_what_nobody_knows_is_ignored() -> None:
    assert read(ChatRequest, user="me", metadata={"a": "b"}, some_new_thing=3) == read(ChatRequest)


UNSUPPORTED = [
    (CompletionRequest, "n", 2),
    (CompletionRequest, "best_of", 2),
    (CompletionRequest, "echo", True),
    (CompletionRequest, "logprobs", 0),
    (CompletionRequest, "suffix", "end"),
    (CompletionRequest, "logit_bias", {"5": 1}),
    (CompletionRequest, "presence_penalty", 0.1),
    (CompletionRequest, "frequency_penalty", 0.1),
    (ChatRequest, "n", 2),
    (ChatRequest, "logprobs", True),
    (ChatRequest, "top_logprobs", 2),
    (ChatRequest, "tools", [{"type": "function"}]),
    (ChatRequest, "tool_choice", "auto"),
    (ChatRequest, "functions", [{}]),
    (ChatRequest, "response_format", {"type": "json_object"}),
    (ChatRequest, "modalities", ["text", "audio"]),
    (ChatRequest, "reasoning_effort", "high"),
]


@pytest.mark.parametrize(("kind", "name", "value"), UNSUPPORTED)
def test_what_is_known_and_not_honoured_is_refused_by_name(kind: type[Request], name: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"^{name}: not supported") as caught:
        read(kind, **{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CompletionRequest, "n", 1),
        (CompletionRequest, "echo", False),
        (ChatRequest, "presence_penalty", 0.0),
        (ChatRequest, "tools", []),
        (ChatRequest, "logprobs", False),
        (ChatRequest, "response_format", {"type": "text"}),
    ],
)
def test_what_asks_for_nothing_more_is_taken(kind: type[Request], name: str, value: Any) -> None:
    assert read(kind, **{name: value}) == read(kind)


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (CompletionRequest, {"prompt": None}, "prompt"),
        (CompletionRequest, {"prompt": ["a", "b"]}, "prompt"),
        (CompletionRequest, {"prompt": []}, "prompt"),
        (CompletionRequest, {"prompt": [1, True]}, "prompt"),
        (CompletionRequest, {"model": ""}, "model"),
        (CompletionRequest, {"max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {"max_tokens": "7"}, "max_tokens"),
        (CompletionRequest, {"max_tokens": 1.5}, "max_tokens"),
        (CompletionRequest, {"temperature": 2.1}, "temperature"),
        (CompletionRequest, {"temperature": float("nan")}, "temperature"),
        (CompletionRequest, {"top_p": -0.1}, "top_p"),
        (CompletionRequest, {"stop": ["a", ""]}, "stop"),
        (CompletionRequest, {"stop": list("abcde")}, "stop"),
        (CompletionRequest, {"seed": 2**63}, "seed"),
        (CompletionRequest, {"stream": "yes"}, "stream"),
        (CompletionRequest, {"stream_options": {"include_usage": True}}, "stream_options"),
        (
            CompletionRequest,
            {"stream": True, "stream_options": {"include_usage": 3}},
            "stream_options.include_usage",
        ),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": "hello"}, "messages"),
        (ChatRequest, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (ChatRequest, {"messages": [*CHAT["messages"], {"role": "robot", "content": ""}]}, "messages[1].role"),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (ChatRequest, {"max_completion_tokens": -1}, "max_completion_tokens"),
    ],
)
def test_a_bad_parameter_is_named(kind: type[Request], body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(kind, **body)
    assert (caught.value.status, caught.value.param) == (400, param)
    error = caught.value.body()["error"]
    assert error == {"message": str(caught.value), "type": "invalid_request_error", "param": param, "code": None}
    assert error["message"].startswith(param)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"x"', b"\xff"])
def test_a_body_that_is_no_object(raw: bytes) -> None:
    with pytest.raises(ApiError, match="body") as caught:
        parse(ChatRequest, raw)
    assert caught.value.status == 400


def test_a_server_s_error_is_not_the_caller_s() -> None:
    assert ApiError(503, "busy").body()["error"]["type"] == "server_error"


def test_an_event_is_one_line_of_ascii() -> None:
    text = 'a\n\n"b" \u2028 \u20ac'
    event = sse({"text": text})
    assert event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2 and event.isascii()
    assert json.loads(event.removeprefix("data: ")) == {"text": text}


def test_chunks_of_a_chat() -> None:
    reply = Reply(read(ChatRequest, stream=True, stream_options={"include_usage": True}), prompt_tokens=5)
    opening, piece, closing, counts = reply.opening(), reply.piece("hi"), reply.closing("stop"), reply.counts(2)
    assert opening and counts
    chunks = [opening, piece, closing, counts]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["usage"] for chunk in chunks[:3]] == [None, None, None]
    assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
        {"role": "assistant", "content": ""},
        {"content": "hi"},
        {},
    ]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None, None, "stop"]
    assert counts["choices"] == []
    assert counts["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def test_chunks_of_a_completion_without_usage() -> None:
    reply = Reply(read(CompletionRequest, stream=True), prompt_tokens=5)
    assert reply.opening() is None
    assert reply.counts(2) is None
    assert "usage" not in reply.piece("hi")
    assert reply.piece("hi")["choices"][0]["text"] == "hi"
    assert reply.closing("length")["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
    }
