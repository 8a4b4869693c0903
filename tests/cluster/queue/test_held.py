"""What others than families hold, from messages as Ray's control store sends them; and who then waits."""

from __future__ import annotations

from typing import Any

import pytest
from ray.core.generated.common_pb2 import Bundle
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData

from cluster.capacity import Need
from cluster.queue.held import COMPARED, Held, held, holders, in_words, left
from cluster.queue.order import Entry, Order
from serving.launch import route_of

GIB = 2.0**30
NODE, OTHER = b"\1" * 28, b"\2" * 28
MINE, THEIRS = b"\3\0\0\0", b"\4\0\0\0"


def actor(name: str, job: bytes, resources: dict[str, float]) -> bytes:
    data = ActorTableData(name=name, job_id=job, required_resources=resources)
    data.address.node_id = NODE
    return data.SerializeToString()


def group(job: bytes, *bundles: dict[str, float], state: int = PlacementGroupTableData.CREATED) -> bytes:
    own = [Bundle(unit_resources=each, node_id=OTHER) for each in bundles]
    return PlacementGroupTableData(creator_job_id=job, bundles=own, state=state).SerializeToString()


def arm(endpoint: str, **resources: float) -> bytes:
    return actor(f"SERVE_REPLICA::{route_of(endpoint, 'small', 1)}#arm#x1y2", THEIRS, resources)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Actors and placement groups of a cluster."""
    from ray._private.state import state

    there: dict[str, list[bytes]] = {"actors": [], "groups": []}

    class Accessor:
        def get_actor_table(self, _job: Any, wanted: str) -> list[bytes]:
            assert wanted == "ALIVE"
            return there["actors"]

        def get_placement_group_table(self) -> list[bytes]:
            return there["groups"]

    monkeypatch.setattr(state, "_connect_and_get_accessor", Accessor)
    return there


def by_others(jobs: set[str]) -> list[Held]:
    return [each for each in held() if not each.is_of(jobs)]


def test_arms_and_programs_of_others_count_and_what_families_hold_does_not(cluster: dict[str, list[bytes]]) -> None:
    cluster["actors"] = [
        arm("team", CPU=0.5, memory=2 * GIB),
        arm("team", CPU=0.5, memory=GIB),
        arm(COMPARED + "tiny-20261124-093000", CPU=1.0),
        actor("", MINE, {"CPU": 1.0}),
        actor("", THEIRS, {"CPU": 2.0, "GPU": 1.0}),
        actor("idle", THEIRS, {}),
        actor("", THEIRS, {"CPU_group_00ff": 2.0}),
    ]
    cluster["groups"] = [
        group(MINE, {"CPU": 1.0}),
        group(THEIRS, {"CPU": 1.0}, {"memory": GIB}),
        group(THEIRS, {"CPU": 8.0}, state=PlacementGroupTableData.REMOVED),
    ]
    others = by_others({MINE.hex()})
    assert in_words(holders(others)) == "endpoint team (1 CPU and 3.0 GiB), job 04000000 (3 CPU and 1 GPU and 1.0 GiB)"
    nodes = {NODE.hex(): {"CPU": 8.0, "GPU": 1.0, "memory": 9 * GIB}, OTHER.hex(): {"CPU": 0.5, "memory": 9 * GIB}}
    assert left(nodes, others) == [
        {"CPU": 5.0, "GPU": 0.0, "memory": 6 * GIB},
        {"CPU": 0.0, "memory": 8 * GIB},
    ]


def test_a_family_waits_while_an_endpoint_holds_its_memory(cluster: dict[str, list[bytes]]) -> None:
    nodes = {NODE.hex(): {"CPU": 4.0, "memory": 8 * GIB}}
    cluster["actors"] = [arm("team", CPU=0.5, memory=5 * GIB)]
    order, entry = Order(), Entry("a", "ann", ((Need("the teacher", 1, 1.0, 0.0, 4 * GIB),),), job=MINE.hex())
    place = order.renew(entry, 1.0, 1001.0, left(nodes, by_others(order.jobs | {entry.job})))
    assert (place.entry.admitted, place.number, place.fits) == (False, 1, False)
    # Its own actors do not count against it, wherever it stands.
    cluster["actors"] = [actor("", MINE, {"CPU": 4.0, "memory": 8 * GIB})]
    assert order.renew(place.entry, 2.0, 1002.0, left(nodes, by_others(order.jobs))).entry.admitted
