"""Tells a webhook how a run has ended."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import requests
import tenacity

from cluster.evaluate.result import FamilyResult
from cluster.preflight import Checked
from cluster.registry import shown
from cluster.runs import Run
from cluster.spec import Event, NotifySpec
from cluster.spec.notify import is_loopback

log = logging.getLogger(__name__)

CONNECT_S, READ_S = 5.0, 10.0
# For all tries together. Whoever has stopped a run waits for its end.
PATIENCE_S = 60.0
STOPPED_PATIENCE_S = 20.0
LONGEST_WAIT_S = 10.0


@dataclass(frozen=True)
class Facts:
    """What a webhook is told of a run.

    Attributes:
        ds: the date of its corpus, YYYY-MM-DD.
        status: how the run ended: succeeded, failed or stopped.
        students: those that are finished or registered, each with ``name``, ``model``, ``version`` (null if it is not
            registered), and from the held-out text ``kl_before`` and ``kl`` (nats per token), ``agreement`` (share) and
            ``perplexity``, where they are known.
        error: why it failed, in one line.
        verdicts: what was decided about the students, such as whom a gate promoted, one line each.
        mlflow: tracking URI, without credentials.
    """

    family: str
    run: str
    ds: str
    status: str
    students: Sequence[dict[str, Any]]
    error: str | None
    verdicts: Sequence[str]
    mlflow: str


def facts_of(
    checked: Checked,
    run: Run,
    status: str,
    result: FamilyResult | None = None,
    error: str | None = None,
    verdicts: Sequence[str] = (),
) -> Facts:
    """The facts of a run, with a result or, where it broke off, without one."""
    spec = checked.spec
    students = [
        {"name": name, "model": spec.model_name(name), "version": run.versions.get(name), **_figures(name, result)}
        for name in spec.students
        if name in run.versions or (result is not None and name in result.students)
    ]
    uri, mlflow = checked.tracking_uri, shown(checked.tracking_uri)
    # MLflow's own errors quote the URI with all that is in it.
    line = None if error is None else " ".join(error.replace(uri, mlflow).split())
    return Facts(spec.name, run.name, run.ds, status, students, line, list(verdicts), mlflow)


def _figures(name: str, result: FamilyResult | None) -> dict[str, float | None]:
    if result is None or name not in result.students:
        return dict.fromkeys(("kl_before", "kl", "agreement", "perplexity"))
    before, after = result.students[name].before, result.students[name].after
    found = {
        "kl_before": before.kl,
        "kl": after.kl,
        "agreement": after.agreement,
        "perplexity": after.student_perplexity,
    }
    # JSON has no word for a figure that is not finite.
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def notify(spec: NotifySpec | None, event: Event, facts: Facts) -> str | None:
    """POST one event to the webhook, if the spec has one that wants to hear of it.

    It is tried again for about a minute when there is no connection or the answer is 429 or 5xx. Redirects are not
    followed. With ``secret_env`` the header ``X-Stillhouse-Signature`` holds ``sha256=`` and the hex HMAC-SHA256, under
    the secret, of ``X-Stillhouse-Timestamp`` (seconds since 1970), a dot, and the body. All tries of one event have the
    same ``X-Stillhouse-Delivery``.

    Returns:
        Why the webhook could not be told, in one line that is in the log too; none when it was, or need not be.
    """
    if spec is None or event not in spec.events:
        return None
    # Neither the path, which may be all that protects the receiver, nor anything of the secret is ever shown.
    host = urlsplit(spec.webhook).hostname or ""
    body = json.dumps({"event": event, **asdict(facts), "time": datetime.now(UTC).isoformat(timespec="seconds")})
    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, _NotToldError) and error.may_pass),
        wait=tenacity.wait_random_exponential(multiplier=1.0, max=LONGEST_WAIT_S),
        # The last try must have its time too.
        stop=tenacity.stop_before_delay(
            (STOPPED_PATIENCE_S if event == "stopped" else PATIENCE_S) - CONNECT_S - READ_S
        ),
        reraise=True,
    )
    try:
        with requests.Session() as session:
            # No proxy leads to this machine itself.
            session.trust_env = not is_loopback(host)
            tries(_post, session, spec.webhook, body.encode(), _headers(spec, body.encode()))
    except _NotToldError as error:
        count = tries.statistics["attempt_number"]
        again = f", after {count} tries" if count > 1 else ""
        line = f"warning: the webhook at {host} was not told of {event!r}: {error}{again}"
        log.warning(line)
        return line
    return None


class _NotToldError(Exception):
    """The webhook was not told; ``may_pass`` says whether another try may do it."""

    def __init__(self, reason: str, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


def _headers(spec: NotifySpec, body: bytes) -> dict[str, str]:
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"stillhouse/{version('stillhouse')}",
        "X-Stillhouse-Delivery": str(uuid.uuid4()),
        "X-Stillhouse-Timestamp": timestamp,
    }
    if spec.secret_env is not None:
        secret = os.fsencode(os.environ[spec.secret_env])
        signed = hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
        headers["X-Stillhouse-Signature"] = f"sha256={signed}"
    return headers


def _post(session: requests.Session, url: str, body: bytes, headers: dict[str, str]) -> None:
    """One try.

    Raises:
        _NotToldError: it came to nothing. What requests says of it has the whole URL in it and is left out.
    """
    try:
        # Streamed, because what the answer holds does not matter, and a long one would hold us up.
        with session.post(
            url, data=body, headers=headers, timeout=(CONNECT_S, READ_S), allow_redirects=False, stream=True
        ) as answer:
            status = answer.status_code
    except requests.exceptions.SSLError:
        raise _NotToldError("no TLS connection that can be trusted", may_pass=False) from None
    except requests.ConnectTimeout:
        raise _NotToldError(f"no connection within {CONNECT_S:g} s", may_pass=True) from None
    except requests.ConnectionError:
        raise _NotToldError("no connection", may_pass=True) from None
    except requests.Timeout:
        # It may have been told all the same.
        raise _NotToldError(f"no answer within {READ_S:g} s", may_pass=False) from None
    except (OSError, ValueError) as error:  # of requests' own kinds, of a bundle of certificates, of a host's name
        raise _NotToldError(f"{type(error).__name__}", may_pass=False) from None
    if 300 <= status < 400:
        raise _NotToldError(f"it answered {status}; redirects are not followed, give the final URL", may_pass=False)
    if not 200 <= status < 300:
        raise _NotToldError(f"it answered {status}", may_pass=status == 429 or status >= 500)
