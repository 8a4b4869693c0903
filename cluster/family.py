"""Runs one family from start to finish. The only file that knows every room."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.board import Board, has_no_rank
from cluster.capacity import Need, Unplaced
from cluster.corpus.batches import CORPUS_FOLDER, Batches, CorpusFacts
from cluster.corpus.prepare import prepare_corpus
from cluster.errors import RunError
from cluster.evaluate.figures import StudentResult
from cluster.evaluate.result import FamilyResult
from cluster.metrics import FamilyMetrics
from cluster.preflight import Checked
from cluster.registry import Registry, code_version
from cluster.runs import Run
from cluster.session import alive_nodes, give_back_places, here, places_pending
from cluster.space import when_there_is_room
from cluster.spec import FamilySpec
from cluster.specfile import home
from cluster.stream.actor import Stream
from cluster.students.champions import Champions
from cluster.students.job import StudentJob
from cluster.students.trainer import Trainers
from cluster.teacher.scaling import PACE, Pace
from cluster.watch import Status, Watch

log = logging.getLogger(__name__)

Report = Callable[[Status], None]
POLL_S = 0.5
# Of the stream and of what waits for the students: both go on from what the others know.
RESTARTS = 20
# How long a run that cannot go on waits for its parts to put away what they have.
LAST_S = 30.0
# How long one that is told to end waits for the students' last commits, and what those do that it waits for: others
# have learnt nothing since their last one.
HOLD_S = 60.0
PUTS_AWAY = ("training", "measuring after", "saving")


@dataclass(frozen=True)
class _Actors:
    """Handles of the family's own actors."""

    registry: ActorHandle
    board: ActorHandle
    stream: ActorHandle
    trainers: ActorHandle


def run_family(
    checked: Checked, run: Run, report: Report, pace: Pace = PACE, others: Callable[[], list[Need]] = list
) -> FamilyResult:
    """Distil one family: corpus, teacher and students, evaluation, registry.

    Needs a Ray connection, and a place on the cluster, see :func:`cluster.queue.place.place_for`.

    Args:
        checked: from :func:`cluster.preflight.preflight`.
        run: from :func:`cluster.runs.open_run`.
        report: called with the present status about twice a second.
        pace: how fast an elastic teacher pool follows the students.
        others: what other families on the cluster need that have a place there.

    Raises:
        UserError: its corpus cannot be read, or holds too little.
        RunError: the teacher is lost for good, or every student failed.
        ValueError: a resumed run was checked without the champions that it began with.
    """
    if run.warm_start and run.warm_start != checked.champions:
        raise ValueError(f"the run began with champions {run.warm_start}, and {checked.champions} were checked")
    started = time.monotonic()
    spec = checked.spec
    report(Status("reading the corpus"))
    # Both take seconds to import what they need, so they begin before they have work.
    trainers = _beside_us(
        Trainers, max_concurrency=len(spec.students), max_restarts=RESTARTS, max_task_retries=RESTARTS
    ).remote()
    registry = _beside_us(Registry).remote(
        checked.tracking_uri, spec.tracking.experiment or spec.name, str(home() / "artifacts")
    )
    try:
        text, most = run.folder / CORPUS_FOLDER, checked.most.cpus
        read = run.text_is_kept
        corpus = CorpusFacts.read(text) if read else prepare_corpus(spec.corpus, checked.teacher.folder, text, most)
        batches = Batches(text, spec.corpus, spec.evaluation.batches)
        lineage = _lineage(checked, run, corpus)
        own = {name: _own_lineage(checked, name) for name in spec.students}
        run.mlflow = ray.get(registry.start.remote(run.name, own, spec.model_dump(mode="json"), lineage, run.mlflow))
        run.warm_start = dict(checked.champions)
        _keep(run, spec)
        actors = _Actors(registry, _beside_us(Board).remote(), _start_stream(checked, run, pace), trainers)
        try:
            result = _distil(checked, run, batches, actors, lineage, report, others)
        except BaseException:
            _end_at_once(actors)
            raise
        _end_stream(actors.stream, complete=bool(result.students))
        ray.kill(actors.stream)
        result.seconds = time.monotonic() - started
        ray.get(registry.finish.remote(list(result.failed)))
    except KeyboardInterrupt:
        _say_how_it_ended(registry, [], killed=True)
        raise
    except Exception:
        _say_how_it_ended(registry, list(spec.students), killed=False)
        raise
    if not result.students:
        raise RunError("every student failed; " + "; ".join(f"{n}: {why}" for n, why in result.failed.items()))
    return result


