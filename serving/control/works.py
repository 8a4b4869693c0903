"""What the control has others do: start and end arms, move aliases, have answers scored. None of it blocks its loop."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ReplicaState

from cluster.errors import RunError, StillhouseError, first_line
from cluster.spec import TeacherSpec
from serving.experiment import Quality
from serving.launch import ARM_DEPLOYMENT, arm_of, launch_arm, route_of
from serving.records import Record
from serving.spec import EndpointSpec

_PROBE_S = 30.0
# Answers that may wait for the teacher; more are left out, for the sample is one all the same.
_MOST_WAITING = 64

logger = logging.getLogger("ray.serve")


class Works:
    """The control's hands. Made in the process that deploys, used in the control's.

    Args:
        tracking_uri: where the registry is.
        secret: what an arm's process wants to hear from a door.
    """

    def __init__(self, spec: EndpointSpec, tracking_uri: str | None, secret: str) -> None:
        self._spec, self._tracking_uri, self._secret = spec, tracking_uri, secret
        # This start of the endpoint: the next one has the same names for other applications.
        self.deployment = secrets.token_hex(8)
        self._background: set[asyncio.Task[None]] = set()
        self._judge: Any = None
        self._judging = 0
        self._scored: list[Quality] = []

    def routes(self, kept: Mapping[str, str]) -> dict[str, str]:
        """Of every arm the application that answers for it now: the kept one, or else the newest that runs.

        The newest may be one that a roll had started, and that was never let in.
        """
        found: dict[str, tuple[int, str]] = {}
        there = self._applications()
        for name, (arm, number, status) in there.items():
            if status == "RUNNING":
                found[arm] = max(found.get(arm, (0, "")), (number, name))
        newest = {arm: route for arm, (_, route) in found.items()}
        return newest | {arm: route for arm, route in kept.items() if route in there}

    def strays(self, routes: Mapping[str, str]) -> list[str]:
        """Applications of the arms to which nobody is sent: a roll was cut off when its control died."""
        return [name for name, (arm, _, _) in self._applications().items() if routes.get(arm, name) != name]

    def _applications(self) -> dict[str, tuple[str, int, str]]:
        """Of every application of an arm that is not going: its arm, its number and its status."""
        found = {}
        for name, app in serve.status().applications.items():
            which, status = arm_of(self._spec.name, name), str(app.status).rpartition(".")[2]
            if which is not None and which[0] in self._spec.arms and status != "DELETING":
                found[name] = (*which, status)
        return found

    async def start_arm(self, arm: str, source: str) -> tuple[str, str]:
        """Start another process for an arm, with another model.

        Returns:
            The application, which answers and is warm, and the source, with a version where an alias was given.

        Raises:
            StillhouseError: there is no such model, or it does not start. Nothing of it is left.
        """
        taken = [arm_of(self._spec.name, name) for name in (await asyncio.to_thread(serve.status)).applications]
        number = max((which[1] for which in taken if which and which[0] == arm), default=0) + 1
        route = route_of(self._spec.name, arm, number)
        try:
            source = await launch_arm.remote(self._spec, arm, source, route, self._tracking_uri, self._secret)
        except Exception as error:
            raise _plain(error) from error
        return route, source

    async def end_arm(self, route: str) -> None:
        """End an arm's processes; each answers what it has taken in."""
        await asyncio.to_thread(serve.delete, route, _blocking=False)

    async def dead_arms(self, routes: Mapping[str, str]) -> dict[str, str]:
        """The arms of which no process runs, and that so."""
        applications = (await asyncio.to_thread(serve.status)).applications
        dead = {}
        for arm, route in routes.items():
            app = applications.get(route)
            deployment = app.deployments.get(ARM_DEPLOYMENT) if app else None
            if deployment is None or not deployment.replica_states.get(ReplicaState.RUNNING, 0):
                dead[arm] = "no process of it runs"
        return dead

    async def answers(self, route: str) -> bool:
        """Whether an arm generates a token in good time."""
        handle = serve.get_deployment_handle(ARM_DEPLOYMENT, route, _check_exists=False)
        try:
            await asyncio.wait_for(handle.probe.remote(), _PROBE_S)
        except Exception as error:
            logger.warning("%s does not answer: %s", route, first_line(error))
            return False
        return True

    async def promote(self, arm: str, source: str, alias: str, reason: str) -> str:
        """Point the registry's alias at an arm's version; what was done, in a sentence. Once more does no more."""
        if not source.startswith("models:/") or self._tracking_uri is None:
            return f"{arm} is {source}, no registered model: there is no alias to move"
        try:
            name, number = await _point_alias.remote(source, alias, reason, self._tracking_uri)
        except Exception as error:
            logger.exception("the alias was not moved")
            return f"the alias {alias!r} could not be moved to {source}: {first_line(error)}"
        return f"{name} v{number} is {alias!r} now"

    # ---- quality ----

    async def start_judge(self, teacher: TeacherSpec, routes: Mapping[str, str]) -> None:
        """Have the teacher ready to score answers of these arms.

        Raises:
            RunError: it does not start.
        """
        # Here, and not above: it brings torch, which a control without a judge can do without.
        from serving.control.judge import Judge

        self.end_judge()
        self._judge = judge = ray.remote(Judge).options(num_cpus=0).remote(teacher, dict(routes), self._tracking_uri)
        try:
            await judge.start.remote()
        except BaseException as error:
            if self._judge is judge:
                self.end_judge()
            if not isinstance(error, Exception):  # nobody waits for it any more
                raise
            raise RunError(f"the teacher that scores a sample does not start: {first_line(error)}") from error

    @property
    def has_judge(self) -> bool:
        """Whether a teacher scores answers, or is about to."""
        return self._judge is not None

    def judge(self, records: Sequence[Record]) -> None:
        """Have answers scored; returns at once."""
        for record in records:
            if self._judge is not None and self._judging < _MOST_WAITING:
                self._judging += 1
                self._do(self._score(record, self._judge))

    async def _score(self, record: Record, judge: Any) -> None:
        try:
            quality = await judge.score.remote(record.arm, record.at, record.sampled)
            # What comes late is of another experiment than the one that would take it now.
            if quality is not None and judge is self._judge:
                self._scored.append(quality)
        except Exception as error:
            # One that was let go has nothing to say any more, which is no news.
            if judge is self._judge:
                logger.warning("an answer of %s could not be scored: %s", record.arm, first_line(error), exc_info=True)
        finally:
            self._judging -= 1

    async def scored(self) -> list[Quality]:
        """What has been scored since the last time."""
        scored, self._scored = self._scored, []
        return scored

    def end_judge(self) -> None:
        """Let the teacher go, with what it has said that nobody has asked for."""
        self._scored = []
        if self._judge is not None:
            ray.kill(self._judge)
            self._judge = None

    def environment(self, sources: Mapping[str, str]) -> dict[str, str]:
        """What the experiment runs on, for its record."""
        libraries = {name: version(name) for name in ("stillhouse", "ray", "torch", "transformers")}
        machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"
        arms = {f"arm {name}": f"{source} on {self._spec.arms[name].engine}" for name, source in sources.items()}
        return {"machine": machine, "python": platform.python_version(), **libraries, **arms}

    def _do(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


@ray.remote(num_cpus=0, max_retries=0)
def _point_alias(source: str, alias: str, reason: str, tracking_uri: str) -> tuple[str, int]:
    """In a process of its own: MLflow takes seconds to import."""
    from cluster.registry import Models

    models = Models(tracking_uri)
    name, number = models.resolve(source)
    models.point(name, alias, number, reason)
    return name, number


def _plain(error: BaseException) -> StillhouseError:
    cause = getattr(error, "cause", None) or error
    return cause if isinstance(cause, StillhouseError) else RunError(first_line(error))
