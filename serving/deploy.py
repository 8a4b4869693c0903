"""Brings arms up behind one endpoint on the Ray cluster that the caller is connected to, and takes them down."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import ProxyLocation

from cluster.errors import RunError, UserError
from cluster.memory import GIB
from serving.arms import Arm
from serving.control.server import Control
from serving.control.works import Works
from serving.ingress.door import Door
from serving.launch import QUIET, application, arm_memory, arm_of, control_of, route_of, run_applications, wait
from serving.models import Models, find_models
from serving.spec import EndpointSpec, checked

# Light processes, on the machine whose address is listened on.
ON_THE_HEAD: dict[str, Any] = {
    "max_ongoing_requests": 1000,
    "ray_actor_options": {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    "user_config": {},
    "graceful_shutdown_timeout_s": 8,
    "graceful_shutdown_wait_loop_s": 0.1,
    "health_check_period_s": 2,
}


@dataclass
class Endpoint:
    """A running endpoint; leave it by :meth:`shutdown` or as a context manager."""

    url: str
    """Base URL, like ``http://127.0.0.1:8000``; OpenAI clients take ``url + "/v1"``."""
    spec: EndpointSpec
    """As it runs: with the port it has, and models by their versions."""
    _control: Any = None
    _temporary: Path | None = None
    _down: bool = False

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the arms' weights without restarting anything; arms not named keep theirs. Returns when in force.

        Raises:
            UserError: an unknown arm, or weights nothing can be drawn by. Nothing has changed.
        """
        self.ask("set_traffic", {"weights": dict(weights)})

    def roll(self, arm: str, source: str) -> None:
        """Have an arm answer by another model, without a request that fails; returns when it does.

        Raises:
            UserError: no such arm or model. Nothing has changed.
            RunError: the new model does not start. The old one goes on.
        """
        self.ask("roll", {"arm": arm, "source": source})

    def ask(self, action: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """What the control answers to an administrator; see :meth:`serving.control.server.Control.do`.

        Raises:
            UserError: it refuses.
            RunError: it could not do it.
            TimeoutError: it did not answer within ``timeout_s``.
        """
        status, answer = self._control.do.remote(action, body).result(timeout_s=timeout_s)
        if status != 200:
            raise (UserError if status < 500 else RunError)(answer)
        return answer

    def shutdown(self) -> None:
        """Stop answering and end every process of the endpoint; the port is free when this returns."""
        if self._down:
            return
        self._down = True
        _take_down(self.spec)
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        wait("the port to close", 15.0, lambda: _is_free(self.spec.host, self.spec.port))

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def deploy(
    spec: EndpointSpec, tracking_uri: str | None = None, grows: bool = False, models: Models | None = None
) -> Endpoint:
    """Serve the arms behind one endpoint; returns when it answers.

    ``ray.init`` has been done by the caller. Everything is checked, and every model fetched, before anything
    starts; if the start fails, what had started is taken down again.

    Args:
        tracking_uri: where the registry is; needed when a source is a ``models:/`` URI.
        grows: the cluster adds nodes for what waits, so arms may need more than it has now.
        models: as :func:`serving.models.find_models` has found them, with the spec that it gave; None has them found.

    Raises:
        UserError: an arm, a name or the port cannot be used, or the cluster is too small. Nothing has been started.
        RunError: the arms were started and did not come up. Nothing is left running.
    """
    _check_name(spec)
    if not grows:
        _check_room(spec)
    if models is None:
        spec, models = find_models(spec, tracking_uri)
    if not grows:
        _check_memory(spec, models)
    temporary = None if spec.state else Path(tempfile.mkdtemp(prefix="still-"))
    spec = spec.model_copy(update={"port": claim(spec.host, spec.port), "state": spec.state or temporary})
    endpoint = Endpoint(_url(spec), spec, _temporary=temporary)
    try:
        with _quiet():
            _start(spec, models, tracking_uri)
            endpoint._control = control_of(spec)
            wait("the endpoint to answer", 30.0, lambda: _answers(endpoint.url))
            wait("the arms to be let in", 30.0, lambda: _are_in(endpoint.ask("traffic")))
    except BaseException:  # Ctrl-C too: nothing is left behind
        endpoint.shutdown()
        raise
    return endpoint


def running(spec: EndpointSpec) -> Endpoint | None:
    """The endpoint of this name that runs on the cluster, whoever has started it; None where there is none, or only
    parts of one."""
    applications = serve.status().applications
    parts = [applications.get(f"{spec.name}-{part}") for part in ("control", "door")]
    if not all(part is not None and part.status == "RUNNING" for part in parts):
        return None
    control = control_of(spec)
    spec = control.spec.remote().result()
    return Endpoint(_url(spec), spec, control)


def clear(spec: EndpointSpec) -> None:
    """End what there is on the cluster of an endpoint of this name, whole or in part."""
    if any(_is_ours(spec, name) for name in serve.status().applications):
        Endpoint(_url(spec), spec).shutdown()


def _url(spec: EndpointSpec) -> str:
    shown = f"[{spec.host}]" if ":" in spec.host else spec.host
    return f"http://{shown}:{spec.port}"


def _start(spec: EndpointSpec, models: Mapping[str, Path | None], tracking_uri: str | None) -> None:
    # Doors listen by themselves (see serving.ingress.door), so Serve's own proxy is not started.
    serve.start(ProxyLocation.Disabled, logging_config=QUIET)
    routes = {name: route_of(spec.name, name, 1) for name in spec.arms}
    control = serve.deployment(Control).options(name="control", **ON_THE_HEAD)
    door = serve.deployment(Door).options(name="door", num_replicas=spec.doors, **ON_THE_HEAD)
    secret = secrets.token_hex(32)
    # Doors and arms wait for the control by themselves, so all can start at the same time.
    applications = {route: application(spec, name, route, models[name], secret) for name, route in routes.items()} | {
        f"{spec.name}-control": control.bind(spec, routes, Works(spec, tracking_uri, secret)),
        f"{spec.name}-door": door.bind(spec, control_of(spec), secret),
    }
    run_applications(applications, spec.start_timeout_s)


def endpoint_of(arms: Sequence[Arm], **settings: Any) -> EndpointSpec:
    """An endpoint's spec for arms that share their settings.

    Args:
        settings: fields of :class:`serving.spec.ArmSpec` for all of them, or of the endpoint itself.

    Raises:
        UserError: one of them cannot be used.
    """
    own = {name: settings.pop(name) for name in list(settings) if name not in EndpointSpec.model_fields}
    return checked(arms={arm.name: {"source": arm.source, "weight": arm.weight, **own} for arm in arms}, **settings)


def _check_name(spec: EndpointSpec) -> None:
    if any(_is_ours(spec, name) for name in serve.status().applications):
        raise UserError(
            f"an endpoint {spec.name!r} already runs on this cluster; end it first, or give this one another name."
        )


def _check_room(spec: EndpointSpec) -> None:
    have = ray.cluster_resources()
    for what, field in (("CPU", "cpus"), ("GPU", "gpus")):
        needed = sum(getattr(arm, field) * arm.replicas.min for arm in spec.arms.values())
        if needed > have.get(what, 0.0):
            raise UserError(
                f"the {len(spec.arms)} arms need {needed:g} {what}, the cluster has {have.get(what, 0.0):g}; lower "
                f"their {field}, or serve fewer arms."
            )


def _check_memory(spec: EndpointSpec, models: Models) -> None:
    each = {name: arm_memory(arm, models[name]) for name, arm in spec.arms.items()}
    needed = sum(each[name] * arm.replicas.min for name, arm in spec.arms.items())
    there = ray.cluster_resources().get("memory", 0.0)
    if needed > there:
        arms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in each.items())
        raise UserError(
            f"the {len(spec.arms)} arms need {needed / GIB:.1f} GiB of memory at their peak ({arms}), Ray found "
            f"{there / GIB:.1f} GiB free when it started; serve fewer arms or smaller models, lower their slots, end "
            f"what else runs there, or set their memory."
        )


def claim(host: str, port: int) -> int:
    """The port to listen on; doors share it (SO_REUSEPORT) and would not notice a neighbour.

    Raises:
        UserError: it is taken, or the host is none of this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error}); give another port (0 takes a free one)."
            ) from error
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) != 0


def _answers(url: str) -> bool:
    try:
        # trust_env off: a proxy from the environment has no way to this address.
        return httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _are_in(traffic: Mapping[str, Any]) -> bool:
    """Whether each arm has said where it is; one that came late was taken out, and is let in when it answers."""
    return all(traffic["processes"].values()) and not traffic["out"]


def _is_ours(spec: EndpointSpec, application: str) -> bool:
    return application in (f"{spec.name}-control", f"{spec.name}-door") or arm_of(spec.name, application) is not None


def _take_down(spec: EndpointSpec) -> None:
    if not ray.is_initialized():
        return  # the cluster went first, and Serve with it; asking now would start a new one
    with _quiet():
        there = list(serve.status().applications)
        ours = [name for name in there if _is_ours(spec, name)]
        doors = [name for name in ours if name.endswith("-door")]
        # The doors first: what they have taken in is still answered, and the control hears of it.
        for name in doors:
            serve.delete(name)
        if len(ours) == len(there):
            serve.shutdown()
            return
        for name in ours:
            if name not in doors:
                serve.delete(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Serve tells its progress at INFO on the terminal; we have our own words for it."""
    log = logging.getLogger("ray.serve")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
