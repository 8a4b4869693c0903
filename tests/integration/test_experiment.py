"""An experiment on live traffic from start to end: two registered students, a teacher that scores, one decision."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from typer.testing import CliRunner

from cluster.errors import RunError
from cluster.registry import Registry, champion_of, fetch_model
from jobs.cli.main import app
from jobs.endpoints import Administration
from serving.deploy import Endpoint, deploy
from serving.spec import checked
from tests.integration.test_traffic import until
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]
LAYERS = {"fast": 1, "slow": 24}


@pytest.fixture(scope="module")
def tracking_uri(ray_cluster: None, empty_registry: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with both students, the slow one its model's champion."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{shutil.copyfile(empty_registry, folder / 'mlflow.db')}"
    # An actor, as in a family: it makes its process the nicest of all.
    registry: Any = ray.remote(Registry).options(num_cpus=0).remote(uri, "try", str(folder / "artifacts"))
    nothing: dict[str, dict[str, str]] = {name: {} for name in LAYERS}
    runs = ray.get(registry.start.remote("try", nothing, {"students": nothing}, {}, {}, "try"))
    for name, layers in LAYERS.items():
        model = write_tiny_model(folder / name, layers=layers, padded_to=300)
        ray.get(registry.register.remote(runs[name], f"try-{name}", str(model), {}, {}, 0.0))
    ray.kill(registry)
    return uri


@pytest.fixture(scope="module")
def endpoint(tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    arms = {
        name: {"source": f"models:/try-{name}@challenger", "dtype": "float32", "cpus": 0.3, "slots": 4}
        for name in LAYERS
    }
    state = tmp_path_factory.mktemp("state")
    with deploy(checked(name="front", port=0, arms=arms, state=state), tracking_uri) as running:
        yield running


@contextmanager
def traffic(endpoint: Endpoint) -> Iterator[None]:
    """Two callers who ask one question after the other, for as long as the block lasts."""
    ended = threading.Event()

    async def caller() -> None:
        async with httpx.AsyncClient(base_url=endpoint.url, trust_env=False, timeout=60) as http:
            while not ended.is_set():
                body = {"model": "front", "prompt": "the still house", "max_tokens": 8}
                (await http.post("/v1/completions", json=body)).raise_for_status()

    async def callers() -> None:
        await asyncio.gather(caller(), caller())

    thread = threading.Thread(target=lambda: asyncio.run(callers()))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def stillhouse(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def status(endpoint: Endpoint) -> dict[str, Any]:
    shown: dict[str, Any] = Administration(endpoint.url).ask("GET", "experiment")
    return shown


def write_spec(folder: Path, tiny_teacher: Path, **fields: Any) -> Path:
    spec = {
        "name": "first",
        "control": "slow",
        "candidates": ["fast"],
        "gain": 0.1,
        "min_requests": 60,
        "sample": 0.2,
        "teacher": {"model": str(tiny_teacher), "dtype": "float32", "cpus_per_shard": 0.3},
        "guards": {"kl": 50.0},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**spec, **fields}))
    return path


def test_the_faster_student_is_promoted_with_its_evidence(
    endpoint: Endpoint, tracking_uri: str, tmp_path: Path
) -> None:
    teacher = write_tiny_model(tmp_path / "teacher", layers=2, padded_to=300)
    begun = stillhouse("ab", "start", endpoint.url, str(write_spec(tmp_path, teacher)))
    assert begun.exit_code == 0, begun.output
    assert "fast against slow" in begun.output
    with traffic(endpoint):
        until(lambda: status(endpoint)["arms"]["fast"]["quality"] is not None, "a scored answer", 120)
        until(lambda: status(endpoint)["ended"] is not None, "a decision", 300)
        until(lambda: endpoint.ask("traffic")["weights"] == {"fast": 2.0, "slow": 0.0}, "the traffic", 20)
    shown = status(endpoint)
    assert shown["arms"]["fast"]["state"] == "winner"
    low, high = shown["comparisons"]["fast"]["p50"]["interval"]
    assert 0.1 < low < high <= 1
    decision = next(event for event in shown["events"] if event["what"] == "decision")
    assert decision["evidence"]["outcome"] == "promote" and "fast is promoted" in decision["text"]
    quality = shown["arms"]["slow"]["quality"]
    assert quality["answers"] > 0 and quality["kl"] > 0 and 0 <= quality["agreement"] <= 1
    # The alias, and what its version says of itself.
    until(lambda: champion_of("try-fast", tracking_uri) == 1, "the alias", 60)
    until(lambda: any(event["what"] == "alias" for event in status(endpoint)["events"]), "the note of it", 20)
    table = stillhouse("ab", "status", endpoint.url).output
    assert "winner" in table and "is promoted" in table
    page = tmp_path / "report.html"
    assert stillhouse("ab", "report", endpoint.url, "-o", str(page)).exit_code == 0
    assert page.read_text().count("<svg") >= 5 and "fast is promoted" in page.read_text()


def test_a_candidate_that_is_surely_slower_is_rolled_back(endpoint: Endpoint, tmp_path: Path) -> None:
    spec = write_spec(
        tmp_path, tmp_path, name="second", control="fast", candidates=["slow"], sample=0.0, guards={"slower": 0.1}
    )
    tree = yaml.safe_load(spec.read_text())
    del tree["teacher"]
    spec.write_text(yaml.safe_dump(tree))
    assert stillhouse("ab", "start", endpoint.url, str(spec)).exit_code == 0
    assert endpoint.ask("traffic")["weights"] == {"fast": 1.0, "slow": 1.0}
    with traffic(endpoint):
        until(lambda: status(endpoint)["ended"] is not None, "a decision", 300)
        until(lambda: endpoint.ask("traffic")["weights"] == {"fast": 2.0, "slow": 0.0}, "the traffic", 20)
    assert status(endpoint)["arms"]["slow"]["state"] == "rolled_back"


def test_an_experiment_is_stopped_by_hand(endpoint: Endpoint, tmp_path: Path) -> None:
    tree = {"name": "third", "control": "fast", "candidates": ["slow"], "traffic": {"fast": 3, "slow": 1}}
    spec = tmp_path / "experiment.yaml"
    spec.write_text(yaml.safe_dump(tree))
    assert stillhouse("ab", "start", endpoint.url, str(spec)).exit_code == 0
    again = stillhouse("ab", "start", endpoint.url, str(spec))
    assert "experiment 'third' is under way" in str(again.exception)
    assert stillhouse("ab", "stop", endpoint.url).exit_code == 0
    assert endpoint.ask("traffic")["weights"] == {"fast": 4.0, "slow": 0.0}
    assert "no experiment is under way" in str(stillhouse("ab", "stop", endpoint.url).exception)


def test_weights_that_were_tampered_with_are_not_served(endpoint: Endpoint, tracking_uri: str) -> None:
    """The files of a registered version are held against the hash of its registration before they are loaded."""
    folder = fetch_model("models:/try-slow/1", tracking_uri)
    (weights,) = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(RunError, match="its weights are not those that were registered"):
            endpoint.roll("slow", "models:/try-slow/1")
    finally:
        weights.write_bytes(whole)
    endpoint.roll("slow", "models:/try-slow/1")
