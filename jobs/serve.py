"""`stillhouse serve`: students behind one endpoint, until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.specfile import home
from jobs.console import quiet

if TYPE_CHECKING:
    from serving.spec import EndpointSpec

# Between two looks at the arms.
WATCH_S = 2.0


def serve(spec: EndpointSpec, tracking_uri: str | None) -> None:
    """Check the arms, deploy them, and hold the endpoint until the process is told to end.

    Raises:
        UserError: an arm, a name or the port cannot be used. Nothing has been started.
    """
    from cluster.registry import default_tracking_uri
    from jobs.contexts import context_for
    from serving.keys import KeyRing
    from serving.models import find_models

    uri = tracking_uri or context_for(None, None).tracking_uri or default_tracking_uri()
    KeyRing(spec.keys)
    # Found and checked here, before a cluster is started for them.
    spec, models = find_models(spec, uri)
    home().mkdir(parents=True, exist_ok=True)
    log = home() / "serve.log"
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    from cluster.session import ray_session
    from serving.deploy import deploy
    from serving.watch import ArmWatch

    if spec.state is None:
        spec = spec.model_copy(update={"state": home() / "endpoints" / spec.name})
    with quiet(log) as console, ray_session():
        if ended.is_set():
            return
        console.print(f"starting {len(spec.arms)} arms, log {log}", highlight=False)
        watch = ArmWatch(spec.name, lambda: endpoint.ask("traffic", timeout_s=WATCH_S)["out"])
        with deploy(spec, uri, models=models) as endpoint:
            _tell(console, endpoint.url, spec)
            while not ended.wait(WATCH_S):
                for line in watch.look():
                    console.print(line, highlight=False, markup=False)
            console.print("ending")


def _tell(console: Console, url: str, spec: EndpointSpec) -> None:
    arms = ", ".join(spec.arms)
    console.print(f"{url}/v1 answers as {spec.name!r} (split by weight) and as {arms}", highlight=False)
    console.print("Ctrl-C ends it", highlight=False)
