"""A connection to a cluster's job server, with the token that goes with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.errors import RunError, UserError
from cluster.limits import DRIVER
from cluster.queue.held import RESOURCES, Held
from jobs.contexts import Context

# As many as Ray lists at most.
MOST_NODES = 10_000


class JobServerError(RuntimeError):
    """A request that the job server refused. ``status`` is the HTTP status of its answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status


def _job_client(address: str) -> Any:
    """Ray's client, which by itself keeps the status of a refused request only within the text of its error."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _raise_error(self, r: Any) -> None:
            raise JobServerError(r.status_code, r.text)

    return Client(address)


def _use_token(context: Context) -> None:
    """Have Ray send the token that is to be found. It reads where from when it is imported, so this comes before."""
    if context.token_file is not None:
        path = Path(context.token_file).expanduser()
        if not path.is_file():
            raise UserError(f"the context's token file {path} is not there; put the cluster's token into it")
        # The context's cluster is meant, whatever this shell has a token for.
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    usual = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or usual.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(context: Context) -> Any:
    """A client of a cluster's job server.

    Raises:
        UserError: the context names a token file that is not there.
        RunError: nothing answers there, the token is missing or wrong, or the cluster has another version of Ray.
    """
    _use_token(context)
    # Ray lets these two overrule what it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = context.address
    os.environ.pop("RAY_ADDRESS", None)
    # What Ray's client tells of its uploads is not for the person who typed the command.
    logging.disable(logging.INFO)
    from ray.exceptions import AuthenticationError

    try:
        client = _job_client(context.address)
        client.get_version()
    except AuthenticationError:
        raise RunError(
            f"{context.address} refuses the token; put the cluster's token into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from None
    except Exception:  # Ray raises RuntimeError, ConnectionError, requests' errors and its own kinds
        raise RunError(
            f"{context.address}: no Ray job server answers there; check the address and that the cluster is up"
        ) from None
    here, there = version("ray"), client._server_ray_version
    if there is not None and there != here:
        raise RunError(f"{context.address} runs Ray {there}, here is Ray {here}; install ray=={there} to submit to it")
    return client


def job_of(client: Any, job: str) -> Any:
    """What the cluster knows of a job.

    Raises:
        UserError: it knows of none with this id.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if has_forgotten(error):
            raise UserError(f"there is no job {job!r} on {client.get_address()}; see `stillhouse jobs ls`") from None
        raise RunError(f"{client.get_address()}: {str(error).splitlines()[0]}") from None


def has_forgotten(error: RuntimeError) -> bool:
    """Whether the job server reports that it knows no such job."""
    return isinstance(error, JobServerError) and error.status == HTTPStatus.NOT_FOUND


def has_nodes_for_drivers(client: Any) -> bool:
    """Whether a cluster has nodes that are there for the drivers of families: they offer the resource ``driver``.

    Raises:
        ConnectionError: as :func:`alive_nodes_of`.
    """
    return any(DRIVER in resources for resources in alive_nodes_of(client).values())


def alive_nodes_of(client: Any) -> dict[str, Mapping[str, Any]]:
    """Resources of every node of a cluster that is alive, as Ray names them, by the nodes' ids.

    Raises:
        ConnectionError: nobody answers, such as while a head is started again; submitting a job would raise it too.
    """
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        nodes = list_nodes(address=client.get_address(), filters=[("state", "=", "ALIVE")], limit=MOST_NODES)
    except RayStateApiException as error:
        raise ConnectionError(f"{client.get_address()}: {str(error).splitlines()[0]}") from error
    return {node.node_id: node.resources_total for node in nodes}


def held_on(client: Any) -> list[Held]:
    """What actors and placement groups hold of a cluster, as :func:`cluster.queue.held.held` finds it on the cluster.

    Raises:
        ConnectionError: as :func:`alive_nodes_of`.
    """
    from ray.util.state import list_actors, list_placement_groups
    from ray.util.state.exception import RayStateApiException

    options: dict[str, Any] = {"address": client.get_address(), "limit": MOST_NODES, "detail": True}
    try:
        actors = list_actors(filters=[("state", "=", "ALIVE")], raise_on_missing_output=False, **options)
        groups = list_placement_groups(filters=[("state", "!=", "REMOVED")], raise_on_missing_output=False, **options)
    except RayStateApiException as error:
        raise ConnectionError(f"{client.get_address()}: {str(error).splitlines()[0]}") from error
    found = [Held(a.node_id or "", a.name or "", a.job_id or "", a.required_resources or {}) for a in actors]
    found += [
        Held(bundle.get("node_id") or "", group.name or "", group.creator_job_id, bundle.get("unit_resources") or {})
        for group in groups
        for bundle in group.bundles or ()
    ]
    return [replace(each, resources={k: each.resources[k] for k in RESOURCES if k in each.resources}) for each in found]


def state_of(info: Any) -> str:
    """A job's state in lower case: pending, running, succeeded, failed or stopped."""
    return str(getattr(info.status, "value", info.status)).lower()


def log_of(client: Any, job: str) -> str:
    """All that a job has said so far; nothing where its log is gone or not there yet."""
    try:
        return str(client.get_job_logs(job))
    except RuntimeError:
        return ""


def address_inside() -> str:
    """The job server of the cluster that this process runs on, such as a job.

    Raises:
        RunError: it runs on none.
    """
    from ray.dashboard.utils import get_address_for_submission_client

    try:
        return str(get_address_for_submission_client(None))
    except Exception as error:  # Ray raises ConnectionError, ValueError and its own kinds
        raise RunError(f"no Ray cluster runs here: {str(error).splitlines()[0]}; give --address") from None
