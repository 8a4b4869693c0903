"""What doors and arms say to each other. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.engines.base import Accepted, Delta, Refused, Sampling
from serving.records import Scored


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as an arm gets it.

    Attributes:
        prompt: a text, or token ids that are taken as they are; None for a chat.
        messages: of a chat; each has ``role`` and ``content``.
        choices: how many answers; each is drawn by itself.
        streamed: the caller reads along; else what comes after the first piece may come in few, larger messages.
        sampled: send the token ids along at the end, for the teacher to score.
        trace: the one that it is part of, see :mod:`cluster.tracing`.
    """

    sampling: Sampling
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, str]] = ()
    choices: int = 1
    streamed: bool = True
    sampled: bool = False
    trace: str = ""

    @property
    def param(self) -> str:
        """What the caller named the prompt."""
        return "messages" if self.prompt is None else "prompt"


class Piece(NamedTuple):
    """The next piece of one of the answers; ``choice`` counts them from 0."""

    choice: int
    delta: Delta


Item = Accepted | Refused | Piece | Scored
"""First ``Accepted`` and then ``Piece``s (and at last ``Scored``, if asked for), or ``Refused`` and nothing more."""
