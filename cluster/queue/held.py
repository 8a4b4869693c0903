"""Holders of a cluster's resources besides the queue's families: the arms of an endpoint, or other Ray programs.

Actors and placement groups count, for they stay. Tasks do not: they end by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.capacity import Need, gib

RESOURCES = ("CPU", "GPU", "memory")
# Begins the name of the endpoint behind which a family compares its students: the family has a place for it.
COMPARED = "bench."
# Serve names the actor of a replica by its application, deployment and id; an arm's application is ENDPOINT~ARM~NUMBER
# (serving.launch.route_of).
REPLICA, BETWEEN = "SERVE_REPLICA::", "~"


@dataclass(frozen=True)
class Held:
    """What an actor or a bundle of a placement group holds of a node.

    Attributes:
        node: the node's id.
        name, job: of the actor or the group; as hex the id of the job that has made it.
    """

    node: str
    name: str
    job: str
    resources: Mapping[str, float]

    @property
    def endpoint(self) -> str | None:
        """The endpoint or Serve application that an actor of Serve belongs to; None for another actor."""
        if not self.name.startswith(REPLICA):
            return None
        return self.name.removeprefix(REPLICA).partition("#")[0].partition(BETWEEN)[0]

    @property
    def who(self) -> str:
        """Whom to end to have it back, in words."""
        return f"job {self.job}" if self.endpoint is None else f"endpoint {self.endpoint}"

    def is_of(self, jobs: Collection[str]) -> bool:
        """Whether it belongs to a family that runs in one of these jobs."""
        # Whoever has started Serve first is the job of all that Serve starts, so there the name decides.
        return self.job in jobs if self.endpoint is None else self.endpoint.startswith(COMPARED)


def held() -> list[Held]:
    """All that actors and placement groups hold on the cluster that this process is connected to.

    No public function of Ray's has an actor's resources, or the job of a placement group.
    """
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData

    accessor = state._connect_and_get_accessor()
    actors = [ActorTableData.FromString(entry) for entry in accessor.get_actor_table(None, "ALIVE")]
    groups = [PlacementGroupTableData.FromString(entry) for entry in accessor.get_placement_group_table()]
    return [
        # In a placement group an actor holds resources by other names, which are the group's.
        *(_of(a.address.node_id, a.name, a.job_id, a.required_resources) for a in actors),
        *(
            _of(bundle.node_id, group.name, group.creator_job_id, bundle.unit_resources)
            for group in groups
            if group.state != PlacementGroupTableData.REMOVED
            for bundle in group.bundles
        ),
    ]


def _of(node: bytes, name: str, job: bytes, resources: Mapping[str, float]) -> Held:
    return Held(node.hex(), name, job.hex(), {key: resources[key] for key in RESOURCES if key in resources})


def left(nodes: Mapping[str, Mapping[str, float]], by_others: Iterable[Held]) -> list[dict[str, float]]:
    """The resources of each node without what others hold there.

    Args:
        nodes: resources of each node that is alive, by its id.
    """
    free = {node: dict(resources) for node, resources in nodes.items()}
    for each in by_others:
        if (there := free.get(each.node)) is not None:
            for name, amount in each.resources.items():
                there[name] = max(0.0, there.get(name, 0.0) - amount)
    return list(free.values())


def holders(by_others: Iterable[Held]) -> list[Need]:
    """What each holder has in all; the largest holder of memory comes first."""
    sums: dict[str, Any] = {}
    for each in by_others:
        if any(each.resources.values()):
            there = sums.setdefault(each.who, dict.fromkeys(RESOURCES, 0.0))
            for name, amount in each.resources.items():
                there[name] += amount
    found = [Need(who, 1, s["CPU"], s["GPU"], s["memory"]) for who, s in sums.items()]
    return sorted(found, key=lambda need: (need.memory, need.cpus), reverse=True)


def in_words(holders: Iterable[Need]) -> str:
    """Holders with what they hold, such as ``endpoint demo (1 CPU and 3.1 GiB)``."""
    return ", ".join(f"{need.who} ({_amounts(need)})" for need in holders)


def _amounts(need: Need) -> str:
    given = [(need.cpus, f"{need.cpus:g} CPU"), (need.gpus, f"{need.gpus:g} GPU"), (need.memory, gib(need.memory))]
    return " and ".join(text for amount, text in given if amount)
