"""MLflow: runs, curves, registered models. Nothing else in Stillhouse knows MLflow's API."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from cluster.board import FAMILY, Point
from cluster.errors import RunError, UserError
from cluster.evaluate.gate import KEPT, PROMOTED, ROLLED_BACK, Verdict
from cluster.space import DISK_FULL

log = logging.getLogger(__name__)

R = TypeVar("R")

CHALLENGER, CHAMPION = "challenger", "champion"
# Tags: of a registered model its champions, the latest last; of a version and its run what became of it, and why.
CHAMPIONS, PROMOTION, REASON = "stillhouse.champions", "stillhouse.promotion", "stillhouse.promotion_reason"
PARENT = FAMILY
# How long MLflow may be away. Its own client gives up after some two minutes, and a database at once.
PATIENCE_S = 3600.0
# What MLflow calls an error that is not the caller's.
TRANSIENT = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
# What it calls a model, a version or a run that is not there.
MISSING = "RESOURCE_DOES_NOT_EXIST"


def _client(tracking_uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    return mlflow.MlflowClient(tracking_uri)


def _is_away(error: BaseException) -> bool:
    """Whether an error says that MLflow cannot be reached or has no room, rather than that it refuses."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return isinstance(error, ConnectionError) or getattr(error, "error_code", None) in TRANSIENT


def _patiently(work: Callable[[], R], patience_s: float = PATIENCE_S) -> R:
    """Do some work with MLflow, again and again while it is away: what it should know is late then, not lost."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_away),
        wait=tenacity.wait_exponential_jitter(multiplier=1.0, max=30.0),
        stop=tenacity.stop_after_delay(patience_s),
        before_sleep=tenacity.before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return retrying(work)


def code_version() -> str:
    """The package's version and, in a checkout, the commit it stands on."""
    version = importlib.metadata.version("stillhouse")
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{version}+{found.stdout.strip()}" if found.returncode == 0 else version


class Registry:
    """One family's runs. Used as a Ray actor, so that MLflow's start-up and uploads hold nobody up.

    Args:
        artifact_root: where a new experiment on a database keeps its artifacts; a tracking server decides itself.
    """

    def __init__(self, tracking_uri: str, experiment: str, artifact_root: str) -> None:
        # Its process is its own. Registering a student takes a core for seconds; those that still learn go first.
        os.nice(19)
        self._uri = tracking_uri
        self._client = _client(tracking_uri)
        self._models = Models(tracking_uri)
        root = None if tracking_uri.startswith("http") else f"{artifact_root}/{experiment}"
        self._experiment: str = _patiently(lambda: self._experiment_id(experiment, root))
        self._runs: dict[str, str] = {}

    def _experiment_id(self, name: str, root: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name, root))

    def start(
        self,
        run: str,
        students: Mapping[str, Mapping[str, str]],
        spec: Mapping[str, Any],
        tags: Mapping[str, str],
        known: Mapping[str, str],
    ) -> dict[str, str]:
        """Open the parent run and one child run per student, each with the resolved spec.

        Args:
            students: by name, each with the tags that only its own run gets.
            tags: that all runs get.
            known: run ids from an earlier session of the same run, which are opened again.

        Returns:
            Run ids: ``""`` for the parent, else by student.
        """
        if known:
            for run_id in known.values():
                _patiently(partial(self._client.update_run, run_id, status="RUNNING"))
            self._runs = dict(known)
            return self._runs
        parent = self._client.create_run(self._experiment, run_name=run, tags=dict(tags)).info.run_id
        self._runs = {PARENT: parent}
        self._client.log_dict(parent, dict(spec), "spec.json")
        for student, own in students.items():
            child_tags = {**tags, **own, "mlflow.parentRunId": parent, "stillhouse.student": student}
            child = self._client.create_run(self._experiment, run_name=f"{run}/{student}", tags=child_tags).info.run_id
            self._runs[student] = child
            self._client.log_dict(child, dict(spec), "spec.json")
            for key, value in _flat(spec["students"][student]):
                self._client.log_param(child, key, value)
        return self._runs

    def log(self, points: Iterable[Point]) -> None:
        """Add points to the curves of the students and the family; the step is the number of batches learnt."""
        from mlflow.entities import Metric

        by_student: dict[str, list[Any]] = {}
        for point in points:
            metrics = by_student.setdefault(point.student, [])
            at = int(point.at * 1000)
            metrics += [Metric(name, value, at, point.batch) for name, value in point.metrics.items()]
        for student, metrics in by_student.items():
            for start in range(0, len(metrics), 1000):  # MLflow takes at most 1,000 at a time
                part = metrics[start : start + 1000]
                # The same point again, with the same time, is the same row to MLflow.
                _patiently(partial(self._client.log_batch, self._runs[student], metrics=part))

    def summarise(self, student: str, metrics: Mapping[str, float]) -> None:
        """Final figures of one student."""
        for name, value in metrics.items():
            _patiently(partial(self._client.log_metric, self._runs[student], name, value))

    def register(self, student: str, name: str, model_dir: str, tags: Mapping[str, str]) -> int:
        """Log a model directory under the student's run, register it and point ``challenger`` at it.

        Returns:
            The new version's number.
        """
        version = _patiently(lambda: self._version(student, name, model_dir))
        for key, value in tags.items():
            _patiently(partial(self._client.set_model_version_tag, name, str(version), key, value))
        _patiently(partial(self._client.set_registered_model_alias, name, CHALLENGER, str(version)))
        return version

    def champion(self, name: str) -> int | None:
        """The version that is a registered model's champion; None where there is none."""
        standing = self._models.standing(name)
        return None if standing is None else standing.champion

    def _version(self, student: str, name: str, model_dir: str) -> int:
        """The number of the version that this student's run registered, now or in a try whose answer was lost."""
        import mlflow

        run_id = self._runs[student]
        if known := self._client.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
            return max(int(version.version) for version in known)
        with mlflow.start_run(run_id=run_id):
            info = mlflow.transformers.log_model(
                transformers_model=model_dir,
                name="model",
                task="text-generation",
                registered_model_name=name,
                # Named, because MLflow would otherwise import the model to find out, and wants torchvision for it.
                pip_requirements=[f"{p}=={importlib.metadata.version(p)}" for p in ("torch", "transformers")],
                await_registration_for=300,
            )
        return int(info.registered_model_version)

    def finish(self, failed: Iterable[str], killed: bool = False) -> None:
        """Close all runs: FINISHED, or FAILED where a student failed, or KILLED."""
        broken = set(failed)
        if broken:
            broken.add(PARENT)
        for student, run_id in self._runs.items():
            status = "KILLED" if killed else "FAILED" if student in broken else "FINISHED"
            # Whoever presses Ctrl-C does not wait for MLflow to come back.
            _patiently(partial(self._client.set_terminated, run_id, status), 0.0 if killed else PATIENCE_S)


