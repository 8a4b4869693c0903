"""How MLflow is reached: its client, and patience while it is away."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tenacity

from cluster.errors import RunError, StillhouseError
from cluster.space import DISK_FULL

log = logging.getLogger(__name__)

R = TypeVar("R")

CHALLENGER, CHAMPION = "challenger", "champion"
# How long MLflow may be away. Its own client gives up after some two minutes, and a database at once.
PATIENCE_S = 3600.0
# What MLflow calls an error that is not the caller's.
TRANSIENT = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
# What it calls a model, a version or a run that is not there.
MISSING = "RESOURCE_DOES_NOT_EXIST"
# What it calls one that is there already.
EXISTS = "RESOURCE_ALREADY_EXISTS"


def client_of(tracking_uri: str) -> Any:
    """MLflow's client; its registry is where its runs are."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    return mlflow.MlflowClient(tracking_uri)


class AwayError(RunError):
    """MLflow, or the store of its artifacts, cannot be reached or has no room: another try may succeed."""


class RefusedError(RunError):
    """MLflow refuses a request: another try would be refused too."""


def is_away(error: BaseException) -> bool:
    """Whether an error means that MLflow or its artifact store cannot be reached or has no room, not that it refuses.

    What MLflow itself reports decides; other libraries wrap the error of a connection, which is then looked for.
    """
    if (code := getattr(error, "error_code", None)) is not None:
        return code in TRANSIENT
    each: BaseException | None = error
    while each is not None:
        if _is_passing(each):
            return True
        each = each.__cause__ or each.__context__
    return False


def _is_passing(error: BaseException) -> bool:
    """Whether this error alone, without what caused it, may pass."""
    import requests
    from botocore.exceptions import ConnectionError as S3ConnectionError
    from botocore.exceptions import HTTPClientError
    from sqlalchemy.exc import OperationalError

    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    of_requests, of_s3 = (requests.ConnectionError, requests.Timeout), (S3ConnectionError, HTTPClientError)
    if (
        # MLflow hands on a database's own error while its client is made.
        isinstance(error, (ConnectionError, TimeoutError, OperationalError, *of_requests, *of_s3))
        or getattr(error, "error_code", None) in TRANSIENT
    ):
        return True
    # An HTTP answer, as requests and botocore keep it.
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(answer, "status_code", None)
    return status is not None and (status == 429 or status >= 500)


@contextlib.contextmanager
def one_try(tracking_uri: str) -> Iterator[None]:
    """Work with MLflow that the caller makes again itself.

    Raises:
        AwayError: MLflow is away.
        RefusedError: MLflow refuses. Both are one line, without credentials.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except StillhouseError:
        raise
    except Exception as error:
        where = shown(tracking_uri)
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(tracking_uri, where)
        if is_away(error):
            raise AwayError(f"MLflow {where} does not answer: {reason}") from error
        if isinstance(error, MlflowException):
            raise RefusedError(f"MLflow {where} refuses: {reason}") from error
        raise


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
