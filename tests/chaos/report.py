"""What a chaos run has done and how long things took to come back; printed after the tests."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from cluster.audit import AUDIT_FOLDER, scorings_of, steps_of
from tests.chaos.faults import Faults

# A kill is timed just before it is done; a student may end its step meanwhile.
A_STEP_S = 0.5


@dataclass
class ChaosReport:
    """Counts over all families of a chaos run.

    Attributes:
        injected: faults by name.
        survived: those of families that ended as if nothing had happened.
        lost: batches that a student never learnt; ``doubled`` are those that it learnt twice.
        rescored: batches that the teacher scored more than once, as when it died over them.
        families: that were disturbed; ``unfinished`` are those that did not end as they should have.
        seconds: how long things took, by what they are.
    """

    injected: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    rescored: int = 0
    families: int = 0
    unfinished: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def surviving(self, *faults: str) -> Iterator[None]:
        """Counts faults as injected; as survived too, if what the block asserts holds."""
        self.injected.update(faults)
        try:
            yield
        except BaseException:
            self.unfinished += 1
            raise
        self.survived.update(faults)

    @contextlib.contextmanager
    def disturbing(self, folder: Path, students: Iterable[str], batches: int, faults: Faults) -> Iterator[None]:
        """The same for a family that runs in the block, with what it has come to by its end, see :meth:`learnt`."""
        try:
            with self.surviving():
                yield
            self.survived.update(faults.names)
        finally:
            self.injected.update(faults.names)
            self.learnt(folder, students, batches)

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
        counts = f"families disturbed {self.families}, of them failed {self.unfinished}"
        yield f"{counts}, labels lost {self.lost}, doubled {self.doubled}"
        yield f"batches scored again: {self.rescored}"
        for name, count in sorted(self.injected.items()):
            yield f"{name}: injected {count}, survived {self.survived[name]}"
        for what, seconds in sorted(self.seconds.items()):
            yield f"{what}: median {median(seconds):.1f} s, longest {max(seconds):.1f} s, n={len(seconds)}"


def student_recoveries(folder: Path, students: Iterable[str], kills: Iterable[float]) -> list[float]:
    """Seconds from a kill to the next step of a student that it hit, read from the audit logs.

    A student that is killed again before that step counts once, from the first kill on.

    Args:
        folder: the run's.
        kills: when something was killed that may have ended a student, in seconds since the epoch.
    """
    found: list[float] = []
    for student in students:
        lines = (folder / AUDIT_FOLDER / f"{student}.jsonl").read_text().splitlines()
        # What a killed writer left of a line is not an event.
        events = [json.loads(line) for line in lines if line.endswith("}")]
        killed: float | None = None
        for before, event in pairwise(events):
            if "batch" not in event:
                # A new life: it was hit by the first kill after its last sign of life, if no earlier one still counts.
                hits = [kill for kill in kills if before["at"] - A_STEP_S < kill < event["at"]]
                killed = min(hits, default=None) if killed is None else killed
            elif killed is not None:
                found.append(event["at"] - killed)
                killed = None
    return found