class ChampionMovedError(RunError):
    """The champion is not the one that the new version was compared with."""


@dataclass(frozen=True)
class Standing:
    """Which versions of a registered model are what.

    Attributes:
        line: its champions, the latest last; empty before the first promotion.
    """

    champion: int | None
    challenger: int | None
    line: tuple[int, ...]


class Models:
    """Promotes versions of registered models, and takes that back.

    Args:
        patience_s: how long MLflow may be away; then a RunError says so.
    """

    def __init__(self, tracking_uri: str, patience_s: float = PATIENCE_S) -> None:
        self._client, self._where, self._patience_s = _client(tracking_uri), shown(tracking_uri), patience_s

    def _do(self, work: Callable[..., R], *arguments: str) -> R:
        try:
            return _patiently(partial(work, *arguments), self._patience_s)
        except Exception as error:
            if not _is_away(error):
                raise
            raise RunError(f"MLflow {self._where} does not answer: {str(error).splitlines()[0]}") from error

    def _if_there(self, work: Callable[..., R], *arguments: str) -> R | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._do(work, *arguments)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            return None

    def standing(self, name: str) -> Standing | None:
        """How a registered model stands; None where there is no such model."""
        # Not searched for: a search leaves out the aliases on SQLite.
        model = self._if_there(self._client.get_registered_model, name)
        if model is None:
            return None
        champion, challenger = (model.aliases.get(alias) for alias in (CHAMPION, CHALLENGER))
        line = tuple(int(version) for version in model.tags.get(CHAMPIONS, "").split(",") if version)
        return Standing(int(champion) if champion else None, int(challenger) if challenger else None, line)

    def known(self, name: str) -> Standing:
        """How a registered model stands that a user has named.

        Raises:
            UserError: there is no such model.
        """
        standing = self.standing(name)
        if standing is None:
            raise UserError(f"there is no registered model {name!r} in {self._where}; its name is FAMILY-STUDENT")
        return standing

    def verdict(self, name: str, version: int) -> Verdict | None:
        """What has become of a version, as :meth:`promote`, :meth:`keep` and :meth:`rollback` have left it."""
        tags = self._do(self._client.get_model_version, name, str(version)).tags
        return Verdict(tags[PROMOTION], tags.get(REASON, "")) if PROMOTION in tags else None

    def promote(self, name: str, version: int, why: str, expected: int | None) -> None:
        """Point ``champion`` at a version, which is no ``challenger`` any more. Once more does no more.

        Each step leaves what the next try needs, and the version's tag is the last. MLflow has no exchange in one step:
        somebody else who promotes in the same milliseconds is not noticed.

        Args:
            expected: the champion that the version was compared with; None where there was none.

        Raises:
            UserError: there is no such model or version.
            ChampionMovedError: another version is champion than ``expected``; nothing is changed.
        """
        now = self.known(name)
        if self._if_there(self._client.get_model_version, name, str(version)) is None:
            raise UserError(f"{name} has no version {version} in {self._where}")
        if now.champion not in (expected, version):
            there, then = (f"v{each}" if each else "none" for each in (now.champion, expected))
            raise ChampionMovedError(
                f"the champion is {there} now, not {then} as when v{version} was compared; promote it by hand if it is "
                f"better"
            )
        if now.champion != version:
            self._set_line(name, (*_up_to(now.line, expected), version))
            self._do(self._client.set_registered_model_alias, name, CHAMPION, str(version))
        if now.challenger == version:
            self._do(self._client.delete_registered_model_alias, name, CHALLENGER)
        self._record(name, version, Verdict(PROMOTED, why))

    def keep(self, name: str, version: int, why: str) -> None:
        """Record why a version stays what it is."""
        self._record(name, version, Verdict(KEPT, why))

    def rollback(self, name: str) -> tuple[int, int]:
        """Point ``champion`` at the version that was it before.

        Returns:
            The versions that it pointed at and points at now.

        Raises:
            UserError: no such model, no champion, or none before it that is still there.
        """
        now = self.known(name)
        if now.champion is None:
            raise UserError(f"{name} has no champion, so there is nothing to roll back; see `stillhouse promote`")
        earlier = _up_to(now.line, now.champion)[:-1]
        while earlier and not self._may_return(name, earlier[-1], now.champion):
            earlier = earlier[:-1]
        if not earlier:
            raise UserError(f"{name} had no champion before v{now.champion}, so there is nothing to roll back to")
        # The line first: a try that breaks off here is not taken for one that has done its work.
        self._set_line(name, earlier)
        self._do(self._client.set_registered_model_alias, name, CHAMPION, str(earlier[-1]))
        self._record(name, now.champion, Verdict(ROLLED_BACK, f"v{earlier[-1]} was put back in its place by hand"))
        return now.champion, earlier[-1]

    def _may_return(self, name: str, version: int, champion: int) -> bool:
        there = self._if_there(self._client.get_model_version, name, str(version)) is not None
        return there and version != champion

    def _set_line(self, name: str, line: Iterable[int]) -> None:
        self._do(self._client.set_registered_model_tag, name, CHAMPIONS, ",".join(map(str, line)))

    def _record(self, name: str, version: int, verdict: Verdict) -> None:
        run_id = self._do(self._client.get_model_version, name, str(version)).run_id
        tags = {REASON: verdict.reason, PROMOTION: verdict.outcome}
        if run_id and self._if_there(self._client.get_run, run_id) is not None:
            for key, value in tags.items():
                self._do(self._client.set_tag, run_id, key, value)
        for key, value in tags.items():
            self._do(self._client.set_model_version_tag, name, str(version), key, value)


