"""What a chaos run has done and how long things took to come back; printed after the tests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from cluster.audit import AUDIT_FOLDER


@dataclass
class ChaosReport:
    """Counts over all families of a chaos run.

    Attributes:
        injected: faults by name.
        survived: those of families that ended as if nothing had happened.
        lost: batches that a student never learnt; ``doubled`` are those that it learnt twice.
        rescored: batches that the teacher scored again, because it died over them.
        families: that were disturbed.
        seconds: how long things took, by what they are.
    """

    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    rescored: int = 0
    families: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def took(self, what: str, seconds: float) -> None:
        """Add a duration."""
        self.seconds.setdefault(what, []).append(seconds)

    def lines(self) -> Iterator[str]:
        """The report as text."""
        yield f"families disturbed {self.families}, labels lost {self.lost}, doubled {self.doubled}"
        yield f"batches scored again, because the teacher died over them: {self.rescored}"
        for name, count in sorted(self.injected.items()):
            yield f"{name}: injected {count}, survived {self.survived[name]}"
        for what, seconds in sorted(self.seconds.items()):
            yield f"{what}: median {median(seconds):.1f} s, longest {max(seconds):.1f} s, n={len(seconds)}"


def student_recoveries(folder: Path, students: list[str], kills: list[float]) -> list[float]:
    """Seconds from each kill of a student's process to that student's next step, read from the audit logs.

    Args:
        folder: the run's.
        kills: when a rank or a whole student was killed, in seconds since the epoch.
    """
    found = []
    for student in students:
        events = [json.loads(line) for line in (folder / AUDIT_FOLDER / f"{student}.jsonl").read_text().splitlines()]
        lives = [event["at"] for event in events if "batch" not in event]
        steps = [event["at"] for event in events if "batch" in event]
        for began in lives[1:]:
            # Of several kills that one life came after, the last is what it came back from.
            before = [kill for kill in kills if kill < began]
            after = [step for step in steps if step > began]
            if before and after:
                found.append(min(after) - max(before))
    return found
