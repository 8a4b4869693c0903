"""The endpoint's spec: what a file and the command line may say, and how a mistake is told."""

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from jobs.promotion import champion_arm
from serving.spec import EndpointSpec, checked, read_endpoint

ARM = {"source": "models:/m/1"}


def test_defaults_are_safe() -> None:
    spec = checked(arms={"a": ARM})
    assert (spec.host, spec.keys, spec.log_requests, spec.weights) == ("127.0.0.1", None, False, {"a": 1.0})
    assert spec.arms["a"].engine == "transformers" and spec.limits.body_bytes == 1_048_576


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"arms": {}}, "arms"),
        ({"arms": {"a": {"source": "x", "wieght": 2}}}, "arms.a.wieght"),
        ({"arms": {"a": {"source": "x", "engine": "magic"}}}, "arms.a.engine"),
        ({"arms": {"a": {"source": "x", "dtype": "int4"}}}, "arms.a.dtype"),
        ({"arms": {"a": {"source": "x", "slots": 0}}}, "arms.a.slots"),
        ({"arms": {"a": {"source": "x", "replicas": {"min": 3, "max": 2}}}}, "replicas.max 2 is below replicas.min 3"),
        ({"arms": {"a": {"source": "x", "weight": -1}}}, "arms.a.weight"),
        ({"arms": {"a": {"source": "x", "weight": 0}}}, "all weights are 0"),
        ({"arms": {"a/b": ARM}}, "an arm is named 'a/b'"),
        ({"arms": {"a~1": ARM}}, "an arm is named 'a~1'"),
        ({"arms": {"": ARM}}, "an arm is named ''"),
        ({"name": "a"}, "an arm has the endpoint's name 'a'"),
        ({"name": "no spaces"}, "name"),
        ({"shadow": {"b": 0.1}}, "shadow names 'b', which is no arm; there are: a"),
        ({"shadow": {"a": 1.5}}, "shadow.a"),
        ({"host": "0.0.0.0"}, "host 0.0.0.0 is open to others, and there are no API keys"),
        ({"port": 70000}, "port"),
        ({"sticky": ["cookie"]}, "sticky"),
        ({"limits": {"timeout_s": 0}}, "limits.timeout_s"),
        ({"limits": {"body_bytes": 2**26}}, "limits.body_bytes"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_mistake_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(**{"arms": {"a": ARM}, **fields})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_longest_name_that_a_family_s_champion_can_have_is_an_arm_s() -> None:
    name = champion_arm(f"{'f' * 40}-{'s' * 40}")
    assert checked(arms={name: ARM}).weights == {name: 1.0}


def test_the_command_line_names_arms() -> None:
    spec = read_endpoint(
        None,
        ["x=models:/m/1:3", "y=models:/m@champion"],
        {"cpus": 2.0, "gpus": None, "engine": "echo"},
        port=0,
        name=None,
    )
    assert spec.weights == {"x": 3.0, "y": 1.0} and spec.name == "stillhouse" and spec.port == 0
    assert {(arm.cpus, arm.gpus, arm.engine) for arm in spec.arms.values()} == {(2.0, 0.0, "echo")}


def test_a_file_says_more_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "endpoint.yaml"
    file.write_text("name: front\nport: 1\nkeys: keys.yaml\narms: {a: {source: here}, b: {source: 'models:/m/2'}}\n")
    spec = read_endpoint(file, ["c=models:/m/3"], port=2)
    assert (spec.name, spec.port, list(spec.arms)) == ("front", 2, ["a", "b", "c"])
    # Paths in a file are relative to it.
    assert (spec.keys, spec.arms["a"].source) == (tmp_path / "keys.yaml", str(tmp_path / "here"))
    assert spec.arms["b"].source == "models:/m/2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "YAML mapping"),
        ("a: [", "not valid YAML"),
        ("arms: [a]", "arms"),
        ("arms: {a: here}", "arms.a"),
        ("", "arms"),
    ],
)
def test_a_file_that_is_no_endpoint(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "endpoint.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_endpoint(file)


def test_nothing_to_serve_and_options_for_nobody(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no arm given"):
        read_endpoint(None)
    with pytest.raises(UserError, match="cannot be read"):
        read_endpoint(tmp_path / "none.yaml")
    file = tmp_path / "endpoint.yaml"
    file.write_text("arms: {a: {source: here}}")
    with pytest.raises(UserError, match="cpus is for arms that --arm names"):
        read_endpoint(file, per_arm={"cpus": 1.0})


def test_the_examples_are_read() -> None:
    import yaml

    from serving.experiment.spec import parse_experiment

    folder = Path(__file__).parents[2] / "examples"
    spec: EndpointSpec = read_endpoint(folder / "endpoint.yaml")
    experiment = parse_experiment(yaml.safe_load((folder / "experiment.yaml").read_text()))
    assert set(experiment.arms) <= set(spec.arms)
