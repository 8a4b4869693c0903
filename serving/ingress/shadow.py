"""Copies of the traffic for arms that are tried in the shade: their answers are thrown away and slow nobody."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from serving.api.errors import ApiError
from serving.api.requests import Request
from serving.ingress.arms import ArmLostError, Arms
from serving.ingress.relay import Ticket, ask_of
from serving.records import Record


class Shadow:
    """Sends copies, a bounded number at a time; where the shadow arm cannot keep pace, copies are left out.

    Args:
        most: copies under way at the same time.
    """

    def __init__(self, arms: Arms, timeout_s: float, note: Callable[[Record], None], most: int = 16) -> None:
        self._arms, self._timeout_s, self._note, self._most = arms, timeout_s, note, most
        self._under_way: set[asyncio.Task[None]] = set()

    def copy(self, request: Request, key: str) -> None:
        """Send copies of a request of the split, as the plan wants it; returns at once."""
        for arm, share in self._arms.plan.shadow.items():
            if random.random() < share and len(self._under_way) < self._most and not self._arms.is_out(arm):
                task = asyncio.get_running_loop().create_task(self._send(arm, request, key))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _send(self, arm: str, request: Request, key: str) -> None:
        ticket = Ticket(request, arm, "", key, sampled=False, begun=time.perf_counter())
        ticket.begin()
        code, status = None, 200
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                aclosing(self._arms.answer(arm, ask_of(request))) as answer,
            ):
                async for items in answer:
                    ticket.take(items)
        except TimeoutError:
            code, status = "timeout", 504
        except ArmLostError:
            code, status = "arm_unavailable", 503
        except ApiError as error:
            code, status = error.code or "refused", error.status
        self._note(replace(ticket.record(arm, status, code), shadow=True))
