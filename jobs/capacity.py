"""Whether a family fits on the cluster that it is meant for: what `check` asks, without starting anything there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from cluster.capacity import check_capacity, most_of, needs_of, serving_needs_of, totals
from cluster.errors import RunError, StillhouseError
from cluster.spec import FamilySpec
from jobs.client import alive_nodes_of, connect
from jobs.contexts import Context, context_for, read_contexts

# Ray's own client tries for most of a minute where something else than a head listens.
ASK_S = 20.0
# Ray's client of a head ends its process where the head is no Ray head, so it gets one of its own. Unlike ray.init it
# makes no job on the cluster, and needs no node of it here.
_NODES = """
import json, sys
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
at = sys.argv[1] if ":" in sys.argv[1] else canonicalize_bootstrap_address_or_die(sys.argv[1])
nodes = GcsClient(address=at).get_all_node_info(timeout=10).values()
print(json.dumps([dict(node.resources_total) for node in nodes if node.state == GcsNodeInfo.ALIVE]))
"""
Nodes = list[Mapping[str, Any]]


def check_size(spec: FamilySpec, context: str | None = None, address: str | None = None) -> str | None:
    """Check that a family fits on a cluster: the one that is given, else that of ``RAY_ADDRESS`` or the context in use.

    Args:
        context: a cluster by its name; ``address`` by its job server.

    Returns:
        Why it is not known, and what the family needs, in one line; None where it fits.

    Raises:
        UserError: the cluster is too small, or there is no such context.
        RunError: a cluster that was given does not answer.
    """
    stages = [needs for needs in (needs_of(spec), serving_needs_of(spec)) if needs]
    try:
        nodes = _nodes(context, address)
    except (StillhouseError, ConnectionError) as error:
        if context is not None or address is not None:
            raise (error if isinstance(error, StillhouseError) else RunError(str(error))) from None
        cpus, gpus, _ = totals(most_of(stages))
        needed = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        return f"the size of the cluster is not checked, the family needs {needed} at a time: {error}"
    for needs in stages:
        check_capacity(needs, nodes)
    return None


def _nodes(context: str | None, address: str | None) -> Nodes:
    """Resources of every node that is alive.

    Raises:
        RunError: no cluster is named, or it does not answer.
        UserError: what names it cannot be used.
    """
    joined = os.environ.get("RAY_ADDRESS", "")
    if context is None and address is None and joined:
        if not joined.startswith(("http://", "https://")):
            return _nodes_of_head(joined)
        return alive_nodes_of(connect(Context(address=joined)))
    if context is None and address is None and read_contexts().current is None:
        raise RunError("neither RAY_ADDRESS nor a context names one")
    return alive_nodes_of(connect(context_for(context, address)))


def _nodes_of_head(address: str) -> Nodes:
    from cluster.session import require_answer

    require_answer(address)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _NODES, address], capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"RAY_ADDRESS: {address} has not answered for {ASK_S:g} s") from None
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise RunError(f"RAY_ADDRESS: no Ray cluster answers at {address}: {reason}")
    nodes: Nodes = json.loads(done.stdout.strip().splitlines()[-1])
    return nodes
