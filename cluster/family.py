"""Runs one family from start to finish. The only file that knows every room."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.board import Board, has_no_rank
from cluster.capacity import Need, Unplaced, needs_of, totals
from cluster.corpus.batches import CORPUS_FOLDER, Batches, CorpusFacts
from cluster.corpus.prepare import prepare_corpus
from cluster.errors import RunError, first_line
from cluster.evaluate.figures import StudentResult
from cluster.evaluate.result import FamilyResult
from cluster.metrics import FamilyMetrics
from cluster.preflight import Checked
from cluster.records import Records
from cluster.registry import Registry, code_version
from cluster.registry.calls import wait_for
from cluster.runs import Run
from cluster.session import alive_nodes, give_back_places, here, places_pending
from cluster.specfile import home
from cluster.stream.actor import Stream
from cluster.stream.figures import StreamStats
from cluster.students.champions import Champions
from cluster.students.job import StudentJob
from cluster.students.trainer import StoppedError, Trainers
from cluster.teacher.scaling import PACE, Pace
from cluster.watch import Status, Watch

log = logging.getLogger(__name__)

Report = Callable[[Status], None]
POLL_S = 0.5
# Of each of the family's own actors, and of each call to one: all of them continue from what the others know.
RESTARTS = 20
# How long a run that cannot continue waits for its parts to put away what they have.
LAST_S = 30.0
# How long a run that a person stops waits for the students' last commits; one that fails waits for its ``patience_s``.
# And what those do that it waits for: others have learnt nothing since their last one. One that has stopped is waited
# for too, because Ray Train may list its last commit only when its task ends.
HOLD_S = 60.0
PUTS_AWAY = ("training", "measuring after", "saving", "stopped")


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
        RunError: the teacher is lost for good, or something else ends the run; the students have then committed what
            they have learnt. Or every student failed.
        ValueError: a resumed run was checked without the champions that it began with.
    """
    if run.warm_start and run.warm_start != checked.champions:
        raise ValueError(f"the run began with champions {run.warm_start}, and {checked.champions} were checked")
    started = time.monotonic()
    spec = checked.spec
    report(Status("reading the corpus"))
    # Both take seconds to import what they need, so they begin before they have work.
    trainers = _beside_us(Trainers, max_concurrency=len(spec.students)).remote()
    registry = _beside_us(Registry).remote(
        checked.tracking_uri, spec.tracking.experiment or spec.name, str(home() / "artifacts")
    )
    records = Records(registry, run, spec)
    try:
        corpus = _corpus(checked, run)
        batches = Batches(run.folder / CORPUS_FOLDER, spec.corpus, spec.evaluation.batches)
        lineage = _lineage(checked, run, corpus)
        _open_runs(checked, run, registry, records, lineage, report)
        board, stream = _beside_us(Board).remote(str(run.folder)), _start_stream(checked, run, pace)
        actors = _Actors(registry, board, stream, trainers)
        try:
            result = _distil(checked, run, batches, actors, records, lineage, report, others)
        except BaseException:
            _end_at_once(actors)
            raise
        result.seconds = time.monotonic() - started
        result.notices = checked.packing_notices()
    except KeyboardInterrupt:
        _report_the_end(registry, run, killed=True)
        raise
    except Exception:
        _report_the_end(registry, run, killed=False)
        raise
    if not result.students:
        raise RunError("every student failed; " + "; ".join(f"{n}: {why}" for n, why in result.failed.items()))
    return result


def _corpus(checked: Checked, run: Run) -> CorpusFacts:
    """Read the corpus into the run's folder, unless the run has kept its text."""
    text, spec = run.folder / CORPUS_FOLDER, checked.spec.corpus
    if run.text_is_kept:
        corpus = CorpusFacts.read(text)
    else:
        place, _, _ = totals(needs_of(checked.spec))
        corpus = prepare_corpus(spec, checked.teacher.folder, text, checked.most.cpus, checked.packed, place)
    if not checked.packed:
        corpus.require_padded(checked.packing_notices()[0])
    return corpus


def _open_runs(
    checked: Checked,
    run: Run,
    registry: ActorHandle,
    records: Records,
    lineage: dict[str, str],
    report: Report,
) -> None:
    """Open the family's runs in MLflow, once it answers.

    Raises:
        RunError: MLflow refuses, or has been away for too long.
    """
    spec = checked.spec
    own = {name: _own_lineage(checked, name) for name in spec.students}
    tree = spec.model_dump(mode="json")
    run.start, run.warm_start = run.start or uuid.uuid4().hex, dict(checked.champions)
    # Before MLflow is asked: a driver that dies over it leaves runs that the resumed one finds by this.
    records.save()
    runs, reason = records.calls.wait(
        partial(registry.start.remote, run.name, own, tree, lineage, run.mlflow, run.start),
        lambda trouble: report(Status("starting", more=trouble)),
    )
    if reason:
        raise RunError(f"the runs of {run.name} cannot be opened in MLflow: {reason}")
    run.mlflow = runs
    records.save()


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
    """An actor class to be started on this node: the packed corpus lies here, and other nodes come and go.

    One that dies is started again, and the calls that died with it are made again unless ``options`` decide otherwise.
    """
    placed = NodeAffinitySchedulingStrategy(here(), soft=False)
    options = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS, **options}
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=placed, **options)