def _lineage(checked: Checked, run: Run, corpus: CorpusFacts) -> dict[str, str]:
    """Tags by which a registered student can be traced to all that made it."""
    spec = checked.spec
    return {
        "stillhouse.family": spec.name,
        "stillhouse.run": run.name,
        "stillhouse.teacher": spec.teacher.model,
        "stillhouse.teacher_fingerprint": checked.teacher.fingerprint,
        "stillhouse.corpus": corpus.address,
        "stillhouse.labels": " ".join(f"{name}={value}" for name, value in spec.labels.model_dump().items()),
        "stillhouse.spec": run.spec_hash,
        "stillhouse.code": code_version(),
    }


def _own_lineage(checked: Checked, student: str) -> dict[str, str]:
    """What one student was made from beside all that made the family."""
    champion = checked.champion(student)
    return {"stillhouse.warm_start": champion} if champion else {}


def _beside_us(actor: type, **options: Any) -> Any:
    """An actor class to be started on this node: the packed corpus lies here, and other nodes come and go."""
    placed = NodeAffinitySchedulingStrategy(here(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=placed, **options)


def _start_stream(checked: Checked, run: Run, pace: Pace) -> ActorHandle:
    # It can be built again from what its readers ask for, so its death costs no more than what it was doing.
    stream = _beside_us(Stream, max_concurrency=1000, max_restarts=RESTARTS)
    return stream.remote(checked.spec, str(run.folder), checked.teacher, checked.store, pace, checked.most)


def _keep(run: Run, spec: FamilySpec) -> None:
    """Save the run's state, once there is room for it."""
    when_there_is_room(run.folder, run.save, spec.patience_s)


def _jobs(checked: Checked, run: Run, actors: _Actors, batches: int) -> list[StudentJob]:
    return [
        StudentJob(
            name=name,
            family=checked.spec,
            teacher=checked.teacher,
            student_dir=str(checked.student_dirs[name]) if name in checked.student_dirs else None,
            batches=batches,
            stream=actors.stream,
            board=actors.board,
            storage=str(run.folder),
        )
        for name in checked.spec.students
    ]


def _distil(
    checked: Checked,
    run: Run,
    batches: Batches,
    actors: _Actors,
    lineage: dict[str, str],
    report: Report,
    others: Callable[[], list[Need]],
) -> FamilyResult:
    """Train all students from one pass; register each as it finishes; one that fails harms no other."""
    spec = checked.spec
    actors.stream.start.remote()
    watch = Watch(actors.stream, actors.board, list(spec.students), spec.patience_s)
    unplaced = Unplaced(spec, places_pending, alive_nodes)
    metrics = FamilyMetrics(spec, run.name)
    jobs = _jobs(checked, run, actors, batches.count)
    tasks = {actors.trainers.run.remote(job): job.name for job in jobs}
    ends = _Ends(checked, run, actors, lineage, tasks, _champions(checked, run, actors.registry, jobs))
    status = Status("distilling")
    try:
        while refs := ends.awaited:
            done, _ = ray.wait(refs, num_returns=1, timeout=POLL_S)
            status, new = watch.look("distilling" if tasks else "registering")
            report(status)
            metrics.publish(status)
            if new:
                actors.registry.log.remote(new)
            if status.stats is not None and status.stats.error and tasks:
                raise RunError(status.stats.error)
            give_back_places()
            actors.stream.beside.remote(others())
            unplaced.look([name for name in tasks.values() if has_no_rank(status.students[name].phase)])
            for ref in done:
                ends.take(ref)
            ends.champions.look({name: student.phase for name, student in status.students.items()})
            # Until then nobody else, such as one more replica, is to take the place of a student.
            at_work = {*tasks.values(), *ends.champions.busy}
            if over := [name for name in spec.students if name not in at_work]:
                actors.stream.done.remote(over)
    except KeyboardInterrupt:
        at_it = [name for name, student in status.students.items() if student.phase in PUTS_AWAY]
        _hold(actors.stream, [task for task, name in tasks.items() if name in at_it], report)
        raise
    finally:
        ends.champions.close()
    status, new = watch.look("registered")
    ray.get(actors.registry.log.remote(new))
    assert status.stats is not None
    result = FamilyResult(
        run, batches.facts, status.stats, ends.students, ends.failed, watch.points, 0.0, dict(run.versions)
    )
    result.champions = ends.champions.found
    return result


class _Ends:
    """Takes up how each student has ended: registers it, and has its champion measured in its place.

    Args:
        tasks: of the students that learn; those that have ended are taken out.

    Attributes:
        students: those that have ended well; ``failed`` says of the others why.
    """

    def __init__(
        self,
        checked: Checked,
        run: Run,
        actors: _Actors,
        lineage: dict[str, str],
        tasks: dict[ray.ObjectRef, str],
        champions: Champions,
    ) -> None:
        self._checked, self._run, self._actors, self._lineage = checked, run, actors, lineage
        self._tasks, self.champions = tasks, champions
        self._registering: dict[ray.ObjectRef, str] = {}
        self.students: dict[str, StudentResult] = {}
        self.failed: dict[str, str] = {}

    @property
    def awaited(self) -> list[ray.ObjectRef]:
        """All that has still to end."""
        return [*self._tasks, *self._registering, *self.champions.refs]

    def take(self, ref: ray.ObjectRef) -> None:
        """Something has ended."""
        spec = self._checked.spec
        if self.champions.take(ref):
            return
        if ref in self._registering:
            self._run.versions[self._registering.pop(ref)] = ray.get(ref)
            _keep(self._run, spec)
            return
        name = self._tasks.pop(ref)
        try:
            self.students[name] = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            self.failed[name] = str(error.cause)
            self._actors.board.phase.remote(name, "failed")
            return
        # Before the registry is busy with the new version for a while.
        self.champions.ask(name)
        if name not in self._run.versions:
            tags = {**self._lineage, **_own_lineage(self._checked, name)}
            self._registering[_register(self._actors.registry, spec, self.students[name], tags)] = name


def _champions(checked: Checked, run: Run, registry: ActorHandle, jobs: list[StudentJob]) -> Champions:
    """Looks after the champions of the students that promotion is still to be decided of."""
    undecided = [job for job in jobs if checked.spec.promotion is not None and job.name not in run.promotions]
    return Champions(registry, checked.tracking_uri, {job.name: job for job in undecided}, run.versions)


def _hold(stream: ActorHandle, tasks: list[ray.ObjectRef], report: Report) -> None:
    """Have the students commit what they have learnt, because somebody wants the run to end; waits for it a while."""
    if not tasks:
        return
    report(Status("stopping: the students put away what they have learnt; Ctrl-C again ends at once"))
    try:
        ray.get(stream.hold.remote(), timeout=HOLD_S)
        ray.wait(tasks, num_returns=len(tasks), timeout=HOLD_S)
    except ray.exceptions.RayError as error:
        log.warning("the students go on from an earlier commit: %s", error)


def _end_at_once(actors: _Actors) -> None:
    """End a run that cannot go on. A student that learnt on would get into the way of the resumed run."""
    ray.kill(actors.trainers)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actors.stream.stop.remote(), timeout=LAST_S)
    ray.kill(actors.stream)


def _say_how_it_ended(registry: ActorHandle, failed: list[str], killed: bool) -> None:
    """Tell MLflow of a run that did not finish; when it is away, nobody waits for it."""
    try:
        ray.get(registry.finish.remote(failed, killed), timeout=LAST_S)
    except ray.exceptions.RayError as error:
        log.warning("MLflow does not know that the run has ended: %s", error)


def _end_stream(stream: ActorHandle, complete: bool) -> None:
    """End the pass. A stream that dies over it is started again and asked once more; all that students need is done."""
    try:
        if complete:
            ray.get(stream.finish.options(max_task_retries=1).remote())
        ray.get(stream.stop.options(max_task_retries=1).remote())
    except ray.exceptions.RayActorError as error:
        log.warning("the stream died at its end, so the store may not know the pass as complete: %s", error)


def _register(registry: ActorHandle, spec: FamilySpec, student: StudentResult, lineage: dict[str, str]) -> Any:
    """Log a finished student's figures and register its model; a reference to the version's number."""
    figures = {
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
    registry.summarise.remote(student.name, figures)
    return registry.register.remote(student.name, spec.model_name(student.name), student.model_dir, lineage)
