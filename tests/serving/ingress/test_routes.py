"""Who may come in, with what, and to which arm: the door's application without a network or an arm."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.asking import Piece
from serving.engines.base import Accepted, Delta
from serving.ingress.arms import Arms
from serving.ingress.relay import ARM_HEADER, Relay
from serving.ingress.routes import SESSION_HEADER, App
from serving.ingress.shadow import Shadow
from serving.keys import KeyRing, add_key, remove_key
from serving.records import Record
from serving.spec import EndpointSpec, checked
from tests.serving.ingress.test_relay import Handle, Script, Scripted, plan_of

COMPLETION = {"model": "front", "prompt": "hello"}
JSON = {"headers": {"content-type": "application/json"}}


class Echo(Handle):
    """An arm that says one word to everything."""

    def remote(self, ask: Any) -> Script:
        self.asked.append(ask)
        return Script([[Accepted(1), Piece(0, Delta("word", 1, "stop"))]])


class Held(Handle):
    """An arm that has taken a request in and says no more."""

    def remote(self, ask: Any) -> Script:
        self.asked.append(ask)
        return Script([[Accepted(1)]], silent=True)


class Door:
    """An application with two such arms."""

    def __init__(self, **settings: Any) -> None:
        self.spec: EndpointSpec = checked(name="front", arms={"x": {"source": "."}, "y": {"source": "."}}, **settings)
        self.handles: dict[str, Handle] = {"x": Echo(), "y": Echo(), "dark": Echo()}
        self.arms = Arms(Scripted(self.handles), lambda address: None)  # type: ignore[arg-type]
        self.arms.plan = plan_of(self.handles, {"x": 1, "y": 1, "dark": 0})
        self.records: list[Record] = []
        self.questions: list[tuple[str, Any]] = []
        relay = Relay(self.arms, 5.0, self.records.append, lambda arm: False)
        self.shadow = Shadow(self.arms, 5.0, self.records.append)
        self.app = App(self.spec, KeyRing(self.spec.keys), self.arms, relay, self.shadow, self.ask_control)

    async def ask_control(self, action: str, body: Any) -> tuple[int, Any]:
        self.questions.append((action, body))
        if action == "metrics":
            return 200, "stillhouse_requests_total 1.0"
        return (400, "no such thing") if body == {"bad": 1} else (200, {"done": action})

    def ask(self, *requests: tuple[str, str, dict[str, Any]], host: str = "127.0.0.1:1") -> list[httpx.Response]:
        async def go() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                answers = [await client.request(method, path, **more) for method, path, more in requests]
                await asyncio.sleep(0.05)  # what goes on in the shade
                return answers

        return asyncio.run(go())

    def complete(self, count: int = 1, headers: dict[str, str] | None = None, **more: Any) -> list[httpx.Response]:
        body = {**COMPLETION, **more}
        return self.ask(*[("POST", "/v1/completions", {"json": body, "headers": headers or {}})] * count)


def arms_of(answers: list[httpx.Response]) -> Counter[str]:
    return Counter(answer.headers[ARM_HEADER] for answer in answers)


def test_a_caller_stays_on_one_arm_by_session_user_or_key(tmp_path: Path) -> None:
    door = Door()
    assert set(arms_of(door.complete(60))) == {"x", "y"}
    by_session = {name: set(arms_of(door.complete(5, {SESSION_HEADER: name}))) for name in "abcdefgh"}
    by_user = {name: set(arms_of(door.complete(5, user=name))) for name in "abcdefgh"}
    for drawn in (by_session, by_user):
        assert all(len(arms) == 1 for arms in drawn.values())
        assert set.union(*drawn.values()) == {"x", "y"}
    # The session decides before the user.
    assert {*arms_of(door.complete(3, {SESSION_HEADER: "a"}, user="b"))} == by_session["a"]
    keys = tmp_path / "keys.yaml"
    headers = {"Authorization": f"Bearer {add_key(keys, 'app')}"}
    assert len(arms_of(Door(keys=keys, sticky=["key"]).complete(10, headers))) == 1
    assert len(arms_of(Door(keys=keys, sticky=[]).complete(40, headers, user="a"))) == 2


def test_a_door_that_has_its_hands_full_says_so_and_still_says_how_it_is() -> None:
    door = Door(limits={"requests": 2})
    door.handles["x"] = held = Held()
    codes: list[str | None] = []

    async def crowd() -> None:
        transport = httpx.ASGITransport(app=door.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {**COMPLETION, "model": "x"}
            two = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
            while len(held.asked) < 2:
                await asyncio.sleep(0.001)
            third = await client.post("/v1/chat/completions", json={})
            assert (third.status_code, third.json()["error"]["code"]) == (503, "overloaded")
            assert third.headers["retry-after"] == "1"
            assert [(await client.get(path)).status_code for path in ("/healthz", "/health", "/readyz")] == [200] * 3
            door.arms._pool.forget("x")
            fourth = client.post("/v1/completions", json={**body, "model": "y"})
            codes.extend(
                answer.json().get("error", {}).get("code") for answer in (*await asyncio.gather(*two), await fourth)
            )

    asyncio.run(crowd())
    assert codes == ["arm_unavailable", "arm_unavailable", None]  # and the places are free again


def test_every_door_comes_to_the_same_arm() -> None:
    one, other = Door(), Door()
    for name in "abcdefghijkl":
        assert arms_of(one.complete(1, user=name)) == arms_of(other.complete(1, user=name))


def test_an_arm_is_asked_for_by_model_or_by_header() -> None:
    door = Door()
    assert arms_of(door.complete(5, model="y")) == {"y": 5}
    assert arms_of(door.complete(5, {ARM_HEADER: "dark"})) == {"dark": 5}
    assert [record.split for record in door.records] == [False] * 10
    (wrong,) = door.complete(1, {ARM_HEADER: "none"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "arm_not_found")
    (wrong,) = door.complete(1, model="none")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
    assert "front, x, y, dark" in wrong.json()["error"]["message"]


def test_wrong_keys_are_never_served(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    good = add_key(keys, "app")
    door = Door(keys=keys)
    wrong = ["", "Bearer", "Bearer ", f"Bearer {good}x", f"Basic {good}", good, f"Bearer {good[:-1]}", "Bearer null"]
    requests: list[tuple[str, str, dict[str, Any]]] = []
    for value in wrong:
        headers = {"headers": {"Authorization": value}}
        requests += [
            ("POST", "/v1/completions", {"json": COMPLETION, **headers}),
            ("POST", "/v1/chat/completions", {"content": b"x" * 10, **headers}),
            ("GET", "/v1/models", headers),
            ("GET", "/v1/models/x", headers),
            ("GET", "/metrics", headers),
            ("GET", "/admin/traffic", headers),
            ("PUT", "/admin/traffic", {"json": {}, **headers}),
        ]
    for answer in door.ask(*requests, host="example.org"):
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert not door.records and not door.questions
    assert door.complete(1, {"Authorization": f"Bearer {good}"})[0].status_code == 200
    assert door.records[-1].key == "app"
    health = door.ask(("GET", "/healthz", {}), ("GET", "/readyz", {}), host="example.org")
    assert [answer.status_code for answer in health] == [200, 200]


def test_a_key_has_its_rate_its_arms_and_no_administration(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    slow = {"Authorization": f"Bearer {add_key(keys, 'slow', requests_per_minute=2, arms=['x'])}"}
    admin = {"Authorization": f"Bearer {add_key(keys, 'boss', admin=True)}"}
    door = Door(keys=keys)
    (denied,) = door.complete(1, slow, model="y")
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "arm_denied")
    assert door.complete(1, slow, model="x")[0].status_code == 200
    (refused,) = door.complete(1, slow)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    for path in ("/admin/traffic", "/metrics"):
        assert door.ask(("GET", path, {"headers": slow}))[0].json()["error"]["code"] == "admin_only"
        assert door.ask(("GET", path, {"headers": admin}))[0].status_code == 200
    assert ("traffic", None) in door.questions


def test_a_removed_key_is_refused(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    good = {"Authorization": f"Bearer {add_key(keys, 'app')}"}
    door = Door(keys=keys)
    assert door.complete(1, good)[0].status_code == 200
    remove_key(keys, "app")
    door.app._keys.refresh()
    assert door.complete(1, good)[0].status_code == 401


def test_without_keys_only_this_machine_s_programs_are_meant() -> None:
    """A page in a browser here may know the port; it comes with its own host name, or without a JSON body."""
    door = Door()
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        (answer,) = door.ask(("POST", "/v1/completions", {"json": COMPLETION}), host=host)
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert door.ask(("POST", "/v1/completions", {"json": COMPLETION}), host=host)[0].status_code == 200
    form = {"content": b'{"weights": {"x": 0}}', "headers": {"content-type": "text/plain"}}
    (answer,) = door.ask(("PUT", "/admin/traffic", form))
    assert (answer.status_code, door.questions) == (415, [])


# What a page may send to any host without asking it first.
SIMPLE = [None, "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data"]


@pytest.mark.parametrize("kind", SIMPLE)
def test_without_keys_no_page_can_have_a_completion_made(kind: str | None, tmp_path: Path) -> None:
    door = Door()
    form = {"content": json.dumps(COMPLETION), "headers": {"content-type": kind} if kind else {}}
    for path in ("/v1/completions", "/v1/chat/completions"):
        (answer,) = door.ask(("POST", path, form))
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "wrong_content_type")
        assert "application/json" in answer.json()["error"]["message"]
    assert not door.records and not door.handles["x"].asked and not door.handles["y"].asked
    for said in ("application/json", "Application/JSON; charset=utf-8"):
        assert door.ask(("POST", "/v1/completions", form | {"headers": {"content-type": said}}))[0].status_code == 200
    # No page has a key: whoever sends one is no page, and may say what it likes.
    keys = tmp_path / "keys.yaml"
    form["headers"] = {**form["headers"], "Authorization": f"Bearer {add_key(keys, 'app')}"}  # type: ignore[dict-item]
    assert Door(keys=keys).ask(("POST", "/v1/completions", form))[0].status_code == 200


def test_the_administration_is_passed_on() -> None:
    door = Door()
    answers = door.ask(
        ("GET", "/admin/traffic", {}),
        ("PUT", "/admin/traffic", {"json": {"weights": {"x": 2}}}),
        ("POST", "/admin/arms/x", {"json": {"source": "models:/m/2"}}),
        ("DELETE", "/admin/experiment", {}),
        ("PUT", "/admin/traffic", {"json": {"bad": 1}}),
        ("GET", "/admin/nothing", {}),
        ("PUT", "/admin/traffic", {"json": [1]}),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 400, 404, 400]
    assert door.questions[:4] == [
        ("traffic", None),
        ("set_traffic", {"weights": {"x": 2}}),
        ("roll", {"source": "models:/m/2", "arm": "x"}),
        ("ab_stop", None),
    ]
    assert answers[4].json()["error"]["message"] == "no such thing"


def test_copies_go_to_the_shadow_and_its_answers_to_nobody() -> None:
    door = Door()
    door.arms.plan = door.arms.plan.next(shadow={"dark": 1.0})
    answers = door.complete(5)
    assert "dark" not in arms_of(answers) and len(door.handles["dark"].asked) == 5
    shadows = [record for record in door.records if record.shadow]
    assert len(shadows) == 5 and {record.arm for record in shadows} == {"dark"}
    assert not any(record.split for record in shadows)
    door.complete(3, model="x")  # asked for by name: no part of the split
    assert len(door.handles["dark"].asked) == 5
    door.arms.plan = door.arms.plan.next(shadow={"dark": 0.0})
    door.complete(3)
    assert len(door.handles["dark"].asked) == 5


def test_a_shadow_that_hangs_slows_nobody() -> None:
    door = Door()
    door.handles["dark"] = Handle(*[Script([], silent=True) for _ in range(100)])
    door.arms.plan = door.arms.plan.next(shadow={"dark": 1.0})
    assert {answer.status_code for answer in door.complete(30)} == {200}
    assert len(door.handles["dark"].asked) == 16  # and no more copies than may be under way


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/models/x", 200),
        ("GET", "/v1/models/front", 200),
        ("DELETE", "/healthz", 405),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int) -> None:
    (answer,) = Door().ask((method, path, {}))
    assert answer.status_code == status
    if status >= 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    door = Door(limits={"body_bytes": 100})
    (answer,) = door.ask(("POST", "/v1/completions", {"content": b"x" * 101, **JSON}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    async def endless() -> Any:
        while True:
            yield b"x" * 10

    (answer,) = door.ask(("POST", "/v1/completions", {"content": endless(), **JSON}))
    assert answer.status_code == 413


def test_a_slow_body_is_not_waited_for() -> None:
    door = Door(limits={"body_timeout_s": 0.1})

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    (answer,) = door.ask(("POST", "/v1/completions", {"content": slow(), **JSON}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")


def test_prompts_are_logged_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    Door().complete(1, prompt="a secret")
    assert "a secret" not in caplog.text
    Door(log_requests=True).complete(1, prompt="a secret")
    assert "a secret" in caplog.text and "word" in caplog.text


def test_readiness_is_an_arm_that_can_answer() -> None:
    door = Door()
    door.arms.plan = door.arms.plan.next(out={"x": "died"})
    assert door.ask(("GET", "/readyz", {}))[0].status_code == 200
    door.arms.plan = door.arms.plan.next(out={"x": "died", "y": "died"})
    (answer,) = door.ask(("GET", "/readyz", {}))
    assert (answer.status_code, answer.json()) == (503, {"ready": False})


def test_kuberay_s_question_for_serve_s_proxy_is_answered_by_whether_an_arm_can(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.yaml", "app")
    door = Door(keys=tmp_path / "keys.yaml")
    question = ("GET", "/-/healthz", {})
    (answer,) = door.ask(question, host="10.0.0.1:8000")
    assert (answer.status_code, answer.text) == (200, "success")
    door.arms.plan = door.arms.plan.next(out={"x": "died", "y": "died"})
    (answer,) = door.ask(question, host="10.0.0.1:8000")
    assert answer.status_code == 503 and "success" not in answer.text


def test_the_openapi_document_holds_the_parameters() -> None:
    document = Door().ask(("GET", "/openapi.json", {}))[0].json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "temperature", "top_logprobs", "n"} <= schema["properties"].keys()
    assert "$ref" not in json.dumps(schema)
