"""The control's hands where what they hold is another's by now: a judge's late word, a roll's application."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from serving.control.works import Works
from serving.experiment import Quality
from serving.records import Record, Scored
from serving.spec import checked


class Judge:
    """Scores when it is let."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.score = SimpleNamespace(remote=self._score)

    async def _score(self, arm: str, at: float, sampled: Scored) -> Quality:
        await self.may.wait()
        return Quality(arm, at, 1, 0.1, 1.0)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Works:
    monkeypatch.setattr("serving.control.works.ray.kill", lambda judge: None)
    arms = {name: {"source": "."} for name in ("old", "new")}
    return Works(checked(name="front", arms=arms), None, "secret")


def test_what_one_experiments_judge_says_is_not_told_to_the_next(works: Works) -> None:
    async def go() -> None:
        record = Record("new", time.time(), 200, True, experiment="a", sampled=Scored((1,), (2,)))
        first, second = Judge(), Judge()
        works._judge = first
        works.judge([record])
        await asyncio.sleep(0.01)
        first.may.set()
        await asyncio.sleep(0.01)
        works.judge([record])  # under way when its judge goes
        first.may.clear()
        works.end_judge()
        works._judge = second
        first.may.set()
        second.may.set()
        await asyncio.sleep(0.01)
        assert await works.scored() == []
        works.judge([record])
        await asyncio.sleep(0.01)
        assert [quality.arm for quality in await works.scored()] == ["new"]
        assert works._judging == 0

    asyncio.run(go())


def test_an_arms_application_is_the_one_that_was_let_in(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {
        "front~old~1": "RUNNING",
        "front~new~1": "DELETING",
        "front~new~2": "UNHEALTHY",
        "front~new~3": "RUNNING",
        "front~new~4": "DEPLOYING",
        "front~other~9": "RUNNING",
        "back~new~5": "RUNNING",
        "front-control": "RUNNING",
    }
    applications: Any = {name: SimpleNamespace(status=status) for name, status in there.items()}
    monkeypatch.setattr("serving.control.works.serve.status", lambda: SimpleNamespace(applications=applications))
    assert works.routes({}) == {"old": "front~old~1", "new": "front~new~3"}
    assert works.routes({"new": "front~new~1", "old": "front~old~7"}) == works.routes({})
    routes = works.routes({"new": "front~new~2"})
    assert routes == {"old": "front~old~1", "new": "front~new~2"}
    assert works.strays(routes) == ["front~new~3", "front~new~4"]
