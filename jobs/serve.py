"""`stillhouse serve`: students behind one endpoint, until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from cluster.specfile import home
from jobs.console import quiet


def serve(
    arms: Sequence[str],
    host: str,
    port: int,
    name: str,
    cpus_per_arm: float,
    gpus_per_arm: float,
    tracking_uri: str | None,
) -> None:
    """Check the arms, deploy them, and hold the endpoint until the process is told to end.

    Raises:
        UserError: an arm, a name or the port cannot be used. Nothing has been started.
    """
    from serving.arms import locate, parse_arms

    uri = tracking_uri or f"sqlite:///{home() / 'mlflow.db'}"
    # Found and checked here, before a cluster is started for them.
    parsed = [replace(arm, source=str(locate(arm, uri))) for arm in parse_arms(arms)]
    home().mkdir(parents=True, exist_ok=True)
    log = home() / "serve.log"
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    from cluster.session import ray_session
    from serving.deploy import deploy

    with quiet(log) as console, ray_session():
        if ended.is_set():
            return
        console.print(f"starting {len(parsed)} arms, log {log}", highlight=False)
        with deploy(
            parsed,
            host=host,
            port=port,
            endpoint=name,
            tracking_uri=uri,
            cpus_per_arm=cpus_per_arm,
            gpus_per_arm=gpus_per_arm,
        ) as endpoint:
            _tell(console, endpoint.url, name, [arm.name for arm in parsed])
            ended.wait()
            console.print("ending")


def _tell(console: Console, url: str, name: str, arms: Sequence[str]) -> None:
    console.print(f"{url}/v1 answers as {name!r} (split by weight) and as {', '.join(arms)}", highlight=False)
    console.print("Ctrl-C ends it", highlight=False)
