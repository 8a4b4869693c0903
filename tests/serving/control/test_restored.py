"""A control that is started again: what it goes on with, and what it gives up."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RunError
from serving.control.server import Control
from serving.spec import checked
from tests.serving.control.hands import EXPERIMENT, ROUTES, Hands, a_control, latencies, records, ticking
from tests.serving.control.test_turns import TAUGHT, faster, has_done

RAMP = {"steps": [{"after_s": 0, "weights": {"old": 3}}, {"after_s": 0.6, "weights": {"old": 0, "new": 1}}]}


def again_with(state: Path, sources: dict[str, str], hands: Hands | None = None) -> Control:
    """The endpoint stopped, and started again with these models."""
    arms = {name: {"source": sources.get(name, "."), "weight": 1 if name != "third" else 0} for name in ROUTES}
    hands = hands or Hands()
    hands.deployment = "another"
    return Control(checked(name="front", arms=arms, state=state), ROUTES, hands)  # type: ignore[arg-type]


def test_a_rolled_arm_keeps_its_model_and_what_a_roll_left_half_done_goes(tmp_path: Path) -> None:
    async def go() -> None:
        control = a_control(state=tmp_path)
        await control.announce("front~new~2", "127.0.0.1:2")
        await control.do("roll", {"arm": "new", "source": "models:/m@latest"})
        assert control._traffic.plan.sources["new"] == "models:/m/7"
        hands = Hands()
        hands.there = {"new": "front~new~3"}  # runs, and was never let in
        hands.left = ["front~new~3"]
        again = a_control(hands, tmp_path)
        plan = again._traffic.plan
        assert (plan.routes["new"], plan.sources["new"]) == ("front~new~2", "models:/m/7")
        await ticking(again, lambda: ("end", "front~new~3") in hands.done)
        await again.do("ab_start", EXPERIMENT)
        await faster(again)
        await ticking(again, lambda: ("promote", "new", "models:/m/7", "champion") in hands.done)

    asyncio.run(go())


def test_the_next_start_of_the_endpoint_has_the_declared_models(tmp_path: Path) -> None:
    async def go() -> None:
        control = a_control(state=tmp_path)
        await control.announce("front~new~2", "127.0.0.1:2")
        await control.do("roll", {"arm": "new", "source": "models:/m/7"})
        plan = again_with(tmp_path, {"new": "models:/m/1"})._traffic.plan
        assert (plan.routes["new"], plan.sources["new"]) == ("front~new~1", "models:/m/1")

    asyncio.run(go())


def test_a_ramp_goes_on(tmp_path: Path) -> None:
    async def go() -> None:
        control = a_control(state=tmp_path)
        await control.do("ramp", RAMP)
        again = a_control(state=tmp_path)
        assert again._traffic.plan.weights["old"] == 3
        await ticking(again, lambda: again._traffic.plan.weights["old"] == 0)
        await ticking(again, lambda: again._state.traffic()["ramp"] is None)
        # To other models than it was made for, it does not lead by itself.
        await control.do("ramp", RAMP)
        assert again_with(tmp_path, {"new": "models:/m/2"})._traffic.ramp is None

    asyncio.run(go())


def test_a_teacher_scores_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Hands):
        tries = 0

        async def start_judge(self, teacher: Any, routes: Any) -> None:
            self.tries += 1
            if self.tries == 1:
                raise RunError("the teacher before is not quite gone")
            await super().start_judge(teacher, routes)

    async def go() -> None:
        monkeypatch.setattr("serving.control.trials._JUDGE_AGAIN_S", 0.0)
        await a_control(state=tmp_path).do("ab_start", TAUGHT)
        hands = Slow()
        again = a_control(hands, tmp_path)
        assert again._traffic.plan.sample == 0.5
        await ticking(again, lambda: hands.has_judge)
        await ticking(again, lambda: "answers are scored again" in str(again._trials.latest().experiment.events))
        assert "not quite gone" in str(again._trials.latest().experiment.events)
        await asyncio.sleep(1.2)
        assert hands.tries == 2
        assert (await again.do("ab_stop", None))[0] == 200 and not hands.has_judge

    asyncio.run(go())


def test_a_decision_that_was_not_carried_out_is(tmp_path: Path) -> None:
    async def go() -> None:
        hands = Hands()
        hands.gates["promote"] = asyncio.Event()
        control = a_control(hands, tmp_path)
        await control.do("ab_start", EXPERIMENT)
        await faster(control)
        await ticking(control, has_done(hands, "promote"))
        for loop in control._loops:  # it dies
            loop.cancel()
        hands = Hands()
        again = a_control(hands, tmp_path)
        assert again._traffic.plan.experiment == ""
        await ticking(again, lambda: again._trials.under_way is None)
        assert ("promote", "new", ".", "champion") in hands.done
        assert again._traffic.plan.weights == {"old": 0.0, "new": 2.0, "third": 0.0}
        assert [event["what"] for event in again._trials.latest().experiment.events] == ["started", "decision", "alias"]
        # And only once.
        once_more = Hands()
        third = a_control(once_more, tmp_path)
        assert third._trials.under_way is None
        # With other models behind the arms it is none of theirs.
        assert control._trials.under_way is not None
        control._trials.keep(control._trials.latest())
        control._keep()
        other = again_with(tmp_path, {"new": "models:/m/2"})
        assert other._trials.under_way is None
        assert "what was decided is not carried out: arm new is models:/m/2 now" in str(
            other._state.experiment("try")["events"]
        )

    asyncio.run(go())


@pytest.mark.parametrize("sources", [{"new": "models:/m/2"}, {"old": "models:/m/2"}, {"third": "models:/m/2"}])
def test_an_experiment_goes_on_over_the_same_models_only(tmp_path: Path, sources: dict[str, str]) -> None:
    async def go() -> None:
        control = a_control(state=tmp_path)
        await control.do("ab_start", {**EXPERIMENT, "traffic": {"old": 9, "new": 1}})
        await control.report(records("old", latencies(1, 60)))
        control._trials.keep(control._trials.latest())
        control._loops, control._trials.trial = [], None  # it is gone
        again = again_with(tmp_path, sources)
        plan = again._traffic.plan
        if "third" in sources:  # which has no part in it
            assert plan.experiment == "try" and plan.weights == {"old": 9, "new": 1, "third": 0}
            return
        assert plan.experiment == "" and plan.weights == {"old": 1, "new": 1, "third": 0}
        shown = (await again.do("ab_status", None))[1]
        assert shown["ended"] is not None and shown["arms"]["old"]["requests"] == 60
        (arm,) = sources
        assert f"arm {arm} is models:/m/2 now; it was . before" in shown["events"][-1]["text"]
        assert again._state.experiment("try")["ended"] is not None and again._state.traffic()["experiment"] == ""
        assert (await again.do("ab_start", {**EXPERIMENT, "name": "b"}))[0] == 200

    asyncio.run(go())


@pytest.mark.parametrize("record", [None, "", "{}", '{"arms": {"old": {}}}'])
def test_a_record_that_is_missing_or_damaged_keeps_no_control_from_starting(tmp_path: Path, record: str | None) -> None:
    async def go() -> None:
        await a_control(state=tmp_path).do("ab_start", EXPERIMENT)
        path = tmp_path / "experiment-try.json"
        path.unlink()
        if record is not None:
            path.write_text(record)
        again = a_control(state=tmp_path)
        assert again._trials.trial is None and again._traffic.plan.experiment == ""
        (tmp_path / "traffic.json").write_text("{")
        assert a_control(state=tmp_path)._traffic.plan.weights == {"old": 1, "new": 1, "third": 0}

    asyncio.run(go())


def test_the_record_is_there_before_the_traffic_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        control = a_control(state=tmp_path)
        written: list[str] = []
        real = control._state._write
        monkeypatch.setattr(control._state, "_write", lambda name, content: (written.append(name), real(name, content)))
        await control.do("ab_start", EXPERIMENT)
        assert written[:2] == ["experiment-try.json", "traffic.json"]

    asyncio.run(go())


def test_what_an_earlier_version_has_kept_is_read(tmp_path: Path) -> None:
    async def go() -> None:
        await a_control(state=tmp_path).do("set_traffic", {"weights": {"old": 7}})
        path = tmp_path / "traffic.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({name: kept[name] for name in ("declared", "weights", "shadow", "experiment")}))
        assert a_control(state=tmp_path)._traffic.plan.weights["old"] == 7

    asyncio.run(go())
