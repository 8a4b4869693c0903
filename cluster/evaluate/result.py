"""What a family came to: what the terminal, the report and the registry say at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.board import Point
from cluster.corpus.batches import CorpusFacts
from cluster.evaluate.figures import Champion, StudentResult
from cluster.evaluate.gate import Verdict
from cluster.runs import Run
from cluster.stream.figures import StreamStats


@dataclass
class FamilyResult:
    """What a family came to.

    Attributes:
        students: the finished ones; ``failed`` holds the reasons of the others.
        versions: registered model version per finished student; ``unregistered`` holds the reasons of those without.
        points: every student's curve, of the whole run.
        seconds: of the whole family, without the comparison of its endpoints.
        champions: what each finished student is to be compared with, None where there is no champion yet; only of those
            that the family's ``promotion`` still has to decide on.
        notices: what the reader of its figures has to know, one line each.
        verdicts: whether they took the champion's place; filled when it is decided.
        undecided: students whose promotion could not be decided or carried out, with the reason.
        warnings: what is missing though the family succeeded, one line each.
    """

    run: Run
    corpus: CorpusFacts
    stats: StreamStats
    students: dict[str, StudentResult]
    failed: dict[str, str]
    points: list[Point]
    seconds: float
    versions: dict[str, int] = field(default_factory=dict)
    champions: dict[str, Champion | None] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    unregistered: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def trouble(self) -> list[str]:
        """What went wrong without ending the run, one line each; the command then ends as failed."""
        return [
            *(f"student {name} failed: {why}" for name, why in self.failed.items()),
            *(f"student {name} is not registered: {why}" for name, why in self.unregistered.items()),
            *(f"the promotion of student {name} is not decided: {why}" for name, why in self.undecided.items()),
        ]
