"""MLflow away for a minute in the middle of a run: metrics and models come late, and all of them come."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.specfile import load_spec
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
