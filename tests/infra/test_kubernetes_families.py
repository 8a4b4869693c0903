"""The families that come with the overlays: that their teachers can be split so, over those nodes, and that somebody
becomes the champion whom the endpoint serves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from cluster.preflight import _check_shards
from cluster.spec import FamilySpec
from cluster.specfile import load_spec
from tests.infra.rendered import KUBERNETES, OVERLAYS, of_kind, place_of, rendered

# Attention heads and key-value heads: `num_attention_heads` and `num_key_value_heads` of each model's config.json on
# huggingface.co.
HEADS = {
    "hf://Qwen/Qwen2.5-7B-Instruct": (28, 4),
    "hf://Qwen/Qwen2.5-32B-Instruct": (40, 8),
    "hf://meta-llama/Llama-3.3-70B-Instruct": (64, 8),
}


def family(overlay: str) -> FamilySpec:
    return load_spec(KUBERNETES / place_of(overlay) / "family.yaml")


def gpus_of_nodes(overlay: str) -> dict[str, list[int]]:
    """GPUs of each node that a group may have, by group."""
    groups = of_kind(overlay, "RayCluster")["spec"]["workerGroupSpecs"]
    return {
        group["groupName"]: [int(gpus)] * group["maxReplicas"]
        for group in groups
        if (gpus := group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu"))
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_teacher_s_heads_divide_by_its_shards(overlay: str) -> None:
    spec = family(overlay)
    heads, kv_heads = HEADS[spec.teacher.model]
    _check_shards(spec, SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads))


def test_seventy_b_s_teacher_takes_two_nodes_and_leaves_its_students_theirs() -> None:
    spec, nodes = family("seventy-b"), gpus_of_nodes("seventy-b")
    # A placement group packs, and onto nodes of any group: two nodes are certain where no node has room for all shards.
    assert max(gpus for group in nodes.values() for gpus in group) < spec.teacher.shards
    assert nodes["teacher"] == [4, 4] and sum(nodes["teacher"]) == spec.teacher.shards
    assert sum(nodes["students"]) >= sum(student.ranks for student in spec.students.values())


def test_what_the_endpoint_serves_is_set_by_every_night_s_family() -> None:
    served = yaml.safe_load(of_kind("endpoint", "RayService")["spec"]["serveConfigV2"])
    (keeper,) = served["applications"][0]["deployments"]
    sources = [arm["source"] for arm in keeper["user_config"]["endpoint"]["arms"].values()]
    assert sources
    for spec in map(family, OVERLAYS):
        aliases = {"challenger"} | ({"champion"} if spec.promotion is not None else set())
        can_be_set = {f"models:/{spec.model_name(name)}@{alias}" for name in spec.students for alias in aliases}
        assert set(sources) <= can_be_set


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_night_runs_the_family_beside_its_overlay(overlay: str) -> None:
    (families,) = (
        each for each in rendered(overlay) if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "families"
    )
    assert families["data"]["nightly.yaml"] == (KUBERNETES / place_of(overlay) / "family.yaml").read_text()
