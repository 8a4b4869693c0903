"""How MLflow is reached: its client, and patience while it is away."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import tenacity
from pydantic import ValidationError

from cluster.errors import RunError, StillhouseError, UserError
from cluster.space import DISK_FULL
from cluster.spec import TrackingSpec
from cluster.specfile import home

log = logging.getLogger(__name__)

R = TypeVar("R")

# MLflow's own variable, which every other tool of the user's honours.
TRACKING_URI = "MLFLOW_TRACKING_URI"
CHALLENGER, CHAMPION = "challenger", "champion"
# How often MLflow's own HTTP client tries again. Of itself it would be silent for minutes.
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# How long a check before a start waits for an answer.
CHECK_S = 30.0
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


def tracking_uri_of_environment() -> str | None:
    """The tracking URI that ``MLFLOW_TRACKING_URI`` sets; None where it is not set.

    Raises:
        UserError: it is none that Stillhouse can use, such as a folder.
    """
    given = os.environ.get(TRACKING_URI) or None
    try:
        return TrackingSpec(uri=given).uri
    except ValidationError as error:
        allowed = error.errors()[0]["msg"].removeprefix("Value error, ")
        # Without what stands behind the scheme, which may hold a password.
        scheme = str(given).partition("://")[0]
        raise UserError(f"{TRACKING_URI}: got {scheme!r}; {allowed}; change it, or unset it") from None


def default_tracking_uri() -> str:
    """The MLflow of whoever names none: ``MLFLOW_TRACKING_URI``, else SQLite under the Stillhouse home."""
    return tracking_uri_of_environment() or f"sqlite:///{home() / 'mlflow.db'}"


def client_of(tracking_uri: str) -> Any:
    """MLflow's client; its registry is where its runs are."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    given = os.environ.get(TRACKING_URI)
    mlflow.set_tracking_uri(tracking_uri)
    # MLflow has written it into the environment, where the next reader would take it for the user's own.
    os.environ.pop(TRACKING_URI, None)
    if given is not None:
        os.environ[TRACKING_URI] = given
    return mlflow.MlflowClient(tracking_uri)


def experiment_id_of(client: Any, tracking_uri: str, name: str) -> str | None:
    """Id of an experiment that runs can be added to; None where there is none of this name yet.

    Raises:
        UserError: it is deleted. MLflow keeps the name, so another cannot be made either.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment: {name!r} is deleted in MLflow {shown(tracking_uri)}; set another name, or restore "
            f"it with: MLFLOW_TRACKING_URI={shown(tracking_uri)} mlflow experiments restore --experiment-id "
            f"{found.experiment_id}"
        )
    return None if found is None else str(found.experiment_id)


def check_experiment(tracking_uri: str, name: str) -> str | None:
    """Check before a start that runs can be added to an experiment; makes nothing.

    Returns:
        Why that is not known, in one line; None where it is. A run waits for an MLflow that is away.

    Raises:
        UserError: it is deleted.
        RefusedError: MLflow refuses.
    """
    if is_unmade(tracking_uri):
        return None
    import mlflow  # noqa: F401  # takes seconds, which are not MLflow's silence

    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            with one_try(tracking_uri):
                experiment_id_of(client_of(tracking_uri), tracking_uri, name)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(None)

    try:
        with few_retries():
            # From a thread, because a client of a database that is away tries for hours.
            threading.Thread(target=ask, daemon=True).start()
            error = answers.get(timeout=CHECK_S)
    except Empty:
        return f"MLflow {shown(tracking_uri)} has not answered for {CHECK_S:g} s; a run waits for it"
    if isinstance(error, AwayError):
        return f"{error}; a run waits for it"
    if error is not None:
        raise error
    return None


@contextlib.contextmanager
def few_retries() -> Iterator[None]:
    """Have MLflow's HTTP client give up after seconds, unless the user has set how often it tries."""
    hurried = RETRIES not in os.environ
    os.environ.setdefault(RETRIES, "1")
    try:
        yield
    finally:
        if hurried:
            del os.environ[RETRIES]


def is_unmade(tracking_uri: str) -> bool:
    """Whether it is a database file that the first run will make; asking it would make it."""
    kind, _, file = tracking_uri.partition(":///")
    return kind.startswith("sqlite") and not Path(file.partition("?")[0]).exists()


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
        RefusedError: MLflow, or its database, refuses. Both are one line, without credentials.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except StillhouseError:
        raise
    except Exception as error:
        where = shown(tracking_uri)
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(tracking_uri, where)
        if is_away(error):
            raise AwayError(f"MLflow {where} does not answer: {reason}") from error
        if isinstance(error, MlflowException | DatabaseError):
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
