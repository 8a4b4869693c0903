"""The cluster's side of `stillhouse schedule`: takes one request, works on the ledger, and prints one answer.

A laptop reaches a cluster through its job server only, so a request comes as a job of its own:
``python -m jobs.schedules.desk REQUEST``, see :mod:`jobs.schedules.remote`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cluster.errors import StillhouseError
from jobs.schedules import ANSWER
from jobs.schedules.ledger import Entry, Ledger, Night
from jobs.schedules.plan import OPEN, Schedule
from jobs.schedules.scheduler import packed

NEXT_SHOWN = 3


def add(ledger: Ledger, definition: dict[str, Any], family: str, user: str, variables: dict[str, str]) -> Any:
    """Keep a schedule whose family lies in the working directory; nights count from now on."""
    schedule, now = Schedule.model_validate(definition), datetime.now(UTC)
    entry = Entry(schedule, family, packed(Path.cwd()), variables, user, paused=False, looked_at=now)
    return {"replaced": ledger.add(entry), **_state(ledger)}


def ls(ledger: Ledger) -> Any:
    """All schedules, each with when it is due next and how its last night stands."""
    return {"schedules": [_facts(ledger, entry) for entry in ledger.entries()], **_state(ledger)}


def show(ledger: Ledger, name: str) -> Any:
    """All that is known of one schedule, and the spec that it runs."""
    entry = ledger.entry(name)
    upcoming = [due.isoformat() for due in itertools.islice(entry.schedule.fires(datetime.now(UTC)), NEXT_SHOWN)]
    return {**_facts(ledger, entry), **entry.schedule.model_dump(), "upcoming": upcoming, **_state(ledger)}


def pause(ledger: Ledger, name: str, paused: bool) -> Any:
    """Have a schedule rest, or go on."""
    ledger.pause(name, paused, datetime.now(UTC))
    return _state(ledger)


def rm(ledger: Ledger, name: str) -> Any:
    """Forget a schedule; a night that runs goes on, and its history stays."""
    running = [night.job for night in ledger.nights(name, OPEN) if night.job]
    ledger.remove(name)
    return {"running": running, **_state(ledger)}


def run_now(ledger: Ledger, name: str) -> Any:
    """One more night, at once."""
    return {"due": ledger.run_now(name, datetime.now(UTC)).due.isoformat(), **_state(ledger)}


def history(ledger: Ledger, name: str | None, most: int) -> Any:
    """Nights, the latest first; also of schedules that were removed."""
    return {"nights": [_row(night) for night in ledger.nights(name, most=most)], **_state(ledger)}


REQUESTS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (add, ls, show, pause, rm, run_now, history)
}


def _state(ledger: Ledger) -> dict[str, Any]:
    """Whether there is a scheduler, of which every answer speaks."""
    return {"scheduler": ledger.holder(datetime.now(UTC))}


def _facts(ledger: Ledger, entry: Entry) -> dict[str, Any]:
    schedule = entry.schedule
    last = ledger.nights(schedule.name, most=1)
    due = None if entry.paused else next(iter(schedule.fires(datetime.now(UTC)))).isoformat()
    return {
        "name": schedule.name,
        "family": entry.family,
        "user": entry.user,
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "paused": entry.paused,
        "next": due,
        "last": _row(last[0]) if last else None,
    }


def _row(night: Night) -> dict[str, Any]:
    row = {key: value for key, value in asdict(night).items() if key not in ("id", "not_before")}
    took = night.ended - night.started if night.ended and night.started else None
    moments = {key: value.isoformat() for key, value in row.items() if isinstance(value, datetime)}
    return {**row, **moments, "took": str(took - timedelta(microseconds=took.microseconds)) if took else None}


def answer(request: str) -> str:
    """The answer to a request, both JSON; a mistake is an answer too."""
    try:
        asked = json.loads(request)
        found = REQUESTS[asked.pop("request")](Ledger(), **asked)
    except StillhouseError as error:
        found = {"error": str(error), "exit_code": error.exit_code}
    return json.dumps(found)


if __name__ == "__main__":
    print(ANSWER + answer(sys.argv[1]), flush=True)  # noqa: T201
