"""The plan that holds now, the doors that go by it, and the processes that it leads to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import RunError
from serving.control.addresses import SILENT_S, Addresses
from serving.plan import Plan, Ramp

# How long a door may wait for a new plan before it is told that there is none, and how long after its last question a
# door counts as gone.
_PATIENCE_S = 10.0
_DOOR_GONE_S = 15.0
# Seconds after its start in which a control waits for arms to say where they are; they do so each second.
_SETTLE_S = 10.0


@dataclass
class _Seen:
    """What is known of a door: the plan it goes by, and when it last said so."""

    version: int
    at: float


class Traffic:
    """Where requests go, and by whom that is known.

    Args:
        keep: puts down what must outlive this process; called after each change.
    """

    def __init__(self, plan: Plan, ramp: Ramp | None, keep: Callable[[], None]) -> None:
        self.plan = plan
        self.ramp = ramp
        """Weights to come, where no experiment has them. Who changes it has it kept."""
        self.keep = keep
        self._doors: dict[str, _Seen] = {}
        self._addresses = Addresses()
        self._changed = asyncio.Event()
        self._begun = time.monotonic()

    async def plan_after(self, door: str, version: int) -> Plan:
        """The plan, as soon as it is another than ``version``; the same one after a while without a change."""
        self._doors[door] = _Seen(version, time.monotonic())
        await self._settled()
        deadline = time.monotonic() + _PATIENCE_S
        while self.plan.version == version and (left := deadline - time.monotonic()) > 0:
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                break
        return self.plan

    async def _settled(self) -> None:
        """Wait until the arms have been heard of, for a moment: a door's old plan is better than one without them."""
        while not self._addresses.know_all(self.plan.routes.values()) and time.monotonic() < self._begun + _SETTLE_S:
            await asyncio.sleep(0.05)

    def set(self, **changes: Any) -> None:
        """Change the plan; doors hear of it at once."""
        self.plan = self.plan.next(**changes)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.keep()

    async def in_force(self, **changes: Any) -> None:
        """Change the plan, and wait until every door goes by it."""
        self.set(**changes)
        version, deadline = self.plan.version, time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            now = time.monotonic()
            here = [door for door in self._doors.values() if now - door.at < _DOOR_GONE_S]
            if all(door.version >= version for door in here):
                return
            await asyncio.sleep(0.005)

    async def move(self, arm: str, route: str, source: str) -> None:
        """Have another application answer for an arm; returns when every door sends there."""
        routes = {**self.plan.routes, arm: route}
        await self.in_force(
            routes=routes,
            sources={**self.plan.sources, arm: source},
            addresses=self._addresses.of(routes.values()),
            out=self.plan.out_without(arm),
        )

    # ---- where processes listen ----

    def hear(self, route: str, address: str) -> None:
        """A process says where it listens."""
        self._addresses.hear(route, address)
        self._set_addresses()

    def lose(self, address: str) -> None:
        """A door has found nobody there."""
        self._addresses.lose(address)
        self._set_addresses()

    def drop_silent(self) -> None:
        """Send nobody to processes of which nothing was heard for long."""
        if gone := self._addresses.drop_silent():
            self._set_addresses(gone)

    def _set_addresses(self, gone: frozenset[str] = frozenset()) -> None:
        addresses = self._addresses.of(self.plan.routes.values())
        if addresses != self.plan.addresses or gone:
            self.set(addresses=addresses, gone=gone or self.plan.gone)

    async def until_heard(self, route: str) -> None:
        """Return once a process of an application has said where it listens.

        Raises:
            RunError: none does.
        """
        deadline = time.monotonic() + SILENT_S
        while not self._addresses.know_all([route]):
            if time.monotonic() > deadline:
                raise RunError(f"{route} runs, and has not said where it listens")
            await asyncio.sleep(0.05)
