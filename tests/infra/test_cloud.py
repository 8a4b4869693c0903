"""The cluster file for virtual machines, against the schema that Ray carries."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml

CLUSTER = Path(__file__).parents[2] / "infra/cloud/cluster.yaml"


def test_the_cluster_file_is_one_for_ray() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(CLUSTER.read_text()), schema)


def test_every_node_that_is_started_asks_for_the_token() -> None:
    tree = yaml.safe_load(CLUSTER.read_text())
    assert all("RAY_AUTH_MODE=token" in each for each in starts_of(tree))
    assert any(path.endswith(".ray/auth_token") for path in tree["file_mounts"])


def test_no_node_takes_the_image_that_ray_would_choose() -> None:
    kinds = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    assert len(kinds) >= 2  # of the head and of the workers
    for name, kind in kinds.items():
        assert kind["node_config"].get("ImageId", "").lower() not in ("", "latest_dlami"), name


def starts_of(tree: dict[str, Any]) -> list[str]:
    """The commands that start Ray: one on the head, one on a worker."""
    commands = tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]
    starts = [each for each in commands if "ray start" in each]
    assert len(starts) == 2
    return starts


def test_a_node_s_own_python_can_make_the_environment_that_jobs_run_in() -> None:
    tree = yaml.safe_load(CLUSTER.read_text())
    steps = tree["setup_commands"]
    (installs,) = (number for number, step in enumerate(steps) if "install --yes" in step and "python3-venv" in step)
    assert installs < steps.index("python3 -m venv ~/uv")
    starts = starts_of(tree)
    # A job runs `python`, which Ubuntu has not.
    assert all(each.startswith("PATH=~/venv/bin:$PATH ") for each in starts)


def test_all_nodes_have_the_interpreter_of_the_images() -> None:
    tree = yaml.safe_load(CLUSTER.read_text())
    version = "infra/images/python-version"
    assert (CLUSTER.parents[2] / version).is_file()
    (makes,) = (step for step in tree["setup_commands"] if step.endswith(" ~/venv"))
    assert f'--managed-python --python "$(cat ~/stillhouse/{version})"' in makes
    assert tree["file_mounts"]["/home/ubuntu/stillhouse"] == "."


def test_models_lie_on_the_file_system_that_all_nodes_mount() -> None:
    tree = yaml.safe_load(CLUSTER.read_text())
    (mount,) = (step for step in tree["setup_commands"] if "mount -t nfs4" in step)
    shared = mount.split()[-1]
    starts = starts_of(tree)
    assert all(f" HF_HOME={shared}/" in each for each in starts)
