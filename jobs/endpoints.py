"""`stillhouse traffic`, `roll` and `ab`: the administration of a running endpoint, over its own HTTP API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from rich.console import Console
from rich.table import Table

from cluster.errors import RunError, UserError
from cluster.yaml_file import read_mapping

KEY_VARIABLE = "STILLHOUSE_API_KEY"
_TIMEOUT_S = 30.0
# A roll returns when the new model is loaded.
_ROLL_TIMEOUT_S = 900.0


class Administration:
    """One endpoint, as an administrator reaches it.

    Args:
        key: an admin key; None takes ``STILLHOUSE_API_KEY``, and without that none is sent.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is not an HTTP URL; give one like http://127.0.0.1:8000.")
        self._url = url.rstrip("/")
        self._session = requests.Session()
        # A proxy from the environment has no way to this machine's loopback.
        self._session.trust_env = "127.0.0.1" not in url and "localhost" not in url
        if key := key or os.environ.get(KEY_VARIABLE):
            self._session.headers["Authorization"] = f"Bearer {key}"

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> Any:
        """The answer, read as JSON where it is JSON.

        Raises:
            UserError: the endpoint refuses; it says why.
            RunError: it is not there, or fails.
        """
        try:
            response = self._session.request(method, f"{self._url}/admin/{path}", json=body, timeout=timeout_s)
        except requests.RequestException as error:
            raise RunError(f"{self._url} does not answer ({type(error).__name__}); is the endpoint up?") from error
        if response.headers.get("content-type", "").startswith("text/html"):
            return response.text
        try:
            answer = response.json()
        except ValueError as error:
            raise RunError(f"{self._url} answers, but not as a Stillhouse endpoint does.") from error
        if response.status_code != 200:
            message = answer.get("error", {}).get("message", response.text[:200])
            raise (UserError if response.status_code < 500 else RunError)(message)
        return answer

    def roll(self, arm: str, source: str) -> Any:
        """Have an arm answer by another model; returns when it does."""
        return self.ask("POST", f"arms/{quote(arm, safe='')}", {"source": source}, _ROLL_TIMEOUT_S)


def weights_of(texts: Sequence[str]) -> dict[str, float]:
    """``ARM=NUMBER`` texts as a mapping.

    Raises:
        UserError: one of them is none.
    """
    weights = {}
    for text in texts:
        arm, sign, number = text.rpartition("=")
        try:
            weights[arm] = float(number)
        except ValueError:
            sign = ""
        if not sign or not arm:
            raise UserError(f"{text!r} is no ARM=NUMBER, such as small=3.")
    return weights


def read_experiment(path: Path) -> dict[str, Any]:
    """An experiment's YAML file, as the endpoint wants it.

    Raises:
        UserError: it cannot be read, or holds no mapping.
    """
    return read_mapping(path, "an experiment is a YAML mapping with at least name, control and candidates")


def show_traffic(console: Console, traffic: Mapping[str, Any]) -> None:
    """The arms, their weights and what is the matter with them."""
    table = Table(box=None, pad_edge=False)
    for column in ("arm", "weight", "share", "shadow", "state"):
        table.add_column(column, justify="left" if column in ("arm", "state") else "right")
    total = sum(traffic["weights"].values())
    for arm, weight in traffic["weights"].items():
        shadow = traffic["shadow"].get(arm)
        state = f"out: {traffic['out'][arm]}" if arm in traffic["out"] else "serves"
        table.add_row(arm, f"{weight:g}", f"{weight / total:.0%}", f"{shadow:.0%}" if shadow else "", state)
    console.print(table)
    if traffic["experiment"]:
        console.print(f"experiment {traffic['experiment']} has the weights", highlight=False)


def show_experiment(console: Console, snapshot: Mapping[str, Any]) -> None:
    """How an experiment stands: its arms, what they are compared by, and what was decided."""
    spec = snapshot["spec"]
    metric, statistic = spec["metric"], spec["statistic"]
    table = Table(box=None, pad_edge=False)
    for column in ("arm", "state", "requests", "errors", f"{statistic} {metric}", "gain", "KL", "agreement"):
        table.add_column(column, justify="left" if column in ("arm", "state") else "right")
    for arm, facts in snapshot["arms"].items():
        seen, quality = facts["metrics"].get(metric) or {}, facts["quality"]
        versus = snapshot["comparisons"].get(arm, {}).get(statistic)
        table.add_row(
            arm,
            facts["state"].replace("_", " "),
            str(facts["requests"]),
            str(facts["errors"]),
            _between(seen.get(statistic), seen.get("intervals", {}).get(statistic), ".1f"),
            _between(versus and versus["gain"], versus and versus["interval"], ".1%"),
            f"{quality['kl']:.2f}" if quality else "",
            f"{quality['agreement']:.0%}" if quality else "",
        )
    console.print(table)
    last = [event for event in snapshot["events"] if event["what"] == "decision"]
    if last:
        console.print(last[-1]["text"], highlight=False)
    elif snapshot["ended"] is None:
        console.print(
            f"undecided; intervals hold at every look, with {spec['confidence']:.0%} confidence", highlight=False
        )


def _between(value: float | None, interval: Sequence[float | None] | None, form: str) -> str:
    if value is None:
        return ""
    low, high = interval or (None, None)
    shown = [format(end, form) if end is not None else "?" for end in (low, high)]
    return f"{value:{form}} ({shown[0]} to {shown[1]})"
