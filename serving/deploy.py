"""Brings arms up behind one endpoint on the Ray cluster that the caller is connected to, and takes them down."""

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig

from cluster.errors import RunError, UserError
from serving.arm_server import ArmServer
from serving.arms import Arm, check_arms, check_weights, locate
from serving.ingress import Ingress

_POLL_S = 0.1
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


@dataclass(frozen=True)
class Settings:
    """How much one arm may use. Counts are per arm.

    ``concurrency`` requests run at the same time (each is its own ``generate``, so on a CPU more of them only share
    the same cores), ``queue`` more wait; the next is told 503.
    """

    cpus: float = 0.5
    gpus: float = 0.0
    dtype: str = "auto"
    concurrency: int = 4
    queue: int = 32
    start_timeout_s: float = 300.0

    @property
    def threads(self) -> int:
        """Torch threads of an arm's process."""
        return max(1, int(self.cpus))


@dataclass
class Endpoint:
    """A running endpoint; leave it by :meth:`shutdown` or as a context manager."""

    url: str
    """Base URL, like ``http://127.0.0.1:8000``; OpenAI clients take ``url + "/v1"``."""
    name: str
    """The model name that means "split by weight"."""
    arms: tuple[Arm, ...]
    _models: Mapping[str, Path]
    _settings: Settings
    _version: str = field(default_factory=lambda: uuid.uuid4().hex)
    _down: bool = False

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the arms' weights without restarting anything; arms not named keep theirs. Returns when in force.

        Raises:
            UserError: an unknown arm, or weights nothing can be drawn by. Nothing has changed.
            RunError: the endpoint did not take them.
        """
        unknown = sorted(set(weights) - {arm.name for arm in self.arms})
        if unknown:
            raise UserError(f"no arm is named {unknown[0]!r}; there are: {', '.join(arm.name for arm in self.arms)}.")
        arms = tuple(replace(arm, weight=weights.get(arm.name, arm.weight)) for arm in self.arms)
        check_weights({arm.name: arm.weight for arm in arms})
        self.arms = arms
        self._apply()

    def shutdown(self) -> None:
        """Stop answering and end every process of the endpoint; the port is free when this returns."""
        if self._down:
            return
        self._down = True
        _stop_serve()
        host, port = httpx.URL(self.url).host, httpx.URL(self.url).port
        assert port is not None
        _wait("the port to close", 15.0, lambda: _is_free(host, port))

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _apply(self) -> None:
        """Make the cluster run what this object describes, and wait until it answers so."""
        with _quiet():
            target = serve.RunTarget(self._application(), name=self.name, route_prefix="/", logging_config=_QUIET)
            serve.run_many([target], wait_for_applications_running=False)
            _wait("the arms to start", self._settings.start_timeout_s, self._is_running)
            _wait("the endpoint to answer", 30.0, self._answers)

    def _application(self) -> Any:
        settings = self._settings
        handles = {
            arm.name: self._deployment(
                serve.deployment(ArmServer),
                name=f"arm-{arm.name}",
                max_ongoing_requests=settings.concurrency,
                max_queued_requests=settings.queue,
                ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
                health_check_period_s=10,
                health_check_timeout_s=60,  # its one token may wait for a long prompt on a busy CPU
            ).bind(self._models[arm.name], settings.dtype, settings.threads)
            for arm in self.arms
        }
        return self._deployment(
            Ingress,
            name="ingress",
            # It only relays; how much is let in is decided at each arm.
            max_ongoing_requests=1000,
            ray_actor_options={"num_cpus": 0},
            user_config={"weights": {arm.name: arm.weight for arm in self.arms}},
        ).bind(self.name, handles)

    def _deployment(self, deployment: Any, **options: Any) -> Any:
        # Serve gives every run of a deployment a new random version and would restart every replica for a change of
        # weights; with a version that stays, only the changed user_config is sent. No public way sets it.
        return deployment.options(
            graceful_shutdown_timeout_s=5,
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=2,
            version=self._version,
            _internal=True,
            **options,
        )

    def _is_running(self) -> bool:
        app = serve.status().applications.get(self.name)
        if app is None:
            return False
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            why = [d.message.strip() for d in app.deployments.values() if d.message.strip()] or [app.message]
            raise RunError(f"an arm did not start: {why[0].splitlines()[-1].strip()} (the Ray logs have the rest).")
        return bool(app.status == "RUNNING")

    def _answers(self) -> bool:
        try:
            # trust_env off: a proxy from the environment has no way to this address.
            response = httpx.get(f"{self.url}/healthz", timeout=5.0, trust_env=False)
        except httpx.HTTPError:
            return False
        return response.status_code == 200 and response.json()["weights"] == {a.name: a.weight for a in self.arms}


def deploy(
    arms: Sequence[Arm],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    endpoint: str = "stillhouse",
    tracking_uri: str | None = None,
    cpus_per_arm: float = 0.5,
    gpus_per_arm: float = 0.0,
    dtype: str = "auto",
    concurrency_per_arm: int = 4,
    queue_per_arm: int = 32,
    start_timeout_s: float = 300.0,
) -> Endpoint:
    """Serve the arms behind one endpoint; returns when it answers.

    ``ray.init`` has been done by the caller. Everything is checked, and every model fetched, before anything
    starts; if the start fails, what had started is taken down again.

    Args:
        arms: from :func:`serving.arms.parse_arms`.
        host: address to listen on. Anything but loopback is open to whoever reaches it: there are no API keys yet.
        port: 0 takes a free one.
        endpoint: the model name that means "split by weight".
        tracking_uri: where the registry is; needed when a source is a ``models:/`` URI.
        cpus_per_arm: CPUs an arm's process reserves; its whole part, at least 1, is its number of torch threads.
        gpus_per_arm: GPUs an arm's process reserves; with 0 it runs on the CPU.
        dtype: "auto" (as each model is stored), "float32", "bfloat16" or "float16". Give one to compare latencies:
            a model stored in another precision than its neighbour is another race.
        concurrency_per_arm: requests that run at the same time.
        queue_per_arm: requests that wait beyond these; one more gets 503.
        start_timeout_s: how long loading the models may take.

    Raises:
        UserError: an arm, a name or the port cannot be used, or the cluster is too small. Nothing has been started.
        RunError: the arms were started and did not come up. Nothing is left running.
    """
    arms = tuple(arms)
    check_arms(arms)
    if endpoint in {arm.name for arm in arms}:
        raise UserError(f"an arm has the endpoint's name {endpoint!r}; give the arm another: NAME=SOURCE.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r} is not known; allowed: auto, float32, bfloat16, float16.")
    settings = Settings(cpus_per_arm, gpus_per_arm, dtype, concurrency_per_arm, queue_per_arm, start_timeout_s)
    _check_cluster(len(arms), settings)
    port = _claim(host, port)
    models = {arm.name: locate(arm, tracking_uri) for arm in arms}

    running = Endpoint(f"http://{host}:{port}", endpoint, arms, models, settings)
    try:
        with _quiet():
            serve.start(ProxyLocation.HeadOnly, {"host": host, "port": port}, logging_config=_QUIET)
        running._apply()
    except BaseException:  # Ctrl-C too: nothing is left behind
        running.shutdown()
        raise
    return running


def _check_cluster(arms: int, settings: Settings) -> None:
    if serve.status().proxies:
        raise UserError(
            "Ray Serve already runs on this cluster; shut that endpoint down first, or use another cluster."
        )
    have = ray.cluster_resources()
    for what, option, each in (("CPU", "cpus_per_arm", settings.cpus), ("GPU", "gpus_per_arm", settings.gpus)):
        if arms * each > have.get(what, 0.0):
            raise UserError(
                f"{arms} arms with {option} {each:g} need {arms * each:g} {what}, the cluster has "
                f"{have.get(what, 0.0):g}; lower {option} or serve fewer arms."
            )


def _claim(host: str, port: int) -> int:
    """The port to listen on; Serve's own listener shares ports (SO_REUSEPORT) and would not notice a neighbour."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error}); give another port (0 takes a free one)."
            ) from error
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) != 0


def _stop_serve() -> None:
    if not ray.is_initialized():
        return  # the cluster went first, and Serve with it; asking now would start a new one
    with _quiet():
        serve.shutdown()


def _wait(what: str, timeout_s: float, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RunError(f"waited {timeout_s:g} s for {what}; the Ray logs say what held it up.")
        time.sleep(_POLL_S)


@contextmanager
def _quiet() -> Iterator[None]:
    """Serve tells its progress at INFO on the terminal; we have our own words for it."""
    log = logging.getLogger("ray.serve")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
