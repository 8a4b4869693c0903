"""Joins a running Ray cluster, or starts one on this machine and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.errors import RunError, UserError, first_line
from cluster.memory import OBJECT_STORE_BYTES

# How long a head may take to accept a connection.
CONNECT_S = 5.0

# What a call raises whose actor's process is gone. Ray does not count the one that its memory monitor causes among its
# actor errors.
ACTOR_LOST = (RayActorError, OutOfMemoryError)

# Inherited by every process of the family.
WORKER_ENV = {
    # Models are fetched before anything starts; no worker may reach for a hub.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Ray Train looks for dead ranks, and takes up one checkpoint, every so many seconds; of itself every two.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Of a node that is to be taken away the ranks make no use beforehand, and what Ray Train does about it by itself
    # tells nobody that a student has lost its place.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def require_answer(address: str) -> None:
    """Check that something listens where ``RAY_ADDRESS`` says that a cluster is; Ray itself tries for minutes.

    Raises:
        UserError: it is the URL of a job server.
        RunError: nothing listens there.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.scheme in ("http", "https"):
        raise UserError(
            f"RAY_ADDRESS: got {address!r}, a job server's URL; give HOST:PORT of the cluster's head, such as "
            f"127.0.0.1:6379, or use `stillhouse submit --address {address}`"
        )
    try:
        port = url.port
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS: got {address!r}: {error}; give HOST:PORT of the cluster's head") from None
    if url.hostname is None or port is None:
        return  # such as "auto", which Ray looks up itself
    try:
        socket.create_connection((url.hostname, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise RunError(_no_cluster(address, error.strerror or str(error))) from None


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"RAY_ADDRESS: no Ray cluster answers at {address} ({reason}); check the address and that the cluster is up, "
        f"or unset RAY_ADDRESS to run on this machine"
    )


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """A Ray connection for the time of the ``with`` block.

    Inside a submitted job, or where ``RAY_ADDRESS`` names a cluster, that cluster is joined. Otherwise one is started
    with a token of its own; its processes end and its files go when the block ends, however it ends.

    Raises:
        UserError: ``RAY_ADDRESS`` is the URL of a job server.
        RunError: no cluster answers at ``RAY_ADDRESS``.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        require_answer(address)
        try:
            ray.init(address=address, log_to_driver=True, runtime_env={"env_vars": WORKER_ENV})
        except ConnectionError as error:
            raise RunError(_no_cluster(address, first_line(error))) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A token of its own for the life of this process: Ray would otherwise write one into the home directory. Ray turns
    # authentication on by itself when it starts a cluster and RAY_AUTH_MODE is not set.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        del os.environ["RAY_AUTH_MODE"]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Short, because the paths of Unix sockets below it are limited to 107 bytes. The number says whose it is.
    folder = tempfile.mkdtemp(prefix=f"still-{os.getpid()}-", dir="/tmp")
    # What the workers put aside goes with it too, also when they are killed over it.
    temporary = Path(folder) / "tmp"
    temporary.mkdir()
    try:
        ray.init(
            address="local",
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=folder,
            log_to_driver=True,
            runtime_env={"env_vars": {**WORKER_ENV, "TMPDIR": str(temporary)}},
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def alive_nodes() -> list[dict[str, float]]:
    """Resources of every node that is alive; Ray leaves out what a node has none of."""
    return list(nodes_by_id().values())


def nodes_by_id() -> dict[str, dict[str, float]]:
    """:func:`alive_nodes`, by the ids of the nodes."""
    return {node["NodeID"]: {"memory": 0.0, **node["Resources"]} for node in ray.nodes() if node["Alive"]}


def places_pending() -> bool:
    """Whether somebody on the cluster waits for a place: a teacher's replica or a student's ranks, among others."""
    return any(group["state"] not in ("CREATED", "REMOVED") for group in placement_group_table().values())


def give_back_places() -> None:
    """Remove this job's placement groups whose makers have died, so that what comes after them finds room.

    Ray keeps them for as long as the job lives: those of a teacher whose stream was killed, and of a student whose
    controller was. Its table names the maker, but no public function does.
    """
    job = job_id()
    for entry in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        # Ray says of one that no actor has made that its actor is dead, too.
        by_actor = bool(group.creator_actor_id) and not ray.ActorID(group.creator_actor_id).is_nil()
        orphaned = by_actor and group.creator_actor_dead and not group.is_detached and group.creator_job_id.hex() == job
        if orphaned and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def job_id() -> str:
    """Id of the Ray job that this process belongs to, as hex."""
    return str(ray.get_runtime_context().get_job_id())


def here() -> str:
    """Id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())
