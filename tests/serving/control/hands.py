"""A control with nothing behind it: what it would have others do is only noted."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError
from serving.control.server import Control
from serving.experiment import Quality
from serving.records import Record
from serving.spec import checked

EXPERIMENT = {"name": "try", "control": "old", "candidates": ["new"], "gain": 0.02, "min_requests": 50}


class Hands:
    """Notes what it is told to do. What it holds up in ``gates`` lasts until the gate is opened."""

    deployment = "one"

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.there: dict[str, str] = {}
        self.left: list[str] = []
        self.has_judge = False
        self.done: list[tuple[Any, ...]] = []
        self.dead: dict[str, str] = {}
        self.healthy = True
        self.quality: list[Quality] = []

    async def _gate(self, name: str) -> None:
        if name in self.gates:
            await self.gates[name].wait()

    def routes(self, kept: Mapping[str, str]) -> dict[str, str]:
        return {**self.there, **kept}

    def strays(self, routes: Mapping[str, str]) -> list[str]:
        return self.left

    async def start_arm(self, arm: str, source: str) -> tuple[str, str]:
        if source == "broken":
            raise UserError("there is no such model")
        self.done.append(("start", arm, source))
        await self._gate("start")
        return f"front~{arm}~2", source.replace("@latest", "/7")

    async def end_arm(self, route: str) -> None:
        self.done.append(("end", route))

    async def dead_arms(self, routes: Mapping[str, str]) -> dict[str, str]:
        return self.dead

    async def answers(self, route: str) -> bool:
        return self.healthy

    async def promote(self, arm: str, source: str, alias: str, reason: str) -> str:
        self.done.append(("promote", arm, source, alias))
        await self._gate("promote")
        return f"{arm} is {alias}"

    async def start_judge(self, teacher: Any, routes: Mapping[str, str]) -> None:
        self.done.append(("judge", teacher, dict(routes)))
        await self._gate("judge")
        self.has_judge = True

    def judge(self, records: Sequence[Record]) -> None:
        self.done += [("score", record.arm) for record in records]

    async def scored(self) -> list[Quality]:
        scored, self.quality = self.quality, []
        return scored

    def end_judge(self) -> None:
        self.done.append(("judge ends",))
        self.has_judge = False

    def environment(self, sources: Mapping[str, str]) -> dict[str, str]:
        return {"machine": "a test's"}


ROUTES = {"old": "front~old~1", "new": "front~new~1", "third": "front~third~1"}


def a_control(hands: Hands | None = None, state: Path | None = None, **settings: Any) -> Control:
    arms = {name: {"source": ".", "weight": 1 if name != "third" else 0} for name in ROUTES}
    spec = checked(name="front", arms=arms, state=state, breaker={"probe_s": 0.05}, **settings)
    return Control(spec, ROUTES, hands or Hands())  # type: ignore[arg-type]


def records(arm: str, latencies_ms: Sequence[float], experiment: str = "try", **more: Any) -> list[Record]:
    return [
        Record(
            arm,
            time.time(),
            200,
            True,
            prompt_tokens=5,
            completion_tokens=10,
            first_token_ms=ms / 2,
            latency_ms=ms,
            experiment=experiment,
            **more,
        )
        for ms in latencies_ms
    ]


def failures(arm: str, count: int, code: str = "arm_failed", status: int = 500, **more: Any) -> list[Record]:
    return [Record(arm, time.time(), status, True, code=code, **more) for _ in range(count)]


def latencies(seed: int, count: int, scale: float = 100.0) -> list[float]:
    return list(np.random.default_rng(seed).lognormal(np.log(scale), 0.2, count))


async def ticking(control: Control, until: Any, seconds: float = 10.0) -> None:
    await control.reconfigure({})
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it did not come to that"
        await control.check_health()
        await asyncio.sleep(0.02)
