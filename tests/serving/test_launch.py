"""Which applications are an endpoint's: none that another one on the cluster has started, whatever their names are."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.memory import GIB, MIB
from serving import deploy, launch
from serving.launch import arm_of, route_of
from serving.models import Models
from serving.spec import checked

# All of them names that an endpoint and an arm may have.
NAMES = ["team", "team.eu", "team.eu.x", "x", "eu.x", "1", "x.1", "team-door", "team_x", "a--b"]


def test_a_route_says_whose_it_is() -> None:
    for endpoint, arm, number in product(NAMES, NAMES, (1, 12)):
        route = route_of(endpoint, arm, number)
        assert arm_of(endpoint, route) == (arm, number)
        assert [other for other in NAMES if arm_of(other, route)] == [endpoint]


@pytest.mark.parametrize(
    "route", ["", "team", "team-control", "team~x", "team~~1", "team~x~", "team~x~y", "team~x~1~2"]
)
def test_what_is_no_route(route: str) -> None:
    assert arm_of("team", route) is None


def test_an_endpoint_that_goes_leaves_those_alone_whose_names_begin_with_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def applications(name: str) -> list[str]:
        return [f"{name}-control", f"{name}-door", *(route_of(name, arm, 1) for arm in ("x", "eu.x"))]

    there = {name: None for each in ("team", "team.eu", "team.eu.x") for name in applications(each)}
    fake: Any = SimpleNamespace(status=lambda: SimpleNamespace(applications=dict(there)), delete=there.pop)
    monkeypatch.setattr(deploy, "serve", fake)
    monkeypatch.setattr(deploy.ray, "is_initialized", lambda: True)
    deploy._take_down(checked(name="team", arms={"x": {"source": "."}}))
    assert list(there) == applications("team.eu") + applications("team.eu.x")


def test_an_arm_asks_ray_for_its_memory_and_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr(launch, "control_of", lambda _: None)  # a handle would start a cluster
    spec = checked(name="team", arms={"x": {"source": "."}, "y": {"source": ".", "memory": "3GiB"}})
    options = [
        launch.application(spec, arm, "team~x~1", tiny_model, "s")._bound_deployment.ray_actor_options for arm in "xy"
    ]
    assert 500 * MIB < options[0]["memory"] < 700 * MIB
    assert options[1]["memory"] == 3 * GIB
    resources = {"CPU": 8.0, "memory": 3.2 * GIB}
    monkeypatch.setattr(deploy.ray, "cluster_resources", lambda: resources)
    models: Models = {"x": tiny_model, "y": tiny_model}
    with pytest.raises(UserError, match=r"the 2 arms need 3\.5 GiB of memory .*\(x 0\.5, y 3\.0\).* 3\.2 GiB free"):
        deploy._check_memory(spec, models)
    resources["memory"] = 4.0 * GIB
    deploy._check_memory(spec, models)
