"""Models of an MLflow server are fetched to where every node sees them, once."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from cluster.errors import RunError
from cluster.registry import fetch_model
from tests.integration.mlflow_server import Server, running

pytestmark = pytest.mark.integration
NAME = "tried-small"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("registry") / "mlflow") as made:
        yield made


def register(server: Server, model: Path | None) -> int:
    """A version whose files, if it has any, the server keeps."""
    client = mlflow.MlflowClient(server.uri)
    run = client.create_run("0")
    if model is not None:
        client.log_artifacts(run.info.run_id, str(model), "model")
    if not client.search_registered_models(f"name='{NAME}'"):
        client.create_registered_model(NAME)
    version = client.create_model_version(NAME, f"{run.info.artifact_uri}/model", run.info.run_id).version
    client.set_registered_model_alias(NAME, "challenger", version)
    return int(version)


def test_a_version_is_fetched_once_to_below_the_home(
    server: Server, tiny_teacher: Path, stillhouse_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register(server, tiny_teacher)
    with ThreadPoolExecutor(4) as pool:  # as the nodes of a cluster may all at once
        found = set(pool.map(lambda _: fetch_model(f"models:/{NAME}@challenger", server.uri), range(4)))
    (folder,) = found
    assert folder.is_relative_to(stillhouse_home / "models")
    assert (folder / "model.safetensors").read_bytes() == (tiny_teacher / "model.safetensors").read_bytes()
    assert [path.name for path in (stillhouse_home / "models").iterdir()] == [folder.name]
    second = register(server, tiny_teacher)
    assert second == first + 1
    other = fetch_model(f"models:/{NAME}@challenger", server.uri)
    assert other != folder and other.is_relative_to(stillhouse_home / "models")
    shutil.rmtree(server.folder / "artifacts")
    assert fetch_model(f"models:/{NAME}/{first}", server.uri) == folder
    # Another home has not got it.
    monkeypatch.setenv("STILLHOUSE_HOME", str(stillhouse_home / "elsewhere"))
    with pytest.raises(RunError, match="its files are gone"):
        fetch_model(f"models:/{NAME}/{first}", server.uri)
    assert not any((stillhouse_home / "elsewhere" / "models").iterdir())