def _start_stream(checked: Checked, run: Run, pace: Pace) -> ActorHandle:
    # It can be built again from what its readers ask for, who make their calls again themselves: they attach first.
    stream = _beside_us(Stream, max_concurrency=1000, max_task_retries=0)
    return stream.remote(checked.sized, str(run.folder), checked.teacher, checked.store, pace, checked.most)


def _jobs(checked: Checked, run: Run, actors: _Actors, batches: int) -> list[StudentJob]:
    family = checked.sized
    return [
        StudentJob(
            name=name,
            family=family,
            teacher=checked.teacher,
            student_dir=str(checked.student_dirs[name]) if name in checked.student_dirs else None,
            batches=batches,
            stream=actors.stream,
            board=actors.board,
            storage=str(run.folder),
            packing=checked.packing[name],
        )
        for name in checked.spec.students
    ]


def _distil(
    checked: Checked,
    run: Run,
    batches: Batches,
    actors: _Actors,
    records: Records,
    lineage: dict[str, str],
    report: Report,
    others: Callable[[], list[Need]],
) -> FamilyResult:
    """Train all students from one pass; register each as it finishes; one that fails harms no other."""
    spec = checked.spec
    actors.stream.start.remote()
    watch = Watch(actors.stream, actors.board, list(spec.students), spec.patience_s)
    unplaced = Unplaced(checked.sized, places_pending, alive_nodes)
    metrics = FamilyMetrics(spec, run.name)
    jobs = _jobs(checked, run, actors, batches.count)
    tasks = {actors.trainers.run.remote(job): job.name for job in jobs}
    champions = _champions(checked, run, actors.registry, jobs, records)
    ends = _Ends(checked, actors.board, records, lineage, tasks, champions)
    status = watch.look("distilling")
    try:
        while tasks or champions.busy:
            done = ends.wait()
            status = watch.look("distilling" if tasks else "registering", unplaced=unplaced.waiting)
            status = replace(status, more=records.calls.trouble)
            report(status)
            metrics.publish(status)
            records.log(watch.points)
            records.calls.look(idle=not tasks and not champions.refs)
            if status.stats is not None and status.stats.error and tasks:
                raise RunError(status.stats.error)
            give_back_places()
            actors.stream.beside.remote(others())
            unplaced.look([name for name in tasks.values() if has_no_rank(status.students[name].phase)])
            for ref in done:
                ends.take(ref)
            champions.look({name: student.phase for name, student in status.students.items()})
            # Until then nobody else, such as one more replica, is to take the place of a student.
            at_work = {*tasks.values(), *champions.busy}
            if over := [name for name in spec.students if name not in at_work]:
                actors.stream.done.remote(over)
    except BaseException as error:
        learning = [task for task, name in tasks.items() if status.students[name].phase in PUTS_AWAY]
        _hold(actors.stream, learning, report, error, spec.patience_s)
        _log_what_is_left(watch, records)
        raise
    finally:
        champions.close()
    status = _close(actors, watch, records, ends, report)
    stats = status.stats or StreamStats.unstarted(batches.count, None)
    result = FamilyResult(run, batches.facts, stats, ends.students, ends.failed, watch.curves, 0.0, dict(run.versions))
    result.champions, result.undecided = champions.found, champions.unknown
    result.unregistered, result.warnings = records.unregistered, records.warnings
    return result


def _close(actors: _Actors, watch: Watch, records: Records, ends: _Ends, report: Report) -> Status:
    """End the pass, then wait until MLflow has everything; the last status."""
    status = watch.look("registered")
    # Once more for what this look has posted itself.
    watch.look("registered", ask_stream=False)
    # Before MLflow is waited for, which may take long: the teacher gives its resources back.
    _end_stream(actors.stream, complete=bool(ends.students))
    ray.kill(actors.stream)
    waiting = replace(status, phase="registering")
    records.close(watch.points, list(ends.failed), lambda trouble: report(replace(waiting, more=trouble)))
    report(status)
    return status


