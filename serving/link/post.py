"""How an arm's process makes itself known: it tells the control its address, again and again."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import ray

HEAD = "node:__internal_head__"
ANNOUNCE_S = 1.0
# Seconds from when a process says that it leaves until it may close connections: by then no door sends it anything.
LEAVE_S = 1.0
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Post:
    """What a process of an arm knows of its endpoint.

    Attributes:
        secret: what doors say first.
        route: the application it is a process of.
        room: requests that it takes in at the same time, those that wait for a slot included.
        control: handle of the control.
        timeout_s: that a request may take at most.
    """

    secret: str
    route: str
    room: int
    control: Any
    timeout_s: float

    async def announce(self, address: str) -> None:
        """Say where it is, for as long as it is there."""
        while True:
            try:
                await self.control.announce.remote(self.route, address)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the control is being replaced; the next time will do
                logger.warning("the control does not hear of %s: %s", address, error)
            await asyncio.sleep(ANNOUNCE_S)

    async def leave(self, address: str) -> None:
        """Say that nobody will be there any more; returns when no door sends there."""
        try:
            await asyncio.wait_for(self.control.lost.remote(address), LEAVE_S)
        except Exception as error:  # the endpoint is being taken down, and the control with it
            logger.warning("the control does not hear that %s leaves: %s", address, error)
            return
        await asyncio.sleep(LEAVE_S)


def listening_host() -> str:
    """Loopback on the machine where the doors are, else this machine's address in the cluster."""
    here = ray.get_runtime_context().get_node_id()
    at_head = any(node["NodeID"] == here and HEAD in node["Resources"] for node in ray.nodes())
    return "127.0.0.1" if at_head else str(ray.util.get_node_ip_address())
