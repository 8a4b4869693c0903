"""One family's runs and their curves, and the registration of its students."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.board import FAMILY, Point
from cluster.registry.client import CHALLENGER, EXISTS, RETRIES, client_of, experiment_id_of, one_try, patiently
from cluster.registry.files import local_folder, share_weights
from cluster.registry.models import WEIGHTS, Models, weights_digest

PARENT = FAMILY
# Tag of all runs that one start of a family made.
START = "stillhouse.start"
# MLflow takes no more metrics than this at a time.
MOST_METRICS = 1000
# How long the report waits for MLflow: it can be made again.
REPORT_PATIENCE_S = 60.0


def code_version() -> str:
    """The package's version and, in a checkout, the commit it stands on."""
    version = importlib.metadata.version("stillhouse")
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{version}+{found.stdout.strip()}" if found.returncode == 0 else version


class Registry:
    """MLflow as one family uses it: a Ray actor, so that MLflow's start-up and uploads block no caller.

    Each method tries once and may be called again with the same arguments, also after this actor died over it: what was
    done before is found and not done twice. The actor itself remembers nothing, so it may be restarted.

    Args:
        artifact_root: where a new experiment on a database keeps its artifacts; a tracking server decides itself.

    Raises:
        AwayError: from every method, when MLflow is away.
        RefusedError: from every method, when MLflow refuses.
        UserError: from :meth:`start`, when the experiment is deleted.
    """

    def __init__(self, tracking_uri: str, experiment: str, artifact_root: str) -> None:
        # Its process is its own. Registering a student takes a core for seconds; those that still learn go first.
        os.nice(19)
        # The caller retries, and reports that MLflow is away; its own client would be silent for minutes.
        os.environ.setdefault(RETRIES, "2")
        self._uri, self._experiment, self._artifact_root = tracking_uri, experiment, artifact_root

    def _client(self) -> Any:
        # Not kept: a client whose first connection failed would have to be made again anyway.
        return client_of(self._uri)

    def _experiment_id(self) -> str:
        client, name = self._client(), self._experiment
        root = None if self._uri.startswith("http") else f"{self._artifact_root}/{name}"
        return experiment_id_of(client, self._uri, name) or str(client.create_experiment(name, root))

    def start(
        self,
        run: str,
        students: Mapping[str, Mapping[str, str]],
        spec: Mapping[str, Any],
        tags: Mapping[str, str],
        known: Mapping[str, str],
        key: str,
    ) -> dict[str, str]:
        """Open the parent run and one child run per student, each with the resolved spec.

        Args:
            students: by name, each with the tags that only its own run gets.
            tags: that all runs get.
            known: run ids from an earlier session of the same run, which are opened again.
            key: tells the runs of this start from all others, so that a second try finds what the first one made.

        Returns:
            Run ids: ``""`` for the parent, else by student.
        """
        with one_try(self._uri):
            client = self._client()
            if known:
                for run_id in known.values():
                    client.update_run(run_id, status="RUNNING")
                return dict(known)
            experiment, tags = self._experiment_id(), {**tags, START: key}
            made = client.search_runs([experiment], filter_string=f"tags.`{START}` = '{key}'")
            runs = {each.data.tags.get("stillhouse.student", PARENT): each.info.run_id for each in made}
            if PARENT not in runs:
                runs[PARENT] = client.create_run(experiment, run_name=run, tags=dict(tags)).info.run_id
            client.log_dict(runs[PARENT], dict(spec), "spec.json")
            for student, own in students.items():
                if student not in runs:
                    mark = {"mlflow.parentRunId": runs[PARENT], "stillhouse.student": student}
                    child = client.create_run(experiment, run_name=f"{run}/{student}", tags={**tags, **own, **mark})
                    runs[student] = child.info.run_id
                client.log_dict(runs[student], dict(spec), "spec.json")
                for name, value in _flat(spec["students"][student]):
                    client.log_param(runs[student], name, value)
            return runs

    def log(self, run_id: str, points: Iterable[Point]) -> None:
        """Add points to the curves of one run; the step is the number of batches learnt."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(point.at * 1000), point.batch)
            for point in points
            for name, value in point.metrics.items()
        ]
        with one_try(self._uri):
            client = self._client()
            for start in range(0, len(metrics), MOST_METRICS):
                # The same point again, with the same time, is the same row to MLflow.
                client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])

    def register(
        self, run_id: str, name: str, model_dir: str, tags: Mapping[str, str], figures: Mapping[str, float], at: float
    ) -> int:
        """Log a student's final figures and its model under its run, register it and point ``challenger`` at it.

        Where MLflow keeps the model in this file system, the weights in ``model_dir`` become hard links to it.

        ``challenger`` stays where it is at a later version, and a version that is or was champion does not become it.

        Args:
            at: when the figures were measured, in seconds since 1970.

        Returns:
            The new version's number.
        """
        with one_try(self._uri):
            client = self._client()
            _log_figures(client, run_id, figures, at)
            version = self._version(client, run_id, name, model_dir)
            digest = weights_digest(Path(model_dir))
            for key, value in {**tags, WEIGHTS: digest}.items():
                client.set_model_version_tag(name, str(version), key, value)
            registered = local_folder(client.get_model_version_download_uri(name, str(version)))
            if registered is not None:
                share_weights(Path(model_dir), registered / "model", digest)
            # A try that comes late finds later versions: a challenger is never moved back, nor a champion made one.
            standing = Models(self._uri, patience_s=0.0).known(name)
            if version not in (standing.champion, *standing.line) and version > (standing.challenger or 0):
                client.set_registered_model_alias(name, CHALLENGER, str(version))
            return version

    def champion(self, name: str) -> int | None:
        """The version that is a registered model's champion; None where there is none."""
        with one_try(self._uri):
            standing = Models(self._uri, patience_s=0.0).standing(name)
        return None if standing is None else standing.champion

    def _version(self, client: Any, run_id: str, name: str, model_dir: str) -> int:
        """The number of the version that this student's run registered, now or in a try whose answer was lost."""
        import mlflow

        if known := client.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
            return max(int(version.version) for version in known)
        self._make_model(client, name)
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

    def _make_model(self, client: Any, name: str) -> None:
        """Create the registered model if there is none. Where a prompt has its name, MLflow would add to the prompt."""
        from mlflow.exceptions import MlflowException

        if Models(self._uri, patience_s=0.0).standing(name) is not None:
            return
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            # Another family may have been faster.
            if error.error_code != EXISTS or Models(self._uri, patience_s=0.0).standing(name) is None:
                raise

    def finish(self, runs: Mapping[str, str], failed: Iterable[str], killed: bool = False) -> None:
        """Close all runs: FINISHED, or FAILED where a student failed, or KILLED.

        Args:
            runs: run ids, as :meth:`start` returned them.
        """
        broken = set(failed)
        if broken:
            broken.add(PARENT)
        with one_try(self._uri):
            for student, run_id in runs.items():
                status = "KILLED" if killed else "FAILED" if student in broken else "FINISHED"
                self._client().set_terminated(run_id, status)


def attach_report(tracking_uri: str, run_id: str, path: Path) -> None:
    """Keep the family's report with its parent run.

    Raises:
        AwayError: MLflow has been away for a minute.
        RefusedError: MLflow refuses.
    """
    with one_try(tracking_uri):
        patiently(lambda: client_of(tracking_uri).log_artifact(run_id, str(path)), REPORT_PATIENCE_S)


def log_figures(tracking_uri: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Log what was measured after a family's runs were closed, such as latencies.

    Args:
        figures: names and values, by run id.

    Raises:
        AwayError: MLflow has been away for a minute.
        RefusedError: MLflow refuses.
    """
    at = time.time()

    def log() -> None:
        client = client_of(tracking_uri)
        for run_id, values in figures.items():
            _log_figures(client, run_id, values, at)

    with one_try(tracking_uri):
        patiently(log, REPORT_PATIENCE_S)


def _log_figures(client: Any, run_id: str, figures: Mapping[str, float], at: float) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(key, value, int(at * 1000), 0) for key, value in figures.items()])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested mapping as dotted names and values."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return rows
