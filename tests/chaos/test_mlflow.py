"""MLflow away in the middle of a run, for a minute or for good: metrics and models come late, and all of them come."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cluster import records
from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.specfile import load_spec
from cluster.watch import Status
from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_learnt_once, assert_same_weights, weights
from tests.chaos.faults import Fault, Faults
from tests.chaos.report import ChaosReport
from tests.integration.mlflow_server import Server, running
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
AWAY_S = 60.0
ONE = {"alone": STUDENTS["alone"]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "mlflow") as made:
        yield made


def test_mlflow_is_away_for_a_minute(
    tiny: Path, tmp_path: Path, server: Server, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    back = threading.Timer(AWAY_S, server.start)

    def cut_off() -> bool:
        server.kill()
        back.start()
        return True

    faults = Faults([Fault("MLflow away for a minute", dice.randrange(1, BATCHES), cut_off)])
    checked = preflight(load_spec(write_family(tmp_path, tiny, ONE, tracking={"uri": server.uri}, **FAMILY)))
    run = open_run(checked.spec, False)
    with report.disturbing(run.folder, ONE, BATCHES, faults):
        result = run_family(checked, run, faults)
        assert faults.done
        assert result.failed == {}
        assert_learnt_once(result, checked.spec, "alone")
        # Students share batches and labels and nothing else: what it learns beside another is what it learns alone.
        assert_same_weights(weights(result, "alone"), undisturbed_pair["alone"], "alone")
        client = mlflow.MlflowClient(server.uri)
        history = client.get_metric_history(result.run.mlflow["alone"], "loss")
        assert [metric.step for metric in history] == list(range(1, BATCHES + 1))
        version = client.get_model_version_by_alias("tiny-alone", "challenger")
        assert int(version.version) == result.versions["alone"] == 1
        assert client.get_run(result.run.mlflow["alone"]).data.metrics["kl_after"] > 0
        assert client.get_run(result.run.mlflow[""]).info.status == "FINISHED"


def test_mlflow_stays_away_and_the_resumed_run_brings_what_is_missing(
    tiny: Path,
    tmp_path: Path,
    server: Server,
    undisturbed_pair: Any,
    dice: random.Random,
    report: ChaosReport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "PATIENCE_S", 10.0)

    def cut_off() -> bool:
        server.kill()
        return True

    shown: list[str] = []
    faults = Faults([Fault("MLflow away until the run is resumed", dice.randrange(1, BATCHES), cut_off)])

    def see(status: Status) -> None:
        shown.append(status.more)
        faults(status)

    given = {**FAMILY, "tracking": {"uri": server.uri}, "patience_s": 10.0}
    checked = preflight(load_spec(write_family(tmp_path, tiny, ONE, **given)))
    run = open_run(checked.spec, False)
    with report.disturbing(run.folder, ONE, BATCHES, faults):
        result = run_family(checked, run, see)
        assert faults.done
        assert any(line.startswith("waiting for MLflow since ") for line in shown)
        assert (result.failed, result.versions) == ({}, {})
        assert result.students["alone"].model_dir in result.unregistered["alone"]
        assert any("metrics of student alone are not in MLflow" in line for line in result.warnings)
        assert_same_weights(weights(result, "alone"), undisturbed_pair["alone"], "alone")

        server.start()
        server.wait()
        again = run_family(checked, open_run(checked.spec, True), see)
        assert (again.failed, again.unregistered, again.warnings) == ({}, {}, [])
        assert_learnt_once(again, checked.spec, "alone")
        client = mlflow.MlflowClient(server.uri)
        history = client.get_metric_history(again.run.mlflow["alone"], "loss")
        assert [metric.step for metric in history] == list(range(1, BATCHES + 1))
        (version,) = client.search_model_versions("name='tiny-alone'")
        assert int(version.version) == again.versions["alone"]
        assert client.get_run(again.run.mlflow[""]).data.metrics["alone.kl_after"] > 0
        assert client.get_run(again.run.mlflow[""]).info.status == "FINISHED"
