"""What can be read off one request."""

import pytest

from serving.experiment import Observation


def test_time_per_token_is_that_of_the_tokens_after_the_first() -> None:
    seen = Observation("a", 0.0, completion_tokens=5, first_token_ms=20.0, latency_ms=100.0)
    assert seen.per_token_ms == pytest.approx(20.0)


@pytest.mark.parametrize(
    "seen",
    [
        Observation("a", 0.0, completion_tokens=1, first_token_ms=20.0, latency_ms=20.0),
        Observation("a", 0.0, completion_tokens=5, first_token_ms=20.0, error="arm_failed"),
        Observation("a", 0.0, completion_tokens=5, latency_ms=100.0),
    ],
)
def test_without_two_tokens_and_both_times_there_is_none(seen: Observation) -> None:
    assert seen.per_token_ms is None
