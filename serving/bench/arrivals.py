"""When requests are due: Poisson arrivals of a rate, or the moments that a trace recorded."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError

TRACE_FORM = (
    "JSONL, or CSV with a header: `at` in seconds, and where wanted `prompt_tokens` and `max_tokens` "
    "(or `completion_tokens`); other fields are ignored, the earliest `at` is the start"
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """``at`` seconds after the run's start one request is due; lengths of None are those of the settings."""

    at: float
    prompt_tokens: int | None = None
    max_tokens: int | None = None


def poisson(rate: float, seed: int) -> Iterator[Arrival]:
    """Arrivals without end whose gaps are independent and exponential with mean 1/``rate`` seconds."""
    rng = np.random.default_rng([seed, 0])
    at = 0.0
    while True:
        for gap in rng.exponential(1 / rate, size=256):
            at += float(gap)
            yield Arrival(at)


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals of a file in the form :data:`TRACE_FORM`, in the order of time.

    Raises:
        UserError: the file cannot be read, or a line of it is no arrival.
    """
    rows = _rows(path)
    arrivals = []
    for line, row in rows:
        where = f"{path} line {line}"
        lengths = row.get("max_tokens", row.get("completion_tokens"))
        arrivals.append(Arrival(_moment(row, where), _length(row.get("prompt_tokens"), where), _length(lengths, where)))
    if not arrivals:
        raise UserError(f"{path} has no arrivals; a trace is {TRACE_FORM}.")
    arrivals.sort(key=lambda arrival: arrival.at)
    start = arrivals[0].at
    return [Arrival(arrival.at - start, arrival.prompt_tokens, arrival.max_tokens) for arrival in arrivals]


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """(line number, fields) of each line that holds something."""
    lines = read_lines(path)
    if not lines:
        return []
    if lines[0][1].startswith("{"):
        return [(number, json_line(path, number, line)) for number, line in lines]
    reader = csv.DictReader(line for _, line in lines)
    if "at" not in (reader.fieldnames or ()):
        raise UserError(f"{path} has no column `at`; a trace is {TRACE_FORM}.")
    return [(lines[reader.line_num - 1][0], row) for row in reader]


def _moment(row: Mapping[str, Any], where: str) -> float:
    try:
        at = float(row["at"])
    except (KeyError, TypeError, ValueError):
        at = math.nan
    if not math.isfinite(at):
        raise UserError(f"{where}: `at` is {row.get('at')!r}; allowed: a number of seconds.")
    return at


def _length(value: Any, where: str) -> int | None:
    if value in (None, ""):
        return None
    try:
        length = int(value)
    except (TypeError, ValueError):
        length = -1
    if length < 0:
        raise UserError(f"{where}: a length is {value!r}; allowed: a whole number of tokens.")
    return length or None  # a failed request of a recorded run has no tokens


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text without the spaces around it) of a UTF-8 file's lines that hold something.

    Raises:
        UserError: there is no such file, or it is not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {why}.") from error
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    """One line of a JSONL file.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} is not a JSON object.")
    return row