def _up_to(line: tuple[int, ...], champion: int | None) -> tuple[int, ...]:
    """A line of champions that ends with this one: what was written behind it is of a try that broke off, or undone.

    One that is not in it was made champion past us, and comes at its end.
    """
    if champion is None:
        return line
    if champion not in line:
        return (*line, champion)
    return line[: len(line) - line[::-1].index(champion)]


def attach_report(tracking_uri: str, run_id: str, path: Path) -> None:
    """Keep the family's report with its parent run."""
    _client(tracking_uri).log_artifact(run_id, str(path))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as dotted names and values."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return rows


def champion_of(name: str, tracking_uri: str) -> int | None:
    """The version of a registered model that is its champion; none where there is no such model or no champion yet.

    Raises:
        RunError: the registry cannot be reached, or refuses to say.
    """
    # Of a database that the first run will make; asking would make it.
    kind, _, file = tracking_uri.partition(":///")
    if kind.startswith("sqlite") and not Path(file.partition("?")[0]).exists():
        return None
    try:
        version = _client(tracking_uri).get_registered_model(name).aliases.get(CHAMPION)
    except ImportError:
        raise
    except Exception as error:  # every database's driver raises its own
        if getattr(error, "error_code", None) == MISSING:
            return None
        where = shown(tracking_uri)
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(tracking_uri, where)
        raise RunError(f"the registry {where} does not say which {name} is the champion: {reason}") from error
    return None if version is None else int(version)


def fetch_model(uri: str, tracking_uri: str, put: Path | None = None, patience_s: float = 0.0) -> Path:
    """Local Hugging Face directory of a registered model.

    Args:
        uri: ``models:/name@alias`` or ``models:/name/version``.
        put: an empty folder for its files; without it they stay where MLflow has them, or where it puts downloads.
        patience_s: how long MLflow may be away.

    Raises:
        UserError: no such model, version or alias.
        RunError: the registry knows it, but it holds no transformers model, or its files are gone.
    """
    _client(tracking_uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        download = partial(mlflow.artifacts.download_artifacts, artifact_uri=uri, dst_path=put and str(put))
        folder = Path(_patiently(download, patience_s))
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{uri}: not in the registry {shown(tracking_uri)}: {reason}") from None
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    if not any(folder.iterdir()):
        raise RunError(f"{uri}: registered, but its files are gone")
    raise RunError(f"{uri}: registered, but it is not a transformers model")


def shown(uri: str) -> str:
    """A tracking URI without a user, a password or parameters, which may hold one too."""
    scheme, _, rest = uri.partition("://")
    if scheme.startswith("sqlite"):
        return uri
    # To the last @: one in the path costs the host's name, a password with a slash in it would be shown otherwise.
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
