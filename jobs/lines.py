"""Lines that a run says and that others read from its job's log."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

# How a line of progress begins, such as ``[3:20] distilling | ...``.
PROGRESS = "["
_RUN = re.compile(r"^run ([A-Za-z0-9._-]+)(?: of [0-9-]+)?, log ", re.MULTILINE)
_PROMOTION = re.compile(r"^promotion: .*$", re.MULTILINE)


def run_line(name: str, log: Path, ds: date | None) -> str:
    """How a run names itself once it has its place, with its date where that decides what it reads."""
    return f"run {name}{f' of {ds}' if ds else ''}, log {log}"


def run_in(text: str) -> str | None:
    """The name of the run that a log is of, once it has said so."""
    found = _RUN.search(text)
    return found[1] if found else None


def progress_in(text: str) -> str | None:
    """The last line of progress in a log."""
    return next((line for line in reversed(text.splitlines()) if line.startswith(PROGRESS)), None)


def promotions_in(text: str) -> list[str]:
    """What a run says of each student that was to be promoted."""
    return _PROMOTION.findall(text)


def last_line(text: str) -> str:
    """The last thing that a log says; for a job that failed, why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"
