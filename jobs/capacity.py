"""Whether a family fits on the cluster that it is meant for: what `check` asks, without starting anything there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.capacity import check_capacity, first_without_room, gib, most_of, totals
from cluster.errors import RunError, StillhouseError
from cluster.footprint import check_devices, stages_of
from cluster.memory import Estimate
from cluster.queue.held import Held, holders, in_words, left
from cluster.spec import FamilySpec
from jobs.client import alive_nodes_of, connect, held_on
from jobs.contexts import Context, context_for, read_contexts

# Ray's own client tries for most of a minute where something else than a head listens.
ASK_S = 20.0
# Ray's client of a head ends its process where the head is no Ray head, so it gets one of its own. Unlike ray.init it
# makes no job on the cluster, and needs no node of it here.
_LOOK = """
import dataclasses, json, sys
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._private.state import state
from ray._raylet import GcsClient, GcsClientOptions
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from cluster.queue.held import held
at = sys.argv[1] if ":" in sys.argv[1] else canonicalize_bootstrap_address_or_die(sys.argv[1])
nodes = [n for n in GcsClient(address=at).get_all_node_info(timeout=10).values() if n.state == GcsNodeInfo.ALIVE]
state._initialize_global_state(GcsClientOptions.create(at, None, True, False))
there = {node.node_id.hex(): dict(node.resources_total) for node in nodes}
print(json.dumps({"nodes": there, "held": [dataclasses.asdict(each) for each in held()]}))
"""


@dataclass(frozen=True)
class Cluster:
    """What is known of the cluster that a family is for.

    Attributes:
        named: whether anything names one; without a cluster the family is for this machine.
        nodes: resources of each node that is alive, by its id; None where they are not known.
        held: what actors and placement groups hold of them now.
        unknown: why the nodes are not known.
    """

    named: bool
    nodes: Mapping[str, Mapping[str, float]] | None = None
    held: Sequence[Held] = ()
    unknown: str = ""


def find_cluster(context: str | None = None, address: str | None = None) -> Cluster:
    """Look at the cluster that is given, else at that of ``RAY_ADDRESS`` or the context in use.

    To be called before Ray is imported: where from it reads a context's token is set here.

    Args:
        context: a cluster by its name; ``address`` by its job server.

    Raises:
        UserError: there is no such context.
        RunError: a cluster that was given does not answer.
    """
    given, joined = context is not None or address is not None, os.environ.get("RAY_ADDRESS", "")
    try:
        if not given and not joined and read_contexts().current is None:
            return Cluster(named=False, unknown="neither RAY_ADDRESS nor a context names one")
        if not given and joined and not joined.startswith(("http://", "https://")):
            return _of_head(joined)
        server = Context(address=joined) if joined and not given else context_for(context, address)
        client = connect(server)
        return Cluster(True, _with_memory(alive_nodes_of(client)), held_on(client))
    except (StillhouseError, ConnectionError) as error:
        if given:
            raise (error if isinstance(error, StillhouseError) else RunError(str(error))) from None
        return Cluster(named=True, unknown=str(error))


def check_size(spec: FamilySpec, estimates: Mapping[str, Estimate], cluster: Cluster) -> str | None:
    """Check that a family fits on a cluster.

    Args:
        spec: with its memory filled in, see :func:`cluster.memory.with_memory`.
        estimates: what of each role lies on a GPU.

    Returns:
        Why it is not known, and what the family needs, or what it would have to wait for, in one line; None where it
        fits beside what runs there.

    Raises:
        UserError: the cluster is too small.
    """
    stages = stages_of(spec)
    if cluster.nodes is None:
        cpus, gpus, memory = totals(most_of(stages))
        amounts = [f"{cpus:g} CPU", *([f"{gpus:g} GPU"] if gpus else []), *([gib(memory)] if memory else [])]
        needed = " and ".join(amounts)
        return f"the size of the cluster is not checked, the family needs {needed} at a time: {cluster.unknown}"
    for needs in stages:
        check_capacity(needs, cluster.nodes.values())
    check_devices(spec, estimates, cluster.nodes.values())
    free = left(cluster.nodes, cluster.held)
    if all(first_without_room(needs, free) is None for needs in stages):
        return None
    return (
        f"the family fits on the cluster, but not beside what runs there now: {in_words(holders(cluster.held))}; "
        f"started now, it would wait in the queue, or be refused with limits.wait: false"
    )


def _with_memory(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Ray leaves out what a node has none of; without memory in its name, a node would have no limit."""
    return {node: {"memory": 0.0, **resources} for node, resources in nodes.items()}


def _of_head(address: str) -> Cluster:
    from cluster.session import require_answer

    require_answer(address)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK, address], capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"RAY_ADDRESS: {address} has not answered for {ASK_S:g} s") from None
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise RunError(f"RAY_ADDRESS: no Ray cluster answers at {address}: {reason}")
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    return Cluster(True, _with_memory(seen["nodes"]), [Held(**each) for each in seen["held"]])
