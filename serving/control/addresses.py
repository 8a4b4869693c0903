"""Where the arms' processes listen, by what they and the doors say."""

from __future__ import annotations

import time
from collections.abc import Iterable

# Seconds after which a process that says nothing counts as gone; its machine is, or it would have closed its
# connections. Long, for a machine may be busy.
SILENT_S = 20.0


class Addresses:
    """Of every application, its processes' addresses and when each was heard of last."""

    def __init__(self) -> None:
        self._heard: dict[str, dict[str, float]] = {}

    def hear(self, route: str, address: str) -> None:
        """A process says where it listens."""
        self._heard.setdefault(route, {})[address] = time.monotonic()

    def lose(self, address: str) -> None:
        """Somebody has found nobody there. If somebody is, it will say so within a second."""
        for addresses in self._heard.values():
            addresses.pop(address, None)

    def drop_silent(self) -> frozenset[str]:
        """Forget, and return, those of whom nothing was heard for long: their machine may be cut off."""
        late = time.monotonic() - SILENT_S
        gone = frozenset(each for heard in self._heard.values() for each, at in heard.items() if at < late)
        for address in gone:
            self.lose(address)
        return gone

    def of(self, routes: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The addresses of some applications."""
        return {route: tuple(sorted(self._heard.get(route, ()))) for route in routes}

    def know_all(self, routes: Iterable[str]) -> bool:
        """Whether each of these has a process that has been heard of."""
        return all(self._heard.get(route) for route in routes)
