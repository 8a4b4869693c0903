"""Traffic that changes under load: weights, rolls, deaths. Real Serve and doors; the arms answer at once (echo).

One endpoint with two doors for the whole file; each test leaves it as it found it.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from serving.deploy import Endpoint, deploy
from serving.ingress.relay import ARM_HEADER
from serving.keys import add_key
from serving.spec import checked
from tests.processes import own_processes

pytestmark = pytest.mark.integration
ARMS = {name: {"source": ".", "engine": "echo", "cpus": 0.1, "slots": 32} for name in ("a", "b", "dark")}


@dataclass
class Keys:
    file: Path
    app: str
    admin: str


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return Keys(file, add_key(file, "app"), add_key(file, "admin", admin=True))


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, keys: Keys) -> Iterator[Endpoint]:
    arms = {name: {**arm, "weight": 0.0 if name == "dark" else 1.0} for name, arm in ARMS.items()}
    spec = checked(name="front", port=0, arms=arms, keys=keys.file, doors=2, breaker={"probe_s": 0.5})
    with deploy(spec) as running:
        yield running


@dataclass
class Load:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    arms: Counter[str] = field(default_factory=Counter)
    bodies: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.statuses.total() + len(self.lost)


@contextmanager
def load(endpoint: Endpoint, keys: Keys, clients: int = 4, stream: bool = False) -> Iterator[Load]:
    """Clients that ask one after the other until the block ends; each answer is counted."""
    seen, ended = Load(), threading.Event()

    async def client() -> None:
        headers = {"Authorization": f"Bearer {keys.app}"}
        body = {"model": "front", "prompt": "hello there", "max_tokens": 8, "stream": stream}
        async with httpx.AsyncClient(base_url=endpoint.url, headers=headers, trust_env=False, timeout=60) as http:
            while not ended.is_set():
                try:
                    answer = await http.post("/v1/completions", json=body)
                except httpx.HTTPError as error:
                    seen.lost.append(repr(error))
                    continue
                seen.statuses[answer.status_code] += 1
                seen.arms[answer.headers.get(ARM_HEADER, "")] += 1
                if answer.status_code != 200 or (stream and "[DONE]" not in answer.text):
                    seen.bodies.append(answer.text)

    async def clients_together() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    thread = threading.Thread(target=lambda: asyncio.run(clients_together()))
    thread.start()
    try:
        until(lambda: seen.total >= 20, "the load to begin")
        yield seen
    finally:
        ended.set()
        thread.join()


def until(done: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


def process_of(title: str) -> psutil.Process:
    (found,) = own_processes(title)
    return found


def is_whole(endpoint: Endpoint) -> bool:
    return not endpoint.ask("traffic")["out"]


def test_a_hundred_changes_of_weights_fail_no_request(endpoint: Endpoint, keys: Keys) -> None:
    with load(endpoint, keys) as seen:
        for turn in range(100):
            endpoint.set_weights({"a": turn % 3, "b": (turn + 1) % 3})
    endpoint.set_weights({"a": 1, "b": 1})
    assert seen.statuses.keys() == {200} and not seen.lost
    assert seen.arms.keys() == {"a", "b"}


def test_a_change_is_in_force_at_every_door_when_it_returns(endpoint: Endpoint, keys: Keys) -> None:
    headers = {"Authorization": f"Bearer {keys.app}"}
    for arm, other in (("a", "b"), ("b", "a")):
        endpoint.set_weights({arm: 1, other: 0})
        body = {"model": "front", "prompt": "x", "max_tokens": 1}
        # A connection each, so that both doors have their share.
        answers = [
            httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False)
            for _ in range(24)
        ]
        assert {answer.headers[ARM_HEADER] for answer in answers} == {arm}
    endpoint.set_weights({"a": 1, "b": 1})


def test_both_doors_bring_a_user_to_the_same_arm(endpoint: Endpoint, keys: Keys) -> None:
    headers = {"Authorization": f"Bearer {keys.app}"}
    drawn = {}
    for user in "abcdefgh":
        body = {"model": "front", "prompt": "x", "max_tokens": 1, "user": user}
        answers = [
            httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=60, trust_env=False)
            for _ in range(8)
        ]
        (drawn[user],) = {answer.headers[ARM_HEADER] for answer in answers}
    assert set(drawn.values()) == {"a", "b"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_arm_that_is_killed_costs_only_what_it_was_streaming(endpoint: Endpoint, keys: Keys, stream: bool) -> None:
    victim = process_of("ServeReplica:front~a~")
    with load(endpoint, keys, stream=stream) as seen:
        victim.kill()
        until(lambda: "a" in endpoint.ask("traffic")["out"], "the arm to be taken out")
        since = seen.total
        until(lambda: seen.total > since + 20, "requests without it")
        until(lambda: is_whole(endpoint), "the arm to come back")
        before = seen.arms["a"]
        until(lambda: seen.arms["a"] > before + 10, "its share of the traffic")
    assert seen.statuses.keys() == {200} and not seen.lost
    # A stream that had begun says that it broke off; a whole answer was had from the other arm.
    assert len(seen.bodies) <= (4 if stream else 0)
    assert all("arm_failed" in body for body in seen.bodies)


def test_a_version_is_rolled_without_a_failed_request(endpoint: Endpoint, keys: Keys) -> None:
    old = process_of("ServeReplica:front~b~")
    with load(endpoint, keys) as seen:
        endpoint.roll("b", "another")
        since = seen.arms["b"]
        until(lambda: seen.arms["b"] > since + 20, "requests to the new one")
        until(lambda: not old.is_running(), "the old one to go")
    assert seen.statuses.keys() == {200} and not seen.lost
    assert endpoint.ask("traffic")["routes"]["b"] == "front~b~2"


def test_the_control_may_die_and_nobody_notices(endpoint: Endpoint, keys: Keys) -> None:
    endpoint.set_weights({"a": 1, "b": 0})
    victim = process_of("ServeReplica:front-control")
    with load(endpoint, keys) as seen:
        victim.kill()
        until(lambda: bool(own_processes("ServeReplica:front-control")), "the control to come back")
        until(lambda: endpoint.ask("traffic")["weights"] == {"a": 1, "b": 0, "dark": 0}, "its memory")
        assert endpoint.ask("traffic")["routes"]["b"] == "front~b~2"  # the roll is not forgotten either
        endpoint.set_weights({"a": 0, "b": 1})
        since = seen.arms["b"]
        until(lambda: seen.arms["b"] > since + 10, "the doors to follow")
    assert seen.statuses.keys() == {200} and not seen.lost
    endpoint.set_weights({"a": 1, "b": 1})


def test_shadow_traffic_reaches_its_arm_and_no_caller(endpoint: Endpoint, keys: Keys) -> None:
    endpoint.ask("set_traffic", {"shadow": {"dark": 1.0}})
    with load(endpoint, keys) as seen:
        until(lambda: 'arm="dark",key="app",kind="shadow",status="200"' in endpoint.ask("metrics"), "copies")
    endpoint.ask("set_traffic", {"shadow": {"dark": 0.0}})
    assert seen.statuses.keys() == {200} and "dark" not in seen.arms


def test_the_command_line_changes_the_traffic(endpoint: Endpoint, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def stillhouse(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    read = stillhouse("traffic", endpoint.url, "--api-key", keys.admin)
    assert read.exit_code == 0 and all(arm in read.output for arm in ("a", "b", "50%")), read.output
    refused = stillhouse("traffic", endpoint.url, "a=3")
    assert refused.exception is not None and "No valid API key" in str(refused.exception)
    monkeypatch.setenv("STILLHOUSE_API_KEY", keys.admin)
    shown = stillhouse("traffic", endpoint.url, "a=3", "--shadow", "dark=0.5")
    assert "75%" in shown.output and "50%" in shown.output and keys.admin not in shown.output
    stillhouse("ramp", endpoint.url, "--step", "0:a=1,b=1", "--step", "1:b=3")
    until(lambda: endpoint.ask("traffic")["weights"]["b"] == 3, "the ramp")
    stillhouse("traffic", endpoint.url, "a=1", "b=1", "--shadow", "dark=0")
    wrong = stillhouse("traffic", endpoint.url, "none=1")
    assert "no arm is named 'none'" in str(wrong.exception)


def test_a_new_key_is_valid_within_seconds_and_a_removed_one_is_not(endpoint: Endpoint, keys: Keys) -> None:
    from serving.keys import remove_key

    def status(secret: str) -> set[int]:
        headers = {"Authorization": f"Bearer {secret}"}
        return {
            httpx.get(f"{endpoint.url}/v1/models", headers=headers, timeout=60, trust_env=False).status_code
            for _ in range(8)
        }

    guest = add_key(keys.file, "guest")
    until(lambda: status(guest) == {200}, "both doors to know it", 20)
    remove_key(keys.file, "guest")
    until(lambda: status(guest) == {401}, "both doors to forget it", 20)
