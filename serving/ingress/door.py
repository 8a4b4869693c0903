"""The deployment that listens: OpenAI's API on a port of its own, each request handed to one arm.

A door is a Serve replica, but it opens its port itself: through Serve's proxy every request would cross one process
more, which on a small machine costs more than all that a door does. Several doors share the port (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import socket
from collections.abc import Coroutine
from typing import Any

import uvicorn

from cluster import tracing
from cluster.errors import UserError
from serving.ingress.arms import Arms
from serving.ingress.protocol import BoundedProtocol
from serving.ingress.relay import Relay
from serving.ingress.routes import App
from serving.ingress.shadow import Shadow
from serving.keys import KeyRing
from serving.link.pool import Pool
from serving.plan import Plan
from serving.records import Record
from serving.spec import EndpointSpec

# Seconds between two reports to the control, and the most records that wait for one while the control is away.
_REPORT_S = 0.25
_MOST_RECORDS = 20_000
_KEYS_S = 2.0
_CLOSING_S = 5

logger = logging.getLogger("ray.serve")


class Door:
    """Listens from when it is made until Serve ends it.

    Args:
        spec: the endpoint's; its port is a number, not 0.
        control: handle of the control, which hands out plans and takes records.
        secret: what the arms' processes want to hear from a door.
    """

    def __init__(self, spec: EndpointSpec, control: Any, secret: str) -> None:
        self._spec, self._control = spec, control
        self._id = secrets.token_hex(8)
        self._records: list[Record] = []
        self._pool = Pool(secret)
        self._arms = Arms(self._pool, self._lost)
        self._telling: set[asyncio.Task[None]] = set()
        self._keys = KeyRing(spec.keys, spec.doors)
        limits = spec.limits
        relay = Relay(self._arms, limits.timeout_s, self._note, self._has_another)
        shadow = Shadow(self._arms, limits.timeout_s, self._note)
        self._app = App(spec, self._keys, self._arms, relay, shadow, self._ask_control)
        self._tasks: list[asyncio.Task[Any]] = []
        self._server: uvicorn.Server | None = None

    async def reconfigure(self, _config: dict[str, Any]) -> None:
        """Serve calls this once the door is made, and waits for it: a constructor cannot wait."""
        if self._server is None:
            await self._open()

    async def _open(self) -> None:
        self._arms.follow(await self._control.plan_after.remote(self._id, -1))
        config = uvicorn.Config(
            self._app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_CLOSING_S,
            timeout_keep_alive=30,
            proxy_headers=False,
            http=BoundedProtocol,
        )
        # What is there now stays; a look at all of it would hold up requests for tens of ms, again and again.
        gc.collect()
        gc.freeze()
        listener = _listener(self._spec.host, self._spec.port)
        self._server = uvicorn.Server(config)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(work)
            for work in (
                self._server.serve([listener]),
                self._follow_plan(),
                self._report(),
                self._refresh_keys(),
            )
        ]

    async def check_health(self) -> None:
        """Serve asks this now and then and replaces a door that raises."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError("a part of the door has ended") from (None if task.cancelled() else task.exception())

    async def close(self) -> None:
        """Take no more requests, and let those under way end for a few seconds."""
        if self._server is None:
            return
        self._server.should_exit = True
        with contextlib.suppress(Exception):
            await asyncio.wait_for(asyncio.shield(self._tasks[0]), _CLOSING_S + 2)
        for task in self._tasks[1:]:
            task.cancel()
        await self._hand_over()
        self._pool.close()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls this when it ends a replica, and awaits what it returns."""
        return None if getattr(self, "_server", None) is None else self.close()

    def _lost(self, address: str) -> None:
        task = asyncio.get_running_loop().create_task(self._tell_lost(address))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell_lost(self, address: str) -> None:
        try:
            await self._control.lost.remote(address)
        except Exception as error:  # it will see for itself, only later
            logger.warning("the control was not told that %s is lost: %s", address, error)

    def _has_another(self, arm: str) -> bool:
        spec = self._spec.arms.get(arm)
        return spec is not None and spec.replicas.max > 1

    def _note(self, record: Record) -> None:
        tracing.add(arm=record.arm, status=record.status)
        if len(self._records) < _MOST_RECORDS:
            self._records.append(record)

    async def _ask_control(self, action: str, body: Any = None) -> tuple[int, Any]:
        """What the control says to a question about the traffic: an HTTP status and a body."""
        await self._hand_over()
        answer: tuple[int, Any] = await self._control.do.remote(action, body)
        return answer

    async def _follow_plan(self) -> None:
        while True:
            try:
                plan: Plan = await self._control.plan_after.remote(self._id, self._arms.plan.version)
                if plan.version != self._arms.plan.version:
                    self._arms.follow(plan)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # The plan that is known holds on; the control is being replaced.
                logger.warning("the control does not answer: %s", error)
                await asyncio.sleep(0.5)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            await self._hand_over()

    async def _hand_over(self) -> None:
        if not self._records:
            return
        records, self._records = self._records, []
        try:
            await self._control.report.remote(records)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.warning("%d records wait for the control: %s", len(records), error)
            self._records = (records + self._records)[:_MOST_RECORDS]

    async def _refresh_keys(self) -> None:
        while not self._keys.is_open:
            await asyncio.sleep(_KEYS_S)
            try:
                self._keys.refresh()
            except UserError as error:
                logger.error("%s", error)
        await asyncio.Event().wait()


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(2048)
    listener.setblocking(False)
    return listener
