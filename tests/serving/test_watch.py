"""What the terminal of `stillhouse serve` is told of arms that die; the deaths are Ray's own messages."""

from pathlib import Path
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext, OomContext
from ray.exceptions import RayActorError

from serving.launch import LESS_MEMORY, route_of
from serving.watch import ArmWatch

MONITOR = Path(__file__).parents[1] / "cluster" / "ray_errors" / "memory_monitor.txt"


def actor(endpoint: str, arm: str, cause: ActorDeathCause) -> dict[str, Any]:
    return {"Name": f"SERVE_REPLICA::{route_of(endpoint, arm, 1)}#arm#x1y2", "DeathCause": cause}


def out_of_memory() -> ActorDeathCause:
    return ActorDeathCause(oom_context=OomContext(error_message=MONITOR.read_text()))


def ended(message: str) -> ActorDeathCause:
    context = ActorDiedErrorContext(
        error_message=message, actor_id=b"\1" * 16, pid=77, node_ip_address="192.0.2.2", class_name="ServeReplica"
    )
    return ActorDeathCause(actor_died_error_context=context)


def test_an_arm_that_ray_kills_for_its_memory_is_reported_once_with_the_cause() -> None:
    dead = {"0": actor("team", "small", out_of_memory())}
    watch = ArmWatch("team", dict, lambda: dead)
    assert list(watch.look()) == []  # of an earlier endpoint of this name
    dead["1"] = actor("team", "small", out_of_memory())
    (line,) = watch.look()
    assert line.startswith(
        "arm small: Ray killed student:A.__init__ (process 14036, 0.04GB) because node 192.0.2.2 ran"
    )
    assert LESS_MEMORY in line and "\n" not in line and line.endswith("; Serve starts it again")
    assert list(watch.look()) == []
    dead["2"] = actor("team", "small", ended("Worker exit type: SYSTEM_ERROR Worker exit detail: connection error 2."))
    (line,) = watch.look()
    assert line.startswith("arm small: process 77 on node 192.0.2.2 ended without a Python error")
    assert line.endswith("; Serve starts it again, 2 times so far")


@pytest.mark.parametrize(
    "one",
    [
        actor("other", "small", out_of_memory()),
        {"Name": "student", "DeathCause": out_of_memory()},
        actor("team", "small", ended("The actor is dead because it was killed by `ray.kill`.")),
        actor("team", "small", ActorDeathCause()),
    ],
    ids=["another endpoint's", "no replica", "ended by Serve", "without a cause"],
)
def test_what_is_no_arm_of_the_endpoint_or_was_ended_on_purpose_is_not_reported(one: dict[str, Any]) -> None:
    dead: dict[str, dict[str, Any]] = {}
    watch = ArmWatch("team", dict, lambda: dead)
    dead["1"] = one
    assert list(watch.look()) == []


def test_an_arm_that_is_out_and_comes_back_is_reported_at_each_change() -> None:
    out: dict[str, str] = {}
    watch = ArmWatch("team", lambda: out, dict)
    assert list(watch.look()) == []
    out["small"] = "no process of it runs"
    assert list(watch.look()) == ["arm small is out: no process of it runs"]
    assert list(watch.look()) == []
    del out["small"]
    assert list(watch.look()) == ["arm small answers again"]


def test_a_control_that_does_not_answer_is_reported_once_and_the_watch_goes_on() -> None:
    answers: list[Any] = [RayActorError(), RayActorError(), {}, {"small": "3 failures"}]

    def outages() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = ArmWatch("team", outages, dict)
    (line,) = watch.look()
    assert line.startswith("the state of the arms is not known: ")
    assert [list(watch.look()) for _ in range(3)] == [[], [], ["arm small is out: 3 failures"]]
