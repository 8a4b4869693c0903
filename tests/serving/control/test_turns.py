"""What is asked for while something slow is under way, and a clock that goes on over failures."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RunError
from serving.control.server import Control
from serving.experiment import Quality
from serving.records import Scored
from tests.serving.control.hands import EXPERIMENT, Hands, a_control, failures, latencies, records, ticking

TAUGHT = {**EXPERIMENT, "sample": 0.5, "teacher": {"model": "."}}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.control.turn._MOMENT_S", 0.1)


async def faster(control: Control, experiment: str = "try") -> None:
    for round_ in range(5):
        await control.report(records("old", latencies(round_, 200), experiment))
        await control.report(records("new", latencies(round_ + 50, 200, 60.0), experiment))


def has_done(hands: Hands, what: str) -> Any:
    return lambda: any(each[0] == what for each in hands.done)


async def starting(work: Any, hands: Hands, what: str) -> asyncio.Task[Any]:
    """Have something begin; returns once it hangs at its gate."""
    hands.gates[what] = asyncio.Event()
    task = asyncio.create_task(work)
    while not has_done(hands, what)():
        await asyncio.sleep(0.01)
    return task


def test_one_roll_at_a_time_and_no_experiment_meanwhile() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        await control.announce("front~new~2", "127.0.0.1:2")
        first = await starting(control.do("roll", {"arm": "new", "source": "models:/m/2"}), hands, "start")
        for action, body in [
            ("roll", {"arm": "new", "source": "models:/m/3"}),
            ("roll", {"arm": "old", "source": "models:/m/3"}),
            ("ab_start", EXPERIMENT),
        ]:
            status, says = await control.do(action, body)
            assert status == 409 and "arm 'new' is being rolled to models:/m/2, for 0 s now" in says
        # What is quick goes on meanwhile.
        assert (await control.do("traffic", None))[0] == 200
        assert (await control.do("set_traffic", {"weights": {"old": 5}}))[0] == 200
        hands.gates["start"].set()
        assert (await first)[0] == 200
        assert [each for each in hands.done if each[0] == "start"] == [("start", "new", "models:/m/2")]
        assert (await control.do("ab_start", EXPERIMENT))[0] == 200

    asyncio.run(go())


def test_a_rollback_does_not_wait_for_the_roll_of_another_arm() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        await control.do("ab_start", EXPERIMENT)
        rolling = await starting(control.do("roll", {"arm": "third", "source": "models:/m/2"}), hands, "start")
        await control.report(records("old", latencies(1, 200)) + failures("new", 40, experiment="try"))
        await ticking(control, lambda: control._traffic.plan.weights["new"] == 0)
        assert not rolling.done()
        rolling.cancel()

    asyncio.run(go())


def test_a_roll_that_is_never_heard_of_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        monkeypatch.setattr("serving.control.traffic.SILENT_S", 0.1)
        hands = Hands()
        control = a_control(hands)
        status, says = await control.do("roll", {"arm": "new", "source": "models:/m/2"})
        assert status == 500 and "has not said where it listens" in says
        assert ("end", "front~new~2") in hands.done
        plan = control._traffic.plan
        assert (plan.routes["new"], plan.sources["new"]) == ("front~new~1", ".")

    asyncio.run(go())


def test_two_starts_with_a_teacher_share_no_judge() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        first = await starting(control.do("ab_start", TAUGHT), hands, "judge")
        status, says = await control.do("ab_start", {**TAUGHT, "name": "b"})
        assert status == 409 and "experiment 'try' is being started" in says
        status, says = await control.do("ab_stop", None)
        assert status == 409 and "experiment 'try' is being started" in says
        assert (await control.do("roll", {"arm": "new", "source": "models:/m/2"}))[0] == 409
        hands.gates["judge"].set()
        assert (await first)[0] == 200
        assert ("judge ends",) not in hands.done and len(hands.done) == 1

    asyncio.run(go())


def test_the_next_experiment_waits_until_the_decision_before_is_carried_out(tmp_path: Path) -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands, tmp_path)
        await control.do("ab_start", TAUGHT)
        hands.gates["promote"] = asyncio.Event()
        await faster(control)
        await ticking(control, has_done(hands, "promote"))
        assert (await control.do("ab_start", {**TAUGHT, "name": "b"}))[0] == 409
        for action, body in [
            ("set_traffic", {"weights": {"old": 5}}),
            ("roll", {"arm": "new", "source": "models:/m/2"}),
        ]:
            status, says = await control.do(action, body)
            assert status == 409 and "is being carried out" in says
        assert "no experiment is under way" in (await control.do("ab_stop", None))[1]
        # What a control that dies now leaves: the decision is there, and that it is not carried out.
        kept = control._state.experiment("try")
        assert kept["ended"] is not None and kept["carried_out"] == 0
        assert control._state.traffic()["experiment"] == "try"
        hands.gates["promote"].set()
        await ticking(control, lambda: control._trials.under_way is None)
        assert control._state.experiment("try")["carried_out"] == 1
        assert control._state.traffic()["experiment"] == ""
        # Late answers of the first say nothing to the second, nor do others' arms.
        hands.done.clear()
        assert (await control.do("ab_start", {**TAUGHT, "name": "b"}))[0] == 200
        sampled = Scored((1,), (2,))
        await control.report(records("new", [5.0], sampled=sampled) + records("third", [5.0], "b", sampled=sampled))
        assert not has_done(hands, "score")()
        await control.report(records("new", [5.0], "b", sampled=sampled))
        assert ("score", "new") in hands.done and ("judge ends",) not in hands.done
        assert control._state.experiment("try")["carried_out"] == 1

    asyncio.run(go())


def test_the_clock_goes_on_over_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Flaky(Hands):
        fails = 0

        async def dead_arms(self, routes: Any) -> dict[str, str]:
            self.fails += 1
            raise ConnectionError("Serve's controller is away")

    async def go() -> None:
        hands = Flaky()
        control = a_control(hands)
        await control.do("ab_start", EXPERIMENT)
        await ticking(control, lambda: hands.fails > 1)
        # A score that cannot be used, and the decision all the same.
        hands.quality = [Quality("none", time.time(), 1, 0.1, 0.5)]
        await control.report(records("old", latencies(1, 200)) + failures("new", 40, experiment="try"))
        await ticking(control, lambda: control._traffic.plan.weights["new"] == 0)
        await control.check_health()

    with caplog.at_level(logging.ERROR, "ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        asyncio.run(go())
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert "Serve's controller is away" in caplog.text and "Traceback" in caplog.text


def test_a_full_disk_holds_up_no_rollback_and_no_breaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands, tmp_path)
        await control.do("ab_start", EXPERIMENT)
        real = Path.write_text

        def full(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        await control.report(records("old", latencies(1, 200)) + failures("new", 40, experiment="try"))
        assert "new" in control._traffic.plan.out
        await ticking(control, lambda: control._trials.under_way is None)
        assert control._traffic.plan.weights["new"] == 0
        # An experiment of which there can be no record is not begun.
        status, says = await control.do("ab_start", {**EXPERIMENT, "name": "b"})
        assert status == 500 and "No space left" in says and control._traffic.plan.experiment == ""
        monkeypatch.setattr(Path, "write_text", real)
        monkeypatch.setattr("serving.control.server._KEEP_S", 0.0)
        await ticking(control, lambda: control._state.traffic()["weights"]["new"] == 0)

    asyncio.run(go())


def test_an_arm_that_refuses_most_requests_is_not_promoted_for_the_few_it_answers() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        await control.do("ab_start", EXPERIMENT)
        for round_ in range(10):
            await control.report(records("old", latencies(round_, 200)))
            await control.report(failures("new", 160, "overloaded", 503, experiment="try"))
            await control.report(records("new", latencies(round_ + 50, 40, 60.0)))
        assert not control._traffic.plan.out  # the breaker does not count them
        await ticking(control, lambda: control._trials.latest().is_over)
        (decision,) = (each for each in control._trials.latest().experiment.events if each["what"] == "decision")
        assert decision["evidence"]["outcome"] == "rollback" and decision["evidence"]["guard"] == "error_rate"
        assert not has_done(hands, "promote")()

    asyncio.run(go())


def test_a_burst_of_refusals_is_no_dead_arm() -> None:
    async def go() -> None:
        control = a_control()
        await control.do("ab_start", {**EXPERIMENT, "guards": {"error_rate": None}})
        await control.report(failures("new", 40, "overloaded", 503, experiment="try"))
        await control.report(records("old", latencies(1, 200)))
        trial = control._trials.latest()
        trial.look(time.time())
        shown = trial.snapshot()["arms"]["new"]
        assert (shown["errors"], shown["failed_in_a_row"], shown["state"]) == (40, 0, "candidate")

    asyncio.run(go())


def test_an_experiment_without_a_teacher_that_starts_is_none() -> None:
    class NoTeacher(Hands):
        async def start_judge(self, teacher: Any, routes: Any) -> None:
            raise RunError("there is no place for it")

    async def go() -> None:
        control = a_control(NoTeacher())
        status, says = await control.do("ab_start", TAUGHT)
        assert (status, says) == (500, "there is no place for it")
        assert (await control.do("ab_start", EXPERIMENT))[0] == 200

    asyncio.run(go())
