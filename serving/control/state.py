"""What the control keeps over a restart of its process: the traffic, and the experiments' records."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import RunError

_TRAFFIC = "traffic.json"

logger = logging.getLogger("ray.serve")


class State:
    """A folder of small files, each written whole or not at all. Without a folder nothing is kept.

    What is kept raises RunError where the folder cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def traffic(self) -> dict[str, Any]:
        """What :meth:`keep_traffic` was given last; empty before."""
        return self._read(_TRAFFIC)

    def keep_traffic(self, traffic: Mapping[str, Any]) -> None:
        """Put the traffic down."""
        self._write(_TRAFFIC, traffic)

    def experiment(self, name: str) -> dict[str, Any]:
        """The record of an experiment, with every value; empty where there is none."""
        return self._read(f"experiment-{name}.json")

    def keep_experiment(self, name: str, snapshot: Mapping[str, Any]) -> None:
        """Put an experiment's record down."""
        self._write(f"experiment-{name}.json", snapshot)

    def _read(self, name: str) -> dict[str, Any]:
        if self._folder is None or not (self._folder / name).exists():
            return {}
        try:
            read: dict[str, Any] = json.loads((self._folder / name).read_text())
        except ValueError:
            # A machine that went down at the wrong moment leaves such a file; the endpoint must start all the same.
            logger.exception("%s cannot be read; it counts as empty", self._folder / name)
            return {}
        return read

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        aside = self._folder / f".{name}.part"
        try:
            aside.write_text(json.dumps(content))
            aside.replace(self._folder / name)
        except OSError as error:
            raise RunError(f"{self._folder / name} cannot be written: {error}") from error
