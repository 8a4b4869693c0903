"""Has the present champions measured while a family still runs. Imports no torch: the driver holds it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import ray
from ray.actor import ActorHandle

from cluster.errors import first_line
from cluster.evaluate.figures import Champion
from cluster.registry import Calls
from cluster.students.job import StudentJob
from cluster.teacher.replica import is_loss

log = logging.getLogger(__name__)

# What a student does whose champion is being measured in its place.
MEASURING = "measuring the champion"
# A node that dies with the measuring takes the champion's chance with it as often as this.
TRIES = 3


@dataclass
class _Measuring:
    """One champion on its way. ``asked`` is when a place for it was asked for; None once it has one."""

    student: str
    version: int
    tries: int
    asked: float | None


class Champions:
    """For each student that has ended: finds its champion and has it measured in the place that has become free.

    Args:
        jobs: the students that promotion is to be decided of, by name.
        versions: what is registered of them already, by an earlier session of the run; may grow.
        calls: to the registry, made again while MLflow is away.

    Attributes:
        found: what is known by now, see :class:`~cluster.evaluate.result.FamilyResult`.
        unknown: students whose champion MLflow did not name, with the reason.
    """

    def __init__(
        self,
        registry: ActorHandle,
        tracking_uri: str,
        jobs: Mapping[str, StudentJob],
        versions: Mapping[str, int],
        calls: Calls,
    ) -> None:
        self._registry, self._tracking_uri, self._jobs, self._versions = registry, tracking_uri, jobs, versions
        self._calls = calls
        self.found: dict[str, Champion | None] = {}
        self.unknown: dict[str, str] = {}
        self._looked_up: set[str] = set()
        self._measured: dict[ray.ObjectRef, _Measuring] = {}

    @property
    def refs(self) -> list[ray.ObjectRef]:
        """The measurements that are waited for."""
        return list(self._measured)

    @property
    def busy(self) -> Collection[str]:
        """The students whose place is still needed."""
        return {*self._looked_up, *(each.student for each in self._measured.values())}

    def ask(self, student: str) -> None:
        """A student has ended well: look for its champion, unless nothing is to be decided of it."""
        if (job := self._jobs.get(student)) is not None:
            self._looked_up.add(student)
            call = partial(self._registry.champion.remote, job.family.model_name(student))
            self._calls.ask(call, partial(self._is, student), partial(self._is_unknown, student))

    def _is(self, student: str, version: int | None) -> None:
        """The registry has named a student's champion."""
        self._looked_up.discard(student)
        if version is None:
            self.found[student] = None
        elif version == self._versions.get(student):
            # Somebody has promoted it by hand, between two sessions of the run.
            self.found[student] = Champion(version, None, "it was made champion by hand")
        else:
            self._measure(student, version, 1)

    def _is_unknown(self, student: str, reason: str) -> None:
        self._looked_up.discard(student)
        log.warning("the champion of %s is not known: %s", student, reason)
        self.unknown[student] = reason

    def take(self, ref: ray.ObjectRef) -> bool:
        """Process a measurement that has ended; False where the result is of something else."""
        if ref not in self._measured:
            return False
        at = self._measured.pop(ref)
        self._jobs[at.student].board.phase.remote(at.student, "finished")
        try:
            self.found[at.student] = ray.get(ref)
        except ray.exceptions.RayError as error:
            if is_loss(error) and at.tries < TRIES:
                log.warning("the champion of %s is measured again: %s", at.student, error)
                self._measure(at.student, at.version, at.tries + 1)
            else:
                self._give_up(at, first_line(error))
        return True

    def look(self, phases: Mapping[str, str]) -> None:
        """Give up those that have had no place on the cluster for ``patience_s``.

        Args:
            phases: what each student does now, by the board.
        """
        for ref, at in list(self._measured.items()):
            patience_s = self._jobs[at.student].family.patience_s
            if phases.get(at.student) == MEASURING:
                at.asked = None
            elif at.asked is not None and time.monotonic() - at.asked > patience_s:
                del self._measured[ref]
                ray.cancel(ref, force=True)
                self._give_up(at, f"it has had no place on the cluster for patience_s {patience_s:g} s")

    def close(self) -> None:
        """Measure no more."""
        for ref in self._measured:
            ray.cancel(ref, force=True)
        self._looked_up, self._measured = set(), {}

    def _give_up(self, at: _Measuring, why: str) -> None:
        log.warning("champion v%d of %s cannot be measured: %s", at.version, at.student, why)
        self.found[at.student] = Champion(
            at.version, None, f"champion v{at.version} cannot be measured: {' '.join(why.split())}"
        )

    def _measure(self, student: str, version: int, tries: int) -> None:
        job = self._jobs[student]
        # Its process ends with it and gives back its memory, which others on the node need. It is tried again here,
        # where it is known whether it has a place.
        wanted = {"num_cpus": job.spec.cpus_per_rank, "num_gpus": job.spec.gpus_per_rank}
        task = ray.remote(**wanted, memory=job.spec.memory_per_rank, max_calls=1, max_retries=0)
        ref = task(_in_its_place).remote(job, job.family.model_name(student), version, self._tracking_uri)
        self._measured[ref] = _Measuring(student, version, tries, time.monotonic())


def _in_its_place(job: StudentJob, model: str, version: int, tracking_uri: str) -> Champion:
    """The task: says that it has a place, then measures."""
    job.board.phase.remote(job.name, MEASURING)
    from cluster.students.champion import measure_champion

    return measure_champion(job, model, version, tracking_uri)
