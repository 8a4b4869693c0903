"""One family's runs and their curves, and the registration of its students."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cluster.board import FAMILY, Point
from cluster.registry.client import CHALLENGER, PATIENCE_S, client_of, patiently
from cluster.registry.models import WEIGHTS, Models, weights_digest

PARENT = FAMILY


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
        self._client = client_of(tracking_uri)
        self._models = Models(tracking_uri)
        root = None if tracking_uri.startswith("http") else f"{artifact_root}/{experiment}"
        self._experiment: str = patiently(lambda: self._experiment_id(experiment, root))
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
                patiently(partial(self._client.update_run, run_id, status="RUNNING"))
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
                patiently(partial(self._client.log_batch, self._runs[student], metrics=part))

    def summarise(self, student: str, metrics: Mapping[str, float]) -> None:
        """Final figures of one student."""
        for name, value in metrics.items():
            patiently(partial(self._client.log_metric, self._runs[student], name, value))

    def register(self, student: str, name: str, model_dir: str, tags: Mapping[str, str]) -> int:
        """Log a model directory under the student's run, register it and point ``challenger`` at it.

        Returns:
            The new version's number.
        """
        version = patiently(lambda: self._version(student, name, model_dir))
        for key, value in {**tags, WEIGHTS: weights_digest(Path(model_dir))}.items():
            patiently(partial(self._client.set_model_version_tag, name, str(version), key, value))
        patiently(partial(self._client.set_registered_model_alias, name, CHALLENGER, str(version)))
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
            patiently(partial(self._client.set_terminated, run_id, status), 0.0 if killed else PATIENCE_S)


def attach_report(tracking_uri: str, run_id: str, path: Path) -> None:
    """Keep the family's report with its parent run."""
    client_of(tracking_uri).log_artifact(run_id, str(path))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as dotted names and values."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return rows
