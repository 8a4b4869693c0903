"""What a door tells the control of each request it has answered."""

from __future__ import annotations

from dataclasses import dataclass

# Codes of errors that are the arm's, not the caller's: they count against it in the split and in an experiment.
ARM_CODES = frozenset({"arm_failed", "arm_unavailable", "timeout"})
# An arm's queue is full. Not the caller's error either, and no sign that the arm does not work.
OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer that the teacher is to score: token ids of the prompt and of what the arm made of it."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One request that an arm had a part in.

    Times are in ms from the moment the door had the request's head. ``split`` says that the arm was drawn by lot,
    ``shadow`` that it was a copy. ``code`` is the error's, None for an answer that became whole; ``gone`` that the
    client hung up first. ``key`` is the name of the API key, "" for none.
    """

    arm: str
    at: float
    status: int
    split: bool
    shadow: bool = False
    key: str = ""
    code: str | None = None
    gone: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_ms: float | None = None
    latency_ms: float | None = None
    experiment: str = ""
    sampled: Scored | None = None
