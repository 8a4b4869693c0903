"""Starts one arm: its model is fetched, and a Serve application of its own answers for it once it is warm.

An application per arm, and not one for the endpoint: an arm can then come and go while the others serve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from cluster.errors import RunError, death_of
from cluster.memory import ARM_BYTES, GIB, served_estimate
from serving.arm_server import ArmServer
from serving.arms import Arm, locate, pinned
from serving.link.post import LEAVE_S, Post
from serving.spec import ArmSpec, EndpointSpec

ARM_DEPLOYMENT = "arm"
"""Name of the one deployment in an arm's application."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_POLL_S = 0.1
LESS_MEMORY = "serve fewer arms on that node, or a smaller model"
# Stands between the names in a route. Neither an endpoint's nor an arm's name has it (a dot they may have), so that no
# endpoint takes another's arms for its own. Ray puts routes in file names and URLs, where it needs no escape.
_BETWEEN = "~"


def route_of(endpoint: str, arm: str, number: int) -> str:
    """Name of the application that is an arm's ``number``-th."""
    return _BETWEEN.join((endpoint, arm, str(number)))


def arm_of(endpoint: str, route: str) -> tuple[str, int] | None:
    """The arm and the number of :func:`route_of`; None for another application."""
    parts = route.split(_BETWEEN)
    if len(parts) != 3 or parts[0] != endpoint or not parts[1] or not parts[2].isdecimal():
        return None
    return parts[1], int(parts[2])


class ByLoad:
    """Serve's autoscaling, by the requests that the arm's processes themselves say they have."""

    def __init__(self, target: float) -> None:
        """``target``: requests under way per process."""
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many processes there should be."""
        under_way = context.aggregated_metrics.get("under_way", {})
        return math.ceil(sum(under_way.values()) / self._target), {}


def application(spec: EndpointSpec, arm: str, route: str, model_dir: Path | None, secret: str) -> Any:
    """The Serve application of one arm."""
    own = spec.arms[arm]
    options: dict[str, Any] = {"num_replicas": own.replicas.min}
    if own.replicas.max > own.replicas.min:
        options = {
            "autoscaling_config": {
                "min_replicas": own.replicas.min,
                "max_replicas": own.replicas.max,
                "upscale_delay_s": own.replicas.up_after_s,
                "downscale_delay_s": own.replicas.down_after_s,
                "policy": {
                    "policy_function": "serving.launch:ByLoad",
                    "policy_kwargs": {"target": own.replicas.target},
                },
            }
        }
    return (
        serve.deployment(ArmServer)
        .options(
            name=ARM_DEPLOYMENT,
            # What comes this way are the control's and the judge's questions only.
            max_ongoing_requests=1000,
            user_config={},
            ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus, "memory": arm_memory(own, model_dir)},
            health_check_period_s=5,
            health_check_timeout_s=60,  # its one token may wait for a long prompt on a busy CPU
            # Once it is to go, it ends by itself when it has answered what it has taken in; no request takes longer.
            graceful_shutdown_timeout_s=spec.limits.timeout_s + 2 * LEAVE_S,
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=2,
            **options,
        )
        .bind(
            own.engine,
            model_dir,
            own.dtype,
            max(1, int(own.cpus)),
            own.slots,
            spec.limits.prompt_tokens,
            spec.limits.completion_tokens,
            Post(secret, route, own.slots + own.queue, control_of(spec), spec.limits.timeout_s),
            own.gpus > 0,
        )
    )


def arm_memory(own: ArmSpec, model_dir: Path | None) -> int:
    """Bytes of host memory that one replica of an arm asks Ray for."""
    if own.memory is not None or model_dir is None:
        return int(own.memory or ARM_BYTES[own.engine])
    return served_estimate(model_dir, own.dtype, own.slots, own.gpus > 0, own.engine).host


def control_of(spec: EndpointSpec) -> Any:
    """Handle of the endpoint's control, which may not be there yet."""
    return serve.get_deployment_handle("control", f"{spec.name}-control", _check_exists=False)


def run_applications(targets: dict[str, Any], timeout_s: float) -> None:
    """Run applications, by name, and return when all of them do.

    Raises:
        RunError: one did not start; says why. None is taken down again.
    """
    serve.run_many(
        [serve.RunTarget(app, name=name, route_prefix=None, logging_config=QUIET) for name, app in targets.items()],
        wait_for_applications_running=False,
    )
    wait("the arms to start", timeout_s, lambda: all(_runs(name) for name in targets), _free_now)


def _runs(name: str) -> bool:
    app = serve.status().applications.get(name)
    if app is None:
        return False
    if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        why = [d.message.strip() for d in app.deployments.values() if d.message.strip()] or [app.message]
        cause = death_of(why[0], LESS_MEMORY) or why[0].splitlines()[-1].strip()
        raise RunError(f"{name} did not start: {cause} (the Ray logs have the rest).")
    return bool(app.status == "RUNNING")


def _free_now() -> str:
    """What the cluster has free of what arms ask for; families and other endpoints hold the rest."""
    there, free = ray.cluster_resources(), ray.available_resources()
    gpus = f", {free.get('GPU', 0.0):g} of {there['GPU']:g} GPU" if "GPU" in there else ""
    memory = f"{free.get('memory', 0.0) / GIB:.1f} of {there.get('memory', 0.0) / GIB:.1f} GiB"
    return f"free on the cluster: {free.get('CPU', 0.0):g} of {there.get('CPU', 0.0):g} CPU{gpus}, {memory}"


def wait(what: str, timeout_s: float, done: Callable[[], bool], more: Callable[[], str] = str) -> None:
    """Return as soon as something is so.

    Args:
        more: what to add to the error.

    Raises:
        RunError: it was not within the time.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            reason = "; ".join(filter(None, [more(), "the Ray logs have the reason."]))
            raise RunError(f"waited {timeout_s:g} s for {what}; {reason}")
        time.sleep(_POLL_S)


@ray.remote(num_cpus=0, max_retries=0)
def launch_arm(spec: EndpointSpec, arm: str, source: str, route: str, tracking_uri: str | None, secret: str) -> str:
    """Start a further application for an arm, with another model. Nothing of it is left where that fails.

    Returns:
        The source, with a version where an alias was given.

    Raises:
        UserError: there is no such model.
        RunError: it does not start.
    """
    source = pinned(source, tracking_uri)
    model_dir = locate(Arm(arm, source), tracking_uri, spec.arms[arm].engine)
    try:
        run_applications({route: application(spec, arm, route, model_dir, secret)}, spec.start_timeout_s)
    except BaseException:
        serve.delete(route, _blocking=False)
        raise
    return source
