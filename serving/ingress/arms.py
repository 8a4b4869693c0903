"""The arms as one door sees them: where each answers, and which have failed."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing

from serving.api.errors import ApiError, try_again
from serving.asking import Ask, Item
from serving.link.pool import BusyError, FailedError, LostError, Pool
from serving.plan import Plan
from serving.split import choose

# Seconds that a door leaves an arm alone that has died under its hands, until the control has looked at it.
_SHUN_S = 5.0


class ArmLostError(Exception):
    """The process that was answering is gone, or there is none; another arm may do it."""


class Arms:
    """Asks the arms by the plan.

    Args:
        pool: connections to their processes.
        lost: is told of an address where nobody answers any more.
    """

    def __init__(self, pool: Pool, lost: Callable[[str], None]) -> None:
        self.plan = Plan()
        self._pool, self._lost = pool, lost
        self._shunned: dict[str, float] = {}
        self._missing: dict[str, float] = {}

    def follow(self, plan: Plan) -> None:
        """Go by a new plan."""
        for address in plan.gone - self.plan.gone:
            self._pool.forget(address)
        self.plan = plan

    @property
    def names(self) -> list[str]:
        """All arms, in the plan's order."""
        return list(self.plan.routes)

    def is_out(self, arm: str) -> bool:
        """Whether the arm has failed, or has no process, and may not be asked now."""
        return arm in self.plan.out or self._shunned.get(arm, 0.0) > time.monotonic() or not self._addresses(arm)

    def draw(self, unit: str, tried: Collection[str]) -> str | None:
        """The arm of a unit, among those that have not failed; None where none is left."""
        out = {arm for arm in self.plan.weights if arm in tried or self.is_out(arm)}
        return choose(self.plan.weights, unit, out)

    def shun(self, arm: str) -> None:
        """Leave an arm alone for a while."""
        self._shunned[arm] = time.monotonic() + _SHUN_S

    async def answer(self, arm: str, ask: Ask) -> AsyncGenerator[list[Item], None]:
        """What an arm answers. Closing the iterator ends the generation.

        Of several processes the one with the fewest requests of this door is asked; where one takes no connection, the
        next.

        Raises:
            ArmLostError: nobody answers there any more.
            ApiError: its queue is full, or it failed.
        """
        addresses = self._addresses(arm)
        random.shuffle(addresses)
        busy: BusyError | None = None
        for address in sorted(addresses, key=self._pool.under_way):
            try:
                async with aclosing(self._pool.answer(address, ask)) as answer:
                    async for items in answer:
                        yield items
                return
            except LostError as error:
                self._missing[address] = time.monotonic() + _SHUN_S
                self._lost(address)
                if error.begun:
                    raise ArmLostError(str(error)) from error
            except BusyError as error:
                busy = error
            except FailedError as error:
                message = f"Arm {arm!r} failed while answering; its log says why."
                raise ApiError(500, message, code="arm_failed") from error
        if busy is not None:
            raise try_again(503, f"Arm {arm!r} has a full queue; try again.", "overloaded") from busy
        raise ArmLostError("no process of it answers")

    def _addresses(self, arm: str) -> list[str]:
        now = time.monotonic()
        known = self.plan.addresses.get(self.plan.routes.get(arm, ""), ())
        return [address for address in known if self._missing.get(address, 0.0) < now]
