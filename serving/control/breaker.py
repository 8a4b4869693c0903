"""Which arms have failed, by what the doors report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from serving.records import ARM_CODES, Record
from serving.spec import BreakerSpec


class Breaker:
    """Takes an arm out after some failures one after another, and at once where its process has died.

    A caller's own mistakes, clients that hang up and a full queue are no failures of the arm.
    """

    def __init__(self, spec: BreakerSpec, alone: Collection[str]) -> None:
        """``alone`` are the arms that have a single process."""
        self._spec, self._alone = spec, alone
        self._in_a_row: Counter[str] = Counter()

    def failing(self, records: Iterable[Record]) -> dict[str, str]:
        """The arms that have failed with these, and why."""
        out: dict[str, str] = {}
        for record in records:
            if record.code in ARM_CODES:
                self._in_a_row[record.arm] += 1
                if record.code == "arm_unavailable" and record.arm in self._alone:
                    out[record.arm] = "its process died"
                elif self._in_a_row[record.arm] >= self._spec.failures:
                    out[record.arm] = f"{self._in_a_row[record.arm]} requests in a row failed ({record.code})"
            elif record.code is None and not record.gone:
                self._in_a_row[record.arm] = 0
                out.pop(record.arm, None)
        return out

    def forgive(self, arm: str) -> None:
        """The arm has shown that it works."""
        self._in_a_row[arm] = 0
