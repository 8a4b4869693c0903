"""What a running family tells Prometheus, by way of the agent of the node that it is run from.

Ray puts ``ray_`` in front of each name, and ``_total`` behind a counter's. Counters begin at 0 with every run and every
resumed run. Each metric has the run's name, for a family's runs of two nights are not one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.spec import FamilySpec
from cluster.stream.figures import StreamStats
from cluster.watch import Status, StudentStatus


@dataclass(frozen=True)
class _Metric:
    """One metric; ``value`` gives None for "not known yet"."""

    name: str
    text: str
    value: Callable[..., float | None]
    counts: bool = False


_FAMILY: tuple[_Metric, ...] = (
    _Metric("family_batches", "Batches of the pass.", lambda stats: stats.total),
    _Metric("labelled_batches", "Batches that have labels.", lambda stats: len({*stats.scored, *stats.read})),
    _Metric("teacher_started", "1 once labels were missing in the store.", lambda stats: float(stats.pool.started)),
    _Metric("replicas_ready", "Replicas of the teacher that serve.", lambda stats: stats.pool.ready),
    _Metric("window_used_batches", "Batches that the stream holds.", lambda stats: stats.window_used),
    _Metric("unsaved_batches", "Batches that the label store has not taken yet.", lambda stats: stats.unsaved),
    _Metric("batches_scored", "Batches that the teacher has scored.", lambda stats: sum(stats.scored.values()), True),
    _Metric("batches_read", "Batches whose labels the store had.", lambda stats: sum(stats.read.values()), True),
    _Metric("batches_rescored", "Batches that died with a replica.", lambda stats: stats.pool.rescored, True),
    _Metric("replica_restarts", "Replicas that were started again.", lambda stats: stats.pool.restarts, True),
    _Metric("replica_busy_seconds", "Seconds of replicas at work.", lambda stats: stats.pool.busy_seconds, True),
    _Metric("teacher_mfu", "MFU of the replica that scored the last batch.", lambda stats: stats.pool.mfu),
    _Metric("label_bytes", "Bytes of labels that the teacher has made.", lambda stats: stats.pool.label_bytes, True),
)
_STREAM: tuple[_Metric, ...] = (
    _Metric("student_waited_seconds", "Seconds of waiting for labels.", lambda s, who: s.waited_s.get(who), True),
    _Metric("student_behind_batches", "Batches behind the fastest student.", lambda s, who: s.behind.get(who)),
    _Metric("student_blocks", "1 while the teacher waits for it.", lambda s, who: float(s.blocked_by == who)),
)
_STUDENT: tuple[_Metric, ...] = (
    _Metric("student_batches", "Batches that it has learnt from.", lambda student: student.batch),
    _Metric("student_loss_nats", "Loss of the last batch.", lambda student: student.metrics.get("loss")),
    _Metric("student_kl_nats", "KL of the last batch.", lambda student: student.metrics.get("kl")),
    _Metric("student_mfu", "MFU within the last batch.", lambda student: student.metrics.get("mfu")),
    _Metric(
        "student_tokens_per_second",
        "Speed within the last batch.",
        lambda student: student.metrics.get("tokens_per_second"),
    ),
)


class FamilyMetrics:
    """The metrics of one run of a family; :meth:`publish` brings them up to date. Needs a Ray connection."""

    def __init__(self, spec: FamilySpec, run: str) -> None:
        self._of = {"family": spec.name, "run": run}
        self._tokens = spec.corpus.batch_sequences * spec.corpus.sequence_length
        self._window = spec.stream.window
        self._made: dict[str, Any] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def publish(self, status: Status) -> None:
        """Bring all metrics to a status."""
        if status.stats is not None:
            self._publish_stream(status.stats, list(status.students))
        for name, student in status.students.items():
            self._publish_student(name, student)

    def _publish_stream(self, stats: StreamStats, students: list[str]) -> None:
        for metric in _FAMILY:
            self._put(metric, metric.value(stats))
        self._put(_Metric("window_batches", "Batches that may be ready ahead.", float), self._window)
        scored = _Metric("teacher_tokens", "Tokens that the teacher has scored.", float, True)
        self._put(scored, sum(stats.scored.values()) * self._tokens)
        given = _Metric("student_tokens", "Tokens that a student has been given.", float, True)
        for name in students:
            for metric in _STREAM:
                self._put(metric, metric.value(stats, name), name)
            self._put(given, stats.delivered.get(name, 0) * self._tokens, name)

    def _publish_student(self, name: str, student: StudentStatus) -> None:
        for metric in _STUDENT:
            self._put(metric, metric.value(student), name)

    def _put(self, metric: _Metric, value: float | None, student: str = "") -> None:
        if value is None:
            return
        tags = {**self._of, **({"student": student} if student else {})}
        made = self._made.get(metric.name) or self._make(metric, tuple(tags))
        if not metric.counts:
            made.set(value, tags)
            return
        # A stream that was built again begins to count anew.
        more, self._told[metric.name, student] = value - self._told.get((metric.name, student), 0.0), value
        if more > 0:
            made.inc(more, tags)

    def _make(self, metric: _Metric, tags: tuple[str, ...]) -> Any:
        # Here, and not above: it costs a command line that runs no family.
        from ray.util.metrics import Counter, Gauge

        kind = Counter if metric.counts else Gauge
        self._made[metric.name] = made = kind(f"stillhouse_{metric.name}", metric.text, tags)
        return made
