"""How long a rank asks a stream again that has died."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

from cluster.stream.reader import Reader

AWAY = ActorUnavailableError("away", b"0" * 16)


def through(answers: list[Any], patience_s: float, first_takes_s: float = 0.0) -> tuple[Any, int]:
    """What a call comes to that is answered so, an error being raised, and how often it was asked again."""
    reader: Any = Reader(stream=None, student="s", rank=0, batches=1, patience_s=patience_s)
    again: list[None] = []

    def work() -> Any:
        if not again:
            time.sleep(first_takes_s)
        answer = answers[min(len(again), len(answers) - 1)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return reader._through(work, lambda: again.append(None)), len(again)


def test_a_rank_that_has_waited_long_for_its_labels_asks_again() -> None:
    assert through([AWAY, "labels"], patience_s=0.2, first_takes_s=0.3) == ("labels", 1)


def test_a_stream_that_does_not_come_back_is_given_up() -> None:
    # Ray's memory monitor has killed it at first.
    with pytest.raises(ActorDiedError):
        through([OutOfMemoryError("killed"), ActorDiedError()], patience_s=0.2)


def test_what_the_stream_says_itself_is_not_asked_again() -> None:
    with pytest.raises(ValueError, match="of its own"):
        through([ValueError("of its own"), "labels"], patience_s=60.0)
