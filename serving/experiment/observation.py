"""What an experiment is told: one record per request of the split traffic, one per answer that the teacher scored."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Observation:
    """One request of the split traffic, as the ingress saw it.

    Requests that a tester sent to an arm by name, and mirrored ones, do not belong here: nobody drew their arm by lot.
    A request whose client hung up has neither times nor an error: it counts as a request and for nothing else.
    """

    arm: str
    at: float
    """Arrival, seconds since 1970."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_ms: float | None = None
    """None when there was no first token."""
    latency_ms: float | None = None
    """The whole answer; None when it never became whole."""
    error: str | None = None
    """OpenAI error code when the arm is to blame, such as ``arm_failed``. A caller's own mistake is none."""

    @property
    def per_token_ms(self) -> float | None:
        """Time between two tokens after the first; None for an answer of fewer than two tokens or a failed one."""
        if self.latency_ms is None or self.first_token_ms is None or self.completion_tokens < 2:
            return None
        return (self.latency_ms - self.first_token_ms) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Quality:
    """What the teacher says about one answer that an arm gave."""

    arm: str
    at: float
    """When the answer was given, seconds since 1970."""
    tokens: int
    kl: float
    """Mean over the answer's tokens of KL(teacher || student), nats."""
    agreement: float
    """Share of the answer's tokens for which both have the same most likely token."""
