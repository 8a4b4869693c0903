"""What a caller may ask: what is taken, what is refused and by which name."""

import json
from typing import Any

import pytest

from serving.api.errors import ApiError
from serving.api.requests import ChatRequest, CompletionRequest, Request, parse
from serving.engines.base import Sampling
from serving.ingress.relay import ask_of
from serving.link.frames import Frames, ask_in, ask_out, packed

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
    refused = dict.fromkeys(
        [*ChatRequest.unsupported, "max_completion_tokens", "logprobs", "top_logprobs", "n", "user"]
    )
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
    assert read(ChatRequest, metadata={"a": "b"}, some_new_thing=3) == read(ChatRequest)


def test_who_asks() -> None:
    assert read(ChatRequest, user="me").caller == "me"
    assert read(ChatRequest, user="me", safety_identifier="newer").caller == "newer"
    assert read(ChatRequest).caller is None


def test_how_many_answers_and_which_log_probabilities() -> None:
    assert (read(ChatRequest).choices, read(ChatRequest, n=3).choices) == (1, 3)
    asked = [
        (CompletionRequest, {}, None),
        (CompletionRequest, {"logprobs": 0}, 0),
        (CompletionRequest, {"logprobs": 5}, 5),
        (ChatRequest, {"logprobs": False}, None),
        (ChatRequest, {"logprobs": True}, 0),
        (ChatRequest, {"logprobs": True, "top_logprobs": 20}, 20),
    ]
    for kind, wishes, wanted in asked:
        assert read(kind, **wishes).sampling().logprobs == wanted


UNSUPPORTED = [
    (CompletionRequest, "best_of", 2),
    (CompletionRequest, "echo", True),
    (CompletionRequest, "suffix", "end"),
    (CompletionRequest, "logit_bias", {"5": 1}),
    (CompletionRequest, "presence_penalty", 0.1),
    (CompletionRequest, "frequency_penalty", 0.1),
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
        (CompletionRequest, "best_of", 1),
        (CompletionRequest, "echo", False),
        (ChatRequest, "presence_penalty", 0.0),
        (ChatRequest, "tools", []),
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
        (CompletionRequest, {"prompt": [-1]}, "prompt"),
        (CompletionRequest, {"prompt": [2**31]}, "prompt"),
        (CompletionRequest, {"prompt": [[1, 10**4000]]}, "prompt"),
        (CompletionRequest, {"model": ""}, "model"),
        (CompletionRequest, {"max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {"max_tokens": 10**23}, "max_tokens"),
        (CompletionRequest, {"n": 10**400}, "n"),
        (CompletionRequest, {"logprobs": 10**400}, "logprobs"),
        (CompletionRequest, {"seed": -(10**400)}, "seed"),
        (CompletionRequest, {"temperature": 10**400}, "temperature"),
        (CompletionRequest, {"top_p": -(10**400)}, "top_p"),
        (CompletionRequest, {"n": 0}, "n"),
        (CompletionRequest, {"n": 9}, "n"),
        (CompletionRequest, {"logprobs": 6}, "logprobs"),
        (CompletionRequest, {"logprobs": True}, "logprobs"),
        (ChatRequest, {"logprobs": 1}, "logprobs"),
        (ChatRequest, {"top_logprobs": 2}, "top_logprobs"),
        (ChatRequest, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (ChatRequest, {"user": 3}, "user"),
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
        (ChatRequest, {"max_completion_tokens": 10**23}, "max_completion_tokens"),
        (ChatRequest, {"logprobs": True, "top_logprobs": 10**400}, "top_logprobs"),
    ],
)
def test_a_bad_parameter_is_named(kind: type[Request], body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(kind, **body)
    assert (caught.value.status, caught.value.param) == (400, param)
    error = caught.value.body()["error"]
    assert error == {"message": str(caught.value), "type": "invalid_request_error", "param": param, "code": None}
    assert error["message"].startswith(param)


@pytest.mark.parametrize(
    ("kind", "wishes"),
    [
        (CompletionRequest, {"prompt": [2**31 - 1, 0], "max_tokens": 2**31, "seed": -(2**63)}),
        (ChatRequest, {"max_completion_tokens": 2**31, "seed": 2**63 - 1}),
    ],
)
def test_the_largest_numbers_that_are_taken_go_to_an_arm(kind: type[Request], wishes: dict[str, Any]) -> None:
    ask = ask_of(read(kind, **wishes))
    (frame,) = Frames().feed(packed(ask_out(ask)))
    assert ask_in(frame).sampling == ask.sampling


HOSTILE = [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": ' * 100_000]


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
def test_a_body_that_is_no_object(raw: bytes) -> None:
    with pytest.raises(ApiError, match="body") as caught:
        parse(ChatRequest, raw)
    assert caught.value.status == 400
