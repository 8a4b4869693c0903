"""The keeper: a spec that cannot be used never ends the endpoint that runs."""

import asyncio
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from serving import declared
from serving.spec import EndpointSpec


class Keeper(declared.Keeper):
    """One that ends unasked: Serve awaits what the real one returns, and nobody does here."""

    def __del__(self) -> None:
        pass


class Endpoint:
    """One that runs."""

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec, self.is_down = spec, False

    def shutdown(self) -> None:
        self.is_down = True


class Cluster:
    """What deploys, and finds what is deployed, in the place of Ray Serve."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, tiny_model: Path) -> None:
        self.endpoints: list[Endpoint] = []
        self.models: list[Any] = []
        self.config: dict[str, Any] = {
            "name": "front",
            "port": free_port(),
            "state": str(folder / "state"),
            "arms": {"x": {"source": str(tiny_model)}},
        }
        monkeypatch.setattr(declared, "running", lambda spec: next(iter(self.up()), None))
        monkeypatch.setattr(declared, "clear", lambda spec: None)
        monkeypatch.setattr(declared, "deploy", self.deploy)

    def up(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.endpoints if not endpoint.is_down]

    def deploy(self, spec: EndpointSpec, tracking_uri: str | None, grows: bool, models: Any) -> Endpoint:
        assert not self.up()
        self.endpoints.append(Endpoint(spec))
        self.models.append(models)
        return self.endpoints[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> Cluster:
    return Cluster(monkeypatch, tmp_path, tiny_model)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as neighbour:
        neighbour.bind(("127.0.0.1", 0))
        neighbour.listen()
        yield int(neighbour.getsockname()[1])


def tell(keeper: Keeper, config: dict[str, Any], tracking_uri: str | None = None) -> None:
    asyncio.run(keeper.reconfigure({"endpoint": config, "tracking_uri": tracking_uri}))


def test_another_spec_ends_the_endpoint_and_starts_it_anew(cluster: Cluster, tiny_model: Path) -> None:
    keeper = Keeper()
    tell(keeper, cluster.config)
    tell(keeper, cluster.config)
    assert len(cluster.endpoints) == 1
    tell(keeper, cluster.config | {"doors": 2})
    assert [endpoint.is_down for endpoint in cluster.endpoints] == [True, False]
    assert cluster.models == [{"x": tiny_model}] * 2  # found once, and handed on


@pytest.mark.parametrize("fresh", [False, True], ids=["same keeper", "another keeper"])
@pytest.mark.parametrize("source", ["/no/such/directory", "models:/none/1", "models:/none@champion"])
def test_an_arm_without_a_model_leaves_the_endpoint_as_it_is(
    cluster: Cluster, tmp_path: Path, empty_registry: Path, source: str, fresh: bool
) -> None:
    shutil.copy(empty_registry, tmp_path / "mlflow.db")
    keeper = Keeper()
    tell(keeper, cluster.config)
    if fresh:
        keeper = Keeper()
    with pytest.raises(UserError):
        tell(keeper, cluster.config | {"arms": {"x": {"source": source}}}, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [endpoint.is_down for endpoint in cluster.endpoints] == [False]
    assert keeper._endpoint is cluster.endpoints[0]  # which it ends when its application goes
    tell(keeper, cluster.config)
    assert [endpoint.is_down for endpoint in cluster.endpoints] == [False]


def test_an_alias_stands_for_the_version_that_the_endpoint_was_started_with(
    cluster: Cluster, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"m@champion": "m/1", "m@next": "m/2", "other@champion": "other/1"}

    def found(spec: EndpointSpec, tracking_uri: str | None) -> tuple[EndpointSpec, dict[str, Path]]:
        source = "models:/" + versions[spec.arms["x"].source.removeprefix("models:/")]
        arms = {"x": spec.arms["x"].model_copy(update={"source": source})}
        return spec.model_copy(update={"arms": arms}), {"x": tiny_model}

    monkeypatch.setattr(declared, "find_models", found)

    def sources(keeper: Keeper, source: str) -> list[str]:
        tell(keeper, cluster.config | {"arms": {"x": {"source": source}}})
        return [endpoint.spec.arms["x"].source for endpoint in cluster.endpoints]

    keeper = Keeper()
    assert sources(keeper, "models:/m@champion") == ["models:/m/1"]
    versions["m@champion"] = "m/3"
    for each in (keeper, Keeper()):
        assert sources(each, "models:/m@champion") == ["models:/m/1"]
    # Another alias, or another model's, is another spec.
    assert sources(keeper, "models:/m@next") == ["models:/m/1", "models:/m/2"]
    assert sources(Keeper(), "models:/other@champion")[2:] == ["models:/other/1"]


def test_an_address_that_cannot_be_listened_on_leaves_the_endpoint_as_it_is(cluster: Cluster, taken_port: int) -> None:
    keeper = Keeper()
    tell(keeper, cluster.config)
    with socket.socket() as own:  # the door of the endpoint that runs: its own port is no hindrance
        own.bind(("127.0.0.1", cluster.config["port"]))
        own.listen()
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{taken_port}"):
            tell(keeper, cluster.config | {"port": taken_port})
        assert [endpoint.is_down for endpoint in cluster.endpoints] == [False]
        tell(keeper, cluster.config | {"doors": 2})
    assert [endpoint.is_down for endpoint in cluster.endpoints] == [True, False]
