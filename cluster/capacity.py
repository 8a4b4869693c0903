"""Whether a family fits on a cluster, asked before anything is started.

Ray Train waits without end for a worker that cannot be placed, so this is the only moment to say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import UserError
from cluster.spec import FamilySpec, StudentSpec


@dataclass(frozen=True)
class Need:
    """``count`` processes that each want these resources on one node."""

    who: str
    count: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.who} needs {self.count} x ({each})"


def needs_of(spec: FamilySpec) -> list[Need]:
    """What the teacher at its smallest and the students ask for, all at the same time."""
    teacher = spec.teacher
    shards = teacher.min_replicas * teacher.shards
    return [
        Need("the teacher", shards, teacher.cpus_per_shard, teacher.gpus_per_shard),
        *(student_needs(name, student) for name, student in spec.students.items()),
    ]


def student_needs(name: str, student: StudentSpec) -> Need:
    """What one student asks for."""
    return Need(f"student {name}", student.ranks, student.cpus_per_rank, student.gpus_per_rank)


def serving_needs_of(spec: FamilySpec) -> list[Need]:
    """What the comparison of the endpoints asks for, after the training has given its resources back."""
    options = spec.serving
    if options is None:
        return []
    arms = len(spec.students) + options.include_teacher
    return [Need("serving", arms, options.cpus_per_arm, options.gpus_per_arm)]


def check_capacity(needs: Iterable[Need], nodes: Iterable[Mapping[str, float]]) -> None:
    """Place every process on the first node with room, the largest first.

    Args:
        nodes: resources of each node that is alive, as Ray names them (``CPU``, ``GPU``).

    Raises:
        UserError: what does not fit, all that is needed, and what there is.
    """
    needs, nodes = list(needs), list(nodes)
    if (need := first_without_room(needs, nodes)) is not None:
        there = " + ".join(f"{node.get('CPU', 0.0):g} CPU, {node.get('GPU', 0.0):g} GPU" for node in nodes)
        raise UserError(
            f"the cluster is too small: {need} and does not fit; in all, {'; '.join(map(str, needs))}; "
            f"there is {there or 'no node'}. Lower cpus_per_shard, _rank or _arm, ranks or shards, or add nodes"
        )


def first_without_room(needs: Iterable[Need], nodes: Iterable[Mapping[str, float]]) -> Need | None:
    """The first that finds no node with room, when the largest are placed first; None where all fit.

    Args:
        nodes: what each node has free, as Ray names it.
    """
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    for need in sorted(needs, key=lambda n: (n.gpus, n.cpus), reverse=True):
        for _ in range(need.count):
            # A little slack, for tenths do not add up exactly in binary.
            room = next((f for f in free if f[0] >= need.cpus - 1e-6 and f[1] >= need.gpus - 1e-6), None)
            if room is None:
                return need
            room[0] -= need.cpus
            room[1] -= need.gpus
    return None
