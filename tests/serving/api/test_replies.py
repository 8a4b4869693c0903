"""What is sent: whole answers, the chunks of a stream, log-probabilities in both shapes, errors."""

import json
from typing import Any

import pytest

from serving.api.errors import ApiError, try_again
from serving.api.replies import Choice, Reply, sse
from serving.api.requests import ChatRequest, CompletionRequest
from serving.engines.base import Alternative, Delta, TokenLogprob

COMPLETION = {"model": "m", "prompt": "hello"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TOKENS = (
    TokenLogprob(5, "a", b"a", -0.5, (Alternative(5, "a", b"a", -0.5), Alternative(6, "b", b"b", -1.5)), 0),
    TokenLogprob(7, "\u20ac", b"\xe2\x82\xac", -3.0, (Alternative(6, "b", b"b", -0.1),), 1),
)


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({**CHAT, **more})


def completion(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({**COMPLETION, **more})


def grown(*deltas: Delta) -> Choice:
    choice = Choice()
    for delta in deltas:
        choice.add(delta)
    return choice


def test_a_whole_answer_with_two_choices() -> None:
    choices = [grown(Delta("a", 1), Delta("b", 2, "stop")), grown(Delta("c", 5, "length"))]
    body = Reply(chat(n=2), prompt_tokens=4).whole(choices)
    assert [(each["index"], each["message"]["content"], each["finish_reason"]) for each in body["choices"]] == [
        (0, "ab", "stop"),
        (1, "c", "length"),
    ]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 7, "total_tokens": 11}
    assert [each["text"] for each in Reply(completion(n=2), 4).whole(choices)["choices"]] == ["ab", "c"]


def test_log_probabilities_of_a_chat() -> None:
    choice = grown(Delta("a", 1, None, TOKENS[:1]), Delta("\u20ac", 2, "stop", TOKENS[1:]))
    shown = Reply(chat(logprobs=True, top_logprobs=2), 1).whole([choice])["choices"][0]["logprobs"]
    assert shown["content"][0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    assert shown["content"][1]["bytes"] == [0xE2, 0x82, 0xAC]
    assert Reply(chat(), 1).whole([choice])["choices"][0]["logprobs"] is None


def test_log_probabilities_of_a_completion_hold_the_chosen_token() -> None:
    choice = grown(Delta("a\u20ac", 2, "stop", TOKENS))
    shown = Reply(completion(logprobs=2), 1).whole([choice])["choices"][0]["logprobs"]
    assert shown == {
        "tokens": ["a", "\u20ac"],
        "token_logprobs": [-0.5, -3.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.1, "\u20ac": -3.0}],
        "text_offset": [0, 1],
    }


def test_an_error_that_goes_away_says_when() -> None:
    error = try_again(429, "slow down", "rate_limit_exceeded", 12.4)
    assert error.headers == {"Retry-After": "12"}
    assert error.body()["error"]["type"] == "rate_limit_error"
    assert try_again(503, "busy", "overloaded", 0.2).headers == {"Retry-After": "1"}


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "authentication_error"), (403, "permission_error"), (404, "invalid_request_error")]
)
def test_whose_fault_it_is(status: int, kind: str) -> None:
    assert ApiError(status, "no").body()["error"]["type"] == kind


def test_a_server_s_error_is_not_the_caller_s() -> None:
    assert ApiError(503, "busy").body()["error"]["type"] == "server_error"


def test_an_event_is_one_line_of_ascii() -> None:
    text = 'a\n\n"b" \u2028 \u20ac'
    event = sse({"text": text})
    assert event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2 and event.isascii()
    assert json.loads(event.removeprefix("data: ")) == {"text": text}


def test_chunks_of_a_chat() -> None:
    reply = Reply(chat(stream=True, stream_options={"include_usage": True}), prompt_tokens=5)
    opening, piece, closing, counts = (
        reply.opening(0),
        reply.piece(0, Delta("hi", 1)),
        reply.closing(0, "stop"),
        reply.counts(2),
    )
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
    reply = Reply(completion(stream=True), prompt_tokens=5)
    assert reply.opening(0) is None
    assert reply.counts(2) is None
    assert "usage" not in reply.piece(0, Delta("hi", 1))
    assert reply.piece(0, Delta("hi", 1))["choices"][0]["text"] == "hi"
    assert reply.closing(0, "length")["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
    }


@pytest.mark.parametrize("request_", [chat(stream=True), completion(stream=True), chat(stream=True, logprobs=True)])
@pytest.mark.parametrize("text", ["a", 'quo"te', "\u2028 \x00", "\ud83d\ude00 {}"])
def test_the_short_way_to_an_event_makes_the_same_event(request_: Any, text: str) -> None:
    reply = Reply(request_, 1)
    for index in (0, 1, 0):
        assert reply.text_event(index, text) == sse(reply.piece(index, Delta(text, 1)))
