"""Whether a family fits on a cluster, asked before anything is started.

Ray Train waits without end for a worker that cannot be placed, so what fits is asked first, and a student that loses
its place is watched.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.errors import RunError, UserError
from cluster.spec import FamilySpec, StudentSpec, TeacherSpec

# Ranks that have a place and room on the disk have said so after this time; Ray Train itself tries without end.
START_S = 900.0
# Every start waits for a moment; a student that waits for longer is shown as waiting.
SHOWN_S = 10.0
# Longer than it ever is between two looks at the students.
LONGEST_LOOK_S = 10.0


@dataclass(frozen=True)
class Need:
    """``count`` processes that each want these resources on one node.

    Attributes:
        memory: bytes of host memory; 0 where it is not known.
    """

    who: str
    count: int
    cpus: float
    gpus: float
    memory: float = 0.0

    def __str__(self) -> str:
        each = [f"{self.cpus:g} CPU"] if self.cpus or not self.memory else []
        each += [f"{self.gpus:g} GPU"] if self.gpus else []
        each += [gib(self.memory)] if self.memory else []
        return f"{self.who} needs {self.count} x ({' and '.join(each)})"


def needs_of(spec: FamilySpec) -> list[Need]:
    """What the teacher at its smallest and the students ask for, all at the same time."""
    return [teacher_needs(spec.teacher), *(student_needs(name, student) for name, student in spec.students.items())]


def teacher_needs(teacher: TeacherSpec) -> Need:
    """What the teacher asks for at its smallest."""
    shards, memory = teacher.min_replicas * teacher.shards, float(teacher.memory_per_shard or 0)
    return Need("the teacher", shards, teacher.cpus_per_shard, teacher.gpus_per_shard, memory)


def student_needs(name: str, student: StudentSpec) -> Need:
    """What one student asks for."""
    memory = float(student.memory_per_rank or 0)
    return Need(f"student {name}", student.ranks, student.cpus_per_rank, student.gpus_per_rank, memory)


def serving_needs_of(spec: FamilySpec) -> list[Need]:
    """What the comparison of the endpoints asks for, after the training has given its resources back.

    Where latency decides on promotion, each student's champion is served beside it. Whether there is one yet is not
    asked: a cluster that is too small would show it on the second night only.
    """
    options = spec.serving
    if options is None:
        return []
    beside = spec.promotion is not None and spec.promotion.latency is not None
    arms = len(spec.students) * (1 + beside) + options.include_teacher
    return [Need("serving", arms, options.cpus_per_arm, options.gpus_per_arm, float(options.memory_per_arm or 0))]


def check_capacity(
    needs: Iterable[Need], nodes: Iterable[Mapping[str, float]], where: str = "the cluster is too small"
) -> None:
    """Place every process on the first node with room, the largest first.

    Args:
        nodes: resources of each node that is alive, as Ray names them (``CPU``, ``GPU``, ``memory``); one that names no
            memory has no limit.

    Raises:
        UserError: what does not fit, all that is needed, and what there is.
    """
    needs, nodes = list(needs), list(nodes)
    if (need := first_without_room(needs, nodes)) is not None:
        raise UserError(
            f"{where}: {need} and does not fit; in all, {'; '.join(map(str, needs))}; "
            f"there is {_shown(nodes)}. {_remedy(needs, nodes)}"
        )


def first_without_room(needs: Iterable[Need], nodes: Iterable[Mapping[str, float]]) -> Need | None:
    """The first that finds no node with room, when the largest are placed first; None where all fit.

    Args:
        nodes: what each node has free, as Ray names it.
    """
    return next(_without_room(needs, nodes), None)


def _without_room(needs: Iterable[Need], nodes: Iterable[Mapping[str, float]]) -> Iterator[Need]:
    """The need of every process that finds no node with room, when the largest are placed first."""
    free = [
        {"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0), "memory": node.get("memory", math.inf)}
        for node in nodes
    ]
    for need in sorted(needs, key=lambda n: (n.gpus, n.cpus, n.memory), reverse=True):
        each = {"CPU": need.cpus, "GPU": need.gpus, "memory": need.memory}
        for _ in range(need.count):
            # A little slack, for tenths do not add up exactly in binary.
            room = next((f for f in free if all(f[name] >= each[name] - 1e-6 for name in each)), None)
            if room is None:
                yield need
                continue
            for name in each:
                room[name] -= each[name]


def totals(needs: Iterable[Need]) -> tuple[float, float, float]:
    """CPUs, GPUs and bytes of host memory of all together."""
    needs = list(needs)
    cpus, gpus, memory = (
        sum(need.count * getattr(need, name) for need in needs) for name in ("cpus", "gpus", "memory")
    )
    return cpus, gpus, memory


def most_of(stages: Iterable[Sequence[Need]]) -> list[Need]:
    """Places in which any one of several stages fits, for they follow each other and each gives back what it had.

    One stage's places, and more of them for what of another does not fit into those; so it may be more than the best
    choice of places would be.
    """
    most: list[Need] = []
    for stage in stages:
        wider, other = [*most, *_beyond(stage, most)], [*stage, *_beyond(most, stage)]
        most = min(wider, other, key=_scarcest_first)
    return most


def _beyond(needs: Iterable[Need], places: Iterable[Need]) -> list[Need]:
    """What finds no room in the places of others."""
    nodes = [
        {"CPU": place.cpus, "GPU": place.gpus, "memory": place.memory} for place in places for _ in range(place.count)
    ]
    return [replace(need, count=count) for need, count in Counter(_without_room(needs, nodes)).items()]


def _scarcest_first(needs: Iterable[Need]) -> tuple[float, float, float]:
    cpus, gpus, memory = totals(needs)
    return gpus, cpus, memory


def _remedy(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> str:
    """What to do about needs that do not fit, for each resource of which there is too little."""
    advice = []
    if first_without_room([replace(each, memory=0.0) for each in needs], nodes) is not None:
        advice.append("Lower cpus_per_shard, _rank or _arm, ranks or shards, or add nodes")
    if not advice or first_without_room([replace(each, cpus=0.0, gpus=0.0) for each in needs], nodes) is not None:
        advice.append(
            "For memory, use smaller students (weights, gradients and optimizer take about 18 bytes per parameter), "
            "lower micro_batch, corpus.sequence_length or replicas, use gradient_checkpointing, end what else runs "
            "there, or add nodes"
        )
    return ". ".join(advice)


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.1f} GiB"


def _shown(nodes: Iterable[Mapping[str, float]]) -> str:
    return " + ".join(map(_node, nodes)) or "no node"


def _node(node: Mapping[str, float]) -> str:
    memory = f", {gib(node['memory'])}" if "memory" in node else ""
    return f"{node.get('CPU', 0.0):g} CPU, {node.get('GPU', 0.0):g} GPU{memory}"


class Unplaced:
    """Watches for how long each student has had no rank running: no place, whatever keeps it from one, or no success.

    Args:
        pending: whether a place is waited for. A student that has one and only starts its processes waits for none.
        nodes: resources of each node that is alive.
    """

    def __init__(
        self, spec: FamilySpec, pending: Callable[[], bool], nodes: Callable[[], Iterable[Mapping[str, float]]]
    ) -> None:
        self._spec, self._pending, self._nodes = spec, pending, nodes
        self._waited_s: dict[str, float] = {}
        self._without_s: dict[str, float] = {}
        self._looked = time.monotonic()

    @property
    def waiting(self) -> list[str]:
        """Students that have waited for a place for long enough to be shown."""
        return [name for name, seconds in self._waited_s.items() if seconds >= SHOWN_S]

    def look(self, without: Iterable[str]) -> None:
        """Say which students have no rank running now.

        Raises:
            RunError: one of them has had no place for ``patience_s``; says what it needs and what there is. Or one has
                had places, and its processes did not come up.
        """
        names, now = list(without), time.monotonic()
        # Whoever looks may have been held up, and knows nothing of the time between.
        passed_s = min(now - self._looked, LONGEST_LOOK_S)
        self._looked = now
        self._without_s = {name: self._without_s.get(name, 0.0) + passed_s for name in names}
        waited_s = passed_s if names and self._pending() else 0.0
        self._waited_s = {name: self._waited_s.get(name, 0.0) + waited_s for name in names}
        limit_s = self._spec.patience_s + START_S
        for student, seconds in self._without_s.items():
            if seconds - self._waited_s[student] >= limit_s:
                raise RunError(
                    f"student {student} had places on the cluster, but its processes have not come up for "
                    f"{limit_s:g} s; Ray's log of its workers says why. Fix that, then resume with --resume"
                )
        name = max(names, key=lambda each: self._waited_s[each], default=None)
        if name is None or self._waited_s[name] < self._spec.patience_s:
            return
        need = next(need for need in needs_of(self._spec) if need.who == f"student {name}")
        raise RunError(
            f"{need} and has had no place for patience_s {self._spec.patience_s:g} s; there is "
            f"{_shown(self._nodes())}, used by this family or others. Add nodes, then resume with --resume"
        )
