"""What MLflow is told of a running family: curves, final figures, models. MLflow being away delays it, no more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray.actor import ActorHandle

from cluster.board import FAMILY, POINTS_FILE, Point
from cluster.evaluate.figures import StudentResult
from cluster.registry import PATIENCE_S, Calls
from cluster.runs import Run
from cluster.space import when_there_is_room
from cluster.spec import FamilySpec

log = logging.getLogger(__name__)

# Points that are logged at a time. A resumed run may have many to log that an earlier session could not.
MOST_POINTS = 5000
POLL_S = 0.5


class Records:
    """Logs and registers in the background of the driver's loop. One student's refusal harms no other.

    Args:
        run: ``logged`` and ``versions`` are kept up to date, and saved with each version.

    Attributes:
        calls: to the registry actor; others may add theirs.
        unregistered: students without a version, with the reason.
        warnings: what is not in MLflow otherwise, one line each.
    """

    def __init__(self, registry: ActorHandle, run: Run, spec: FamilySpec) -> None:
        self._registry, self._run, self._spec = registry, run, spec
        self.calls = Calls(max(spec.patience_s, PATIENCE_S))
        self._logging: set[str] = set()
        self._not_logged: set[str] = set()
        self.unregistered: dict[str, str] = {}
        self.warnings: list[str] = []

    def save(self) -> None:
        """Save the run's state, once there is room for it.

        Raises:
            NoRoomError: the disk stayed full.
        """
        when_there_is_room(self._run.folder, self._run.save, self._spec.patience_s)

    # -- curves ----------------------------------------------------------------------------------------------------

    def log(self, points: Mapping[str, list[Point]]) -> None:
        """Begin to log what MLflow does not have yet, one call per student at a time.

        Args:
            points: of the whole run, by student.
        """
        for name in points.keys() & self._run.mlflow.keys():
            begin = self._run.logged.get(name, 0)
            new = points[name][begin : begin + MOST_POINTS]
            if new and name not in self._logging and name not in self._not_logged:
                self._logging.add(name)
                call = partial(self._registry.log.remote, self._run.mlflow[name], new)
                self.calls.ask(call, partial(self._logged, name, begin + len(new)), partial(self._lost, name))

    def all_logged(self, points: Mapping[str, list[Point]]) -> bool:
        """Whether MLflow has all points, except those that it does not take in this session."""
        names = points.keys() & self._run.mlflow.keys() - self._not_logged
        return all(self._run.logged.get(name, 0) >= len(points[name]) for name in names)

    def _logged(self, name: str, count: int, _: None) -> None:
        self._logging.discard(name)
        self._run.logged[name] = count

    def _lost(self, name: str, reason: str) -> None:
        self._logging.discard(name)
        if name in self._not_logged:
            return  # it was said already
        self._not_logged.add(name)
        who = "the family" if name == FAMILY else f"student {name}"
        self._warn(
            f"metrics of {who} are not in MLflow: {reason}; they are kept in {self._run.folder / POINTS_FILE}, and "
            f"--resume logs them"
        )

    def _warn(self, line: str) -> None:
        log.warning(line)
        self.warnings.append(f"warning: {line}")

    # -- models ----------------------------------------------------------------------------------------------------

    def register(self, student: StudentResult, tags: Mapping[str, str]) -> None:
        """Begin to register a finished student, unless an earlier session has done so.

        The family's own run gets its final figures as well, as ``<student>.<figure>``.
        """
        figures = {f"{student.name}.{name}": value for name, value in _figures_of(student).items()}
        last = [Point(FAMILY, student.batches, figures)]
        log_last = partial(self._registry.log.remote, self._run.mlflow[FAMILY], last)
        self.calls.ask(log_last, lambda _: None, partial(self._lost, FAMILY))
        if student.name in self._run.versions:
            return
        run_id, model = self._run.mlflow[student.name], self._spec.model_name(student.name)
        call = partial(
            self._registry.register.remote, run_id, model, student.model_dir, tags, _figures_of(student), time.time()
        )
        self.calls.ask(call, partial(self._registered, student.name), partial(self._unregistered, student))

    def _registered(self, name: str, version: int) -> None:
        self._run.versions[name] = version
        self.save()

    def _unregistered(self, student: StudentResult, reason: str) -> None:
        line = f"{reason}; its model is kept in {student.model_dir}, and --resume registers it"
        log.warning("student %s is not registered: %s", student.name, line)
        self.unregistered[student.name] = line

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self, points: Mapping[str, list[Point]], failed: list[str], show: Callable[[str], None]) -> None:
        """Wait until MLflow has everything and close its runs, or give up what it has not taken for its patience.

        Args:
            points: of the whole run, by student.
            failed: students that failed. Those without a version are added.
            show: called with the reason while MLflow is away.
        """
        while self.calls.pending or not self.all_logged(points):
            self.log(points)
            show(self.calls.trouble)
            self.calls.step(POLL_S)
        self.save()
        finish = partial(self._registry.finish.remote, self._run.mlflow, [*failed, *self.unregistered])
        _, reason = self.calls.wait(finish, show)
        if reason:
            self._warn(f"MLflow shows the run as running: {reason}; --resume ends it")


def _figures_of(student: StudentResult) -> dict[str, float]:
    """Final figures of a student, as MLflow names them."""
    return {
        "kl_before": student.before.kl,
        "kl_after": student.after.kl,
        "agreement_before": student.before.agreement,
        "agreement_after": student.after.agreement,
        "perplexity_before": student.before.student_perplexity,
        "perplexity_after": student.after.student_perplexity,
        "calibration_error_before": student.before.calibration_error,
        "calibration_error_after": student.after.calibration_error,
        "teacher_calibration_error": student.after.teacher_calibration_error,
        "teacher_perplexity": student.after.teacher_perplexity,
        "parameters": float(student.parameters),
    }


def latency_figures(
    spec: FamilySpec, runs: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """What the comparison of endpoints measured, as MLflow names it, by run id.

    Args:
        runs: run ids by student, and under ``FAMILY`` the family's, which gets all arms as ``<arm>.<figure>``.
        rows: of the comparison, one per arm: an arm is a student, its champion or the teacher.
    """
    figures: dict[str, dict[str, float]] = {runs[FAMILY]: {}}
    for row in rows:
        arm = row["arm"].removeprefix(f"{spec.name}-")
        times = {name: row[f"{name}_ms"] for name in ("latency", "first_token")}
        own = {f"{name}_{quantile}_ms": value for name, of in times.items() for quantile, value in of.items()}
        own |= {name: row[name] for name in ("errors", "tokens_per_s")}
        figures[runs[FAMILY]] |= {f"{arm}.{name}": value for name, value in own.items()}
        if row["arm"] in {spec.model_name(name) for name in spec.students}:
            figures[runs[arm]] = own
    return figures
