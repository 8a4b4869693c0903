"""How MLflow is reached: its client, and patience while it is away."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from cluster.space import DISK_FULL

log = logging.getLogger(__name__)

R = TypeVar("R")

CHALLENGER, CHAMPION = "challenger", "champion"
# How long MLflow may be away. Its own client gives up after some two minutes, and a database at once.
PATIENCE_S = 3600.0
# What MLflow calls an error that is not the caller's.
TRANSIENT = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
# What it calls a model, a version or a run that is not there.
MISSING = "RESOURCE_DOES_NOT_EXIST"


def client_of(tracking_uri: str) -> Any:
    """MLflow's client; its registry is where its runs are."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    return mlflow.MlflowClient(tracking_uri)


def is_away(error: BaseException) -> bool:
    """Whether an error says that MLflow cannot be reached or has no room, rather than that it refuses."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return isinstance(error, ConnectionError) or getattr(error, "error_code", None) in TRANSIENT


def patiently(work: Callable[[], R], patience_s: float = PATIENCE_S) -> R:
    """Do some work with MLflow, again and again while it is away: what it should know is late then, not lost."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_away),
        wait=tenacity.wait_exponential_jitter(multiplier=1.0, max=30.0),
        stop=tenacity.stop_after_delay(patience_s),
        before_sleep=tenacity.before_sleep_log(log, logging.WARNING),
        reraise=True,
    )
    return retrying(work)


def shown(uri: str) -> str:
    """A tracking URI without a user, a password or parameters, which may hold one too."""
    scheme, _, rest = uri.partition("://")
    if scheme.startswith("sqlite"):
        return uri
    # To the last @: one in the path costs the host's name, a password with a slash in it would be shown otherwise.
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
