"""What is done to a running family, and when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.watch import Status
from tests.processes import kill_one

SHARD, STREAM, TRAINERS, RANK, STUDENT, REGISTRY, BOARD = (
    "a teacher shard killed",
    "the stream killed",
    "what waits for the students killed",
    "a rank of a student killed",
    "a whole student killed",
    "the registry's actor killed",
    "the board killed",
)
DAMAGED = "a label block damaged"
# What is killed, by the title that Ray gives its process. A student's controller takes all of its ranks with it.
VICTIMS = {
    SHARD: "Shard",
    STREAM: "Stream",
    TRAINERS: "Trainers",
    RANK: "RayTrainWorker",
    STUDENT: "TrainController",
    REGISTRY: "Registry",
    BOARD: "Board",
}


def _always(_: Status) -> bool:
    return True


@dataclass(frozen=True)
class Fault:
    """What is done to a family, and when.

    Attributes:
        moment: batches that all students together have learnt by then.
        do: does it; False where it could not be done yet and must be tried again.
        when: what else must hold of the family then.
    """

    name: str
    moment: int
    do: Callable[[], bool]
    when: Callable[[Status], bool] = _always


@dataclass
class Faults:
    """Faults that wait for their moment; given to a run as what it reports its status to.

    Attributes:
        done: names of what has been done, and when, in seconds since the epoch.
    """

    planned: list[Fault]
    done: list[tuple[str, float]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Of what has been done."""
        return [name for name, _ in self.done]

    @property
    def kills_of_students(self) -> list[float]:
        """When something was killed that may have ended a student."""
        return [at for name, at in self.done if name in (RANK, STUDENT, TRAINERS)]

    def __call__(self, status: Status) -> None:
        """Do one thing that is due; the next one finds what it left."""
        learnt = sum(student.batch for student in status.students.values())
        for fault in sorted(self.planned, key=lambda fault: fault.moment):
            at = time.time()
            if fault.moment <= learnt and fault.when(status) and fault.do():
                self.planned.remove(fault)
                self.done.append((fault.name, at))
                return


def kill(name: str, moment: int, dice: random.Random, when: Callable[[Status], bool] = _always) -> Fault:
    """``SIGKILL`` for one process of a kind, any of them.

    Args:
        name: a key of :data:`VICTIMS`.
    """
    return Fault(name, moment, partial(kill_one, VICTIMS[name], dice.randrange(5)), when)


def kills(names: Sequence[str], last: int, dice: random.Random) -> Faults:
    """One kill for each name at random moments.

    Args:
        last: the latest moment.
    """
    moments = dice.sample(range(2, last), len(names))
    return Faults([kill(name, moment, dice) for name, moment in zip(names, moments, strict=True)])
