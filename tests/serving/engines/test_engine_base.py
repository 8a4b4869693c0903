"""How many tokens a request may generate."""

import pytest

from serving.engines.base import Refused, budget


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "allowed"),
    [(10, 5, 100, 5), (10, None, 100, 90), (90, 10, 100, 10), (99, None, 100, 1)],
)
def test_what_fits(prompt: int, asked: int | None, context: int, allowed: int) -> None:
    assert budget(prompt, asked, context, "prompt") == allowed


@pytest.mark.parametrize(("prompt", "asked"), [(91, 10), (100, None), (100, 1), (5000, 1)])
def test_what_does_not_fit_is_refused_with_the_numbers(prompt: int, asked: int | None) -> None:
    with pytest.raises(Refused, match="maximum context length is 100 tokens") as caught:
        budget(prompt, asked, 100, "messages")
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert f"{prompt} in the messages" in caught.value.message
