"""What an experiment decides."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["promote", "rollback", "no_winner", "stopped"]


@dataclass(frozen=True)
class Decision:
    """One decision and what it rests on.

    ``promote``, ``no_winner`` and ``stopped`` end the experiment. ``rollback`` ends it for one candidate, and with the
    last candidate as a whole.
    """

    outcome: Outcome
    arm: str | None
    """The winner, or the arm that is rolled back; None for the two outcomes without one."""
    reason: str
    """One sentence with the numbers."""
    at: float
    """Seconds since 1970, as given to the look that decided."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """The rule, its limit and the intervals, JSON-able."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, the same names."""
        return asdict(self)
