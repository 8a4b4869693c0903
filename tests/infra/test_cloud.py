"""The cluster file for virtual machines, against the schema that Ray carries."""

import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml

CLUSTER = Path(__file__).parents[2] / "infra/cloud/cluster.yaml"


def test_the_cluster_file_is_one_for_ray() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(CLUSTER.read_text()), schema)


def test_every_node_that_is_started_asks_for_the_token() -> None:
    tree = yaml.safe_load(CLUSTER.read_text())
    commands = tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in each for each in commands if "ray start" in each)
    assert any(path.endswith(".ray/auth_token") for path in tree["file_mounts"])
