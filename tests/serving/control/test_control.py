"""The control's decisions, with nothing behind it: what it would have others do is only noted."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from serving.control.server import Control
from serving.experiment import Quality
from serving.records import Scored
from serving.spec import checked
from tests.serving.control.hands import EXPERIMENT, ROUTES, Hands, a_control, failures, latencies, records, ticking


def test_weights_change_and_doors_are_told_at_once() -> None:
    async def go() -> None:
        control = a_control()
        first = await control.plan_after("door", -1)
        assert (first.weights, first.routes) == ({"old": 1, "new": 1, "third": 0}, ROUTES)
        waiting = asyncio.create_task(control.plan_after("door", first.version))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        changing = asyncio.create_task(control.do("set_traffic", {"weights": {"new": 3}}))
        plan = await asyncio.wait_for(waiting, 30)
        assert plan.weights == {"old": 1, "new": 3, "third": 0}
        await asyncio.sleep(0.05)
        assert not changing.done()  # in force only when the door goes by it
        again = asyncio.create_task(control.plan_after("door", plan.version))
        status, body = await asyncio.wait_for(changing, 30)
        assert (status, body["weights"]) == (200, plan.weights)
        again.cancel()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("action", "body", "says"),
    [
        ("set_traffic", {"weights": {"none": 1}}, "no arm is named 'none'; there are: old, new, third"),
        ("set_traffic", {"weights": {"old": 0, "new": 0}}, "all weights are 0"),
        ("set_traffic", {"weights": {"old": -1}}, "weight -1"),
        ("set_traffic", {"weights": {"old": "1"}}, "weights must be a mapping of arms to numbers"),
        ("set_traffic", {"weights": {"old": 10**400}}, "weights has a number that is too large"),
        ("set_traffic", {"weights": {"old": True}}, "must be a mapping"),
        ("set_traffic", {"shadow": {"third": 2}}, "allowed: 0 to 1"),
        ("set_traffic", {"wieghts": {}}, "'wieghts' is not known"),
        ("ramp", {}, "steps must be a list"),
        ("ramp", {"steps": [{"after_s": -1, "weights": {"old": 1}}]}, "after_s is -1"),
        ("ramp", {"steps": [{"weights": {"old": 0, "new": 0}}]}, "all weights are 0"),
        ("roll", {"arm": "none", "source": "x"}, "no arm is named 'none'"),
        ("roll", {"arm": "old"}, "source must be"),
        ("roll", {"arm": "old", "source": "broken"}, "there is no such model"),
        ("ab_start", {"name": "a", "control": "old", "candidates": ["none"]}, "no arm is named 'none'"),
        ("ab_start", {"name": "a"}, "control"),
        ("ab_status", None, "there is no experiment here"),
        ("ab_report", None, "there is no experiment here"),
        ("ab_stop", None, "no experiment is under way"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(action: str, body: Any, says: str) -> None:
    async def go() -> None:
        control = a_control()
        before = control._traffic.plan
        status, answer = await control.do(action, body)
        assert status == 400 and says in answer
        assert control._traffic.plan == before

    asyncio.run(go())


def test_a_ramp_goes_by_itself_and_a_hand_ends_it() -> None:
    async def go() -> None:
        control = a_control()
        steps = [{"after_s": 0.6, "weights": {"old": 0, "new": 1}}, {"after_s": 0, "weights": {"old": 3}}]
        assert (await control.do("ramp", {"steps": steps}))[0] == 200
        assert control._traffic.plan.weights["old"] == 3
        await ticking(control, lambda: control._traffic.plan.weights["old"] == 0)
        await control.do("ramp", {"steps": [{"after_s": 0.3, "weights": {"new": 9}}]})
        await control.do("set_traffic", {"weights": {"new": 5}})
        await asyncio.sleep(1.2)
        assert control._traffic.plan.weights["new"] == 5

    asyncio.run(go())


def test_an_arm_that_fails_is_taken_out_and_comes_back_when_it_answers() -> None:
    async def go() -> None:
        hands = Hands()
        hands.healthy = False
        control = a_control(hands)
        await control.report([*failures("old", 2), *records("old", [5.0]), *failures("old", 2)])
        await control.report(failures("new", 9, "rate_limit_exceeded", 429) + failures("new", 9, "overloaded", 503))
        assert not control._traffic.plan.out  # not three in a row; and a full queue is no failure
        await control.report(failures("old", 1, "timeout", 504))
        assert control._traffic.plan.out.keys() == {"old"}
        await ticking(control, lambda: "old" in control._probed)
        await asyncio.sleep(0.2)
        assert "old" in control._traffic.plan.out
        hands.healthy = True
        await ticking(control, lambda: not control._traffic.plan.out)

    asyncio.run(go())


def test_one_that_dies_goes_at_once_unless_it_has_another_process() -> None:
    async def go() -> None:
        control = a_control()
        await control.report(failures("new", 1, "arm_unavailable", 503))
        assert control._traffic.plan.out == {"new": "its process died"}
        hands = Hands()
        control = a_control(hands)
        hands.dead = {"old": "no process of it runs"}
        await ticking(control, lambda: control._traffic.plan.out == hands.dead)

    asyncio.run(go())


def test_a_roll_starts_the_new_before_the_old_goes() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        await control.report(failures("new", 3))
        assert control._traffic.plan.out
        await control.announce("front~new~2", "127.0.0.1:2")
        assert (await control.do("roll", {"arm": "new", "source": "models:/m/2"}))[0] == 200
        assert control._traffic.plan.routes["new"] == "front~new~2" and not control._traffic.plan.out
        assert control._traffic.plan.addresses["front~new~2"] == ("127.0.0.1:2",)
        assert hands.done == [("start", "new", "models:/m/2"), ("end", "front~new~1")]

    asyncio.run(go())


def test_a_faster_arm_is_promoted_with_its_alias_and_gets_the_traffic() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        status, snapshot = await control.do("ab_start", EXPERIMENT)
        assert status == 200 and control._traffic.plan.experiment == "try"
        assert (await control.do("ab_start", {**EXPERIMENT, "name": "b"}))[1].startswith(
            "experiment 'try' is under way"
        )
        assert "has the weights" in (await control.do("set_traffic", {"weights": {"old": 5}}))[1]
        assert "stop it first" in (await control.do("roll", {"arm": "new", "source": "models:/m/2"}))[1]
        # Requests that were drawn before it began, or sent by name, are none of it.
        await control.report(records("new", [1.0] * 500, experiment=""))
        for round_ in range(10):
            await control.report(records("old", latencies(round_, 200)))
            await control.report(records("new", latencies(round_ + 50, 200, 60.0)))
        await ticking(control, lambda: control._trials.trial is not None and control._trials.trial.is_over)
        await ticking(control, lambda: ("judge ends",) in hands.done)
        assert ("promote", "new", ".", "champion") in hands.done
        assert (
            control._traffic.plan.weights == {"old": 0.0, "new": 2.0, "third": 0.0}
            and control._traffic.plan.experiment == ""
        )
        status, snapshot = await control.do("ab_status", None)
        assert snapshot["arms"]["new"]["state"] == "winner" and snapshot["arms"]["new"]["requests"] == 2000
        assert [event["what"] for event in snapshot["events"]] == ["started", "decision", "alias"]
        status, page = await control.do("ab_report", None)
        assert status == 200 and "<svg" in page

    asyncio.run(go())


def test_an_arm_that_fails_in_an_experiment_is_rolled_back() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        await control.do("ab_start", EXPERIMENT)
        await control.report(records("old", latencies(1, 200)))
        await control.report(failures("new", 40, experiment="try"))
        await ticking(control, lambda: control._trials.trial is not None and control._trials.trial.is_over)
        await ticking(control, lambda: control._traffic.plan.weights["new"] == 0)
        assert control._traffic.plan.weights["old"] == 2.0
        assert not [each for each in hands.done if each[0] == "promote"]

    asyncio.run(go())


def test_sampled_answers_go_to_the_teacher_and_its_verdict_to_the_experiment() -> None:
    async def go() -> None:
        hands = Hands()
        control = a_control(hands)
        spec = {**EXPERIMENT, "sample": 0.5, "teacher": {"model": "."}, "guards": {"kl": 1.0}}
        status, _ = await control.do("ab_start", spec)
        assert status == 200 and control._traffic.plan.sample == 0.5
        assert hands.done[0][0] == "judge" and hands.done[0][2] == {arm: ROUTES[arm] for arm in ("old", "new")}
        await control.report(records("new", [5.0], sampled=Scored((1,), (2,))))
        assert ("score", "new") in hands.done
        hands.quality = [Quality("new", time.time(), 20, 6.0, 0.1) for _ in range(400)]
        await control.report(records("old", latencies(1, 100)))
        await ticking(control, lambda: control._trials.trial is not None and control._trials.trial.is_over)
        assert (
            control._trials.trial is not None
            and control._trials.trial.experiment.events[-1]["evidence"]["outcome"] == "rollback"
        )

    asyncio.run(go())


def test_a_control_that_is_started_again_goes_on(tmp_path: Path) -> None:
    async def go() -> None:
        control = a_control(state=tmp_path)
        await control.do("ab_start", {**EXPERIMENT, "traffic": {"old": 9, "new": 1}})
        await control.report(records("old", latencies(1, 60)))
        control._trials.keep(control._trials.latest())
        again = a_control(state=tmp_path)
        assert (
            again._traffic.plan.weights == {"old": 9, "new": 1, "third": 0} and again._traffic.plan.experiment == "try"
        )
        assert again._trials.trial is not None and again._trials.trial.snapshot()["arms"]["old"]["requests"] == 60
        assert again._traffic.plan.version > control._traffic.plan.version
        # Weights that were declared anew win over those that were kept.
        spec = checked(name="front", arms={name: {"source": ".", "weight": 4} for name in ROUTES}, state=tmp_path)
        fresh = Control(spec, ROUTES, Hands())  # type: ignore[arg-type]
        assert set(fresh._traffic.plan.weights.values()) == {4}
        assert "started again with other weights" in fresh._trials.latest().experiment.events[-1]["text"]
        assert (await again.do("ab_stop", None))[0] == 200
        assert "has been an experiment" in (await again.do("ab_start", EXPERIMENT))[1]

    asyncio.run(go())


def test_metrics_count_what_doors_report() -> None:
    async def go() -> None:
        control = a_control()
        await control.report(
            records("old", [50.0, 150.0], key="app") + failures("new", 1) + records("new", [1.0], shadow=True)
        )
        text = (await control.do("metrics", None))[1]
        assert 'stillhouse_requests_total{arm="old",key="app",kind="split",status="200"} 2.0' in text
        assert 'stillhouse_requests_total{arm="new",key="",kind="shadow",status="200"} 1.0' in text
        assert 'stillhouse_latency_seconds_count{arm="old"} 2.0' in text
        assert 'stillhouse_latency_seconds_count{arm="new"}' not in text
        assert 'stillhouse_arm_weight{arm="old"} 1.0' in text

    asyncio.run(go())


def test_addresses_come_and_go_with_what_processes_and_doors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        control = a_control()
        for address in ("h:1", "h:2"):
            await control.announce("front~old~1", address)
        await control.announce("front~other~9", "h:9")  # no arm's: nobody is sent there
        assert control._traffic.plan.addresses == {
            "front~old~1": ("h:1", "h:2"),
            "front~new~1": (),
            "front~third~1": (),
        }
        version = control._traffic.plan.version
        await control.announce("front~old~1", "h:1")
        assert control._traffic.plan.version == version  # nothing new
        await control.lost("h:1")
        assert control._traffic.plan.addresses["front~old~1"] == ("h:2",) and not control._traffic.plan.gone
        await control.announce("front~old~1", "h:1")  # it is there after all
        assert control._traffic.plan.addresses["front~old~1"] == ("h:1", "h:2")
        monkeypatch.setattr("serving.control.addresses.SILENT_S", 0.2)
        await asyncio.sleep(0.3)
        await control.announce("front~old~1", "h:2")
        control._traffic.drop_silent()
        assert control._traffic.plan.addresses["front~old~1"] == ("h:2",) and "h:1" in control._traffic.plan.gone
        assert (await control.do("traffic", None))[1]["processes"] == {"old": 1, "new": 0, "third": 0}

    asyncio.run(go())


def test_a_new_control_gives_no_plan_without_arms_while_they_may_still_be_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was started again knows no address yet; the doors go by their old plan until it does."""

    async def go() -> None:
        monkeypatch.setattr("serving.control.traffic._SETTLE_S", 5.0)
        control = a_control()
        asked = asyncio.create_task(control.plan_after("door", -1))
        for number, route in enumerate(ROUTES.values()):
            await asyncio.sleep(0.1)
            assert not asked.done()
            await control.announce(route, f"h:{number}")
        plan = await asyncio.wait_for(asked, 30)
        assert all(plan.addresses[route] for route in ROUTES.values())
        monkeypatch.setattr("serving.control.traffic._SETTLE_S", 0.3)
        silent = a_control()
        assert not (await asyncio.wait_for(silent.plan_after("door", -1), 2)).addresses

    asyncio.run(go())