class _Ends:
    """Processes how each student has ended: registers it, and has its champion measured in its place.

    Args:
        tasks: of the students that learn; those that have ended are taken out.

    Attributes:
        students: those that have ended well; ``failed`` holds the reasons of the others.
    """

    def __init__(
        self,
        checked: Checked,
        board: ActorHandle,
        records: Records,
        lineage: dict[str, str],
        tasks: dict[ray.ObjectRef, str],
        champions: Champions,
    ) -> None:
        self._checked, self._board, self._records, self._lineage = checked, board, records, lineage
        self._tasks, self._champions = tasks, champions
        self.students: dict[str, StudentResult] = {}
        self.failed: dict[str, str] = {}

    def wait(self) -> list[ray.ObjectRef]:
        """Wait a moment for a student or the measurement of a champion to end; also process what MLflow has answered.

        An answer of MLflow does not end the wait: each one is followed by the next call, such as that for the next
        points, and the loop would run as fast as MLflow answers.
        """
        done = wait_for([*self._tasks, *self._champions.refs], POLL_S)
        self._records.calls.take_ready()
        return done

    def take(self, ref: ray.ObjectRef) -> None:
        """A student or the measurement of a champion has ended.

        Raises:
            RunError: a student was stopped, because the pass is held.
        """
        if self._champions.take(ref):
            return
        name = self._tasks.pop(ref)
        try:
            self.students[name] = ray.get(ref)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, StoppedError):
                raise RunError(f"student {name}: {cause}; resume with --resume") from error
            self.failed[name] = first_line(error)
            self._board.phase.remote(name, "failed")
            return
        # Before the registry is busy with the new version for a while.
        self._champions.ask(name)
        self._records.register(self.students[name], {**self._lineage, **_own_lineage(self._checked, name)})


def _champions(
    checked: Checked, run: Run, registry: ActorHandle, jobs: list[StudentJob], records: Records
) -> Champions:
    """Looks after the champions of the students that promotion is still to be decided of."""
    undecided = [job for job in jobs if checked.spec.promotion is not None and job.name not in run.promotions]
    by_name = {job.name: job for job in undecided}
    return Champions(registry, checked.tracking_uri, by_name, run.versions, records.calls)


def _hold(
    stream: ActorHandle, tasks: list[ray.ObjectRef], report: Report, why: BaseException, patience_s: float
) -> None:
    """Have the students commit what they have learnt, because the run is to end; waits for that.

    Args:
        tasks: of the students that have learnt something.
        why: what ends the run. A person who ends it is kept waiting for ``HOLD_S`` only.
    """
    if not tasks:
        return
    by_hand = isinstance(why, KeyboardInterrupt)
    patience_s = HOLD_S if by_hand else patience_s
    more = "Ctrl-C again ends at once" if by_hand else str(why)
    report(Status("stopping: the students commit what they have learnt", more=more))
    try:
        ray.get(stream.hold.options(max_task_retries=1).remote(), timeout=min(HOLD_S, patience_s))
        ray.wait(tasks, num_returns=len(tasks), timeout=patience_s)
    except ray.exceptions.RayError as error:
        log.warning("the students continue from an earlier commit: %s", error)


def _log_what_is_left(watch: Watch, records: Records) -> None:
    """Begin to log what was learnt last. A resumed run logs what MLflow does not take now, from the run's folder."""
    with contextlib.suppress(RunError):  # why the run ends, once more
        watch.look("stopping", ask_stream=False)
    records.log(watch.points)


def _end_at_once(actors: _Actors) -> None:
    """End a run that cannot continue. A student that learnt on would get into the way of the resumed run."""
    ray.kill(actors.trainers)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actors.stream.stop.remote(), timeout=LAST_S)
    ray.kill(actors.stream)


def _report_the_end(registry: ActorHandle, run: Run, killed: bool) -> None:
    """Close the runs in MLflow of a family that did not finish; when MLflow is away, this does not wait for it.

    A student that is registered has finished.
    """
    registered = {name: run_id for name, run_id in run.mlflow.items() if name in run.versions}
    others = {name: run_id for name, run_id in run.mlflow.items() if name not in registered}
    try:
        calls = [registry.finish.remote(registered, []), registry.finish.remote(others, list(others), killed)]
        ray.get(calls, timeout=LAST_S)
    except ray.exceptions.RayError as error:
        log.warning("MLflow does not know that the run has ended: %s", error)


def _end_stream(stream: ActorHandle, complete: bool) -> None:
    """End the pass. A stream that dies over it is started again and asked once more; all that students need is done."""
    try:
        if complete:
            ray.get(stream.finish.options(max_task_retries=1).remote())
        ray.get(stream.stop.options(max_task_retries=1).remote())
    except ray.exceptions.RayError as error:
        log.warning("the stream failed at its end, so the store may not know the pass as complete: %s", error)
