"""What a chaos run has done and how long things took to come back; printed after the tests."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from cluster.audit import AUDIT_FOLDER, scorings_of, steps_of

# A kill is timed just before it is done; a student may end its step meanwhile.
A_STEP_S = 0.5


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

    @contextlib.contextmanager
    def surviving(self, *faults: str) -> Iterator[None]:
        """Counts faults as injected; as survived too, if what the block asserts holds."""
        self.injected.update(faults)
        yield
        self.survived.update(faults)

    def learnt(self, folder: Path, students: Iterable[str], batches: int) -> None:
        """Add what a disturbed family has come to.

        Args:
            folder: the run's.
            batches: that each student should have learnt once.
        """
        self.families += 1
        self.rescored += sum(count - 1 for count in scorings_of(folder).values())
        for student in students:
            numbers = [step.batch for step in steps_of(folder, student)[0]]
            self.lost += len(set(range(batches)) - set(numbers))
            self.doubled += len(numbers) - len(set(numbers))

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


def student_recoveries(folder: Path, students: Iterable[str], kills: Iterable[float]) -> list[float]:
    """Seconds from each kill to the next step of a student that it hit, read from the audit logs.

    Args:
        folder: the run's.
        kills: when something was killed that may have ended a student, in seconds since the epoch.
    """
    found = []
    for student in students:
        lines = (folder / AUDIT_FOLDER / f"{student}.jsonl").read_text().splitlines()
        # What a killed writer left of a line is not an event.
        events = [json.loads(line) for line in lines if line.endswith("}")]
        for before, life, after in zip(events, events[1:], events[2:], strict=False):
            # It was hit by the first kill after its last sign of life.
            hits = [kill for kill in kills if before["at"] - A_STEP_S < kill < life["at"]]
            if "batch" not in life and "batch" in after and hits:
                found.append(after["at"] - min(hits))
    return found
