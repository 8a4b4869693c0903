"""MLflow away for a minute in the middle of a run: metrics and models come late, and all of them come."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.specfile import load_spec
from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_learnt_once, assert_same_weights, weights
from tests.chaos.faults import Fault, Faults
from tests.chaos.report import ChaosReport
from tests.integration.conftest import free_port, write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
AWAY_S = 60.0
ONE = {"alone": STUDENTS["alone"]}


class Server:
    """A real MLflow server on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return
            except OSError:
                assert time.monotonic() < deadline, (self._folder / "server.log").read_text()[-2000:]
                time.sleep(0.5)

    def kill(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            process.kill()
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "mlflow"
    folder.mkdir()
    made = Server(folder)
    made.start()
    made.wait()
    yield made
    made.kill()


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
