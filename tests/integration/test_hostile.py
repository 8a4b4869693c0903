"""Ten thousand requests that nobody means well: no crash, no slot lost, no memory kept, no stranger served.

The arm answers at once (echo), so it is the door that is tried: by schemathesis on its own OpenAPI document, and by
sockets that say what no client library would.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.deploy import Endpoint, deploy
from serving.keys import add_key
from serving.spec import checked
from tests.integration.test_traffic import until
from tests.processes import own_processes

pytestmark = [pytest.mark.integration, pytest.mark.nightly, pytest.mark.timeout(1200)]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
BODY_BYTES, BODY_TIMEOUT_S = 20_000, 1.0
# How many of each kind; with what schemathesis sends they are ten thousand.
SCHEMA_CASES = 900
ROUNDS = {"socket": 450, "slow": 60, "cancelled": 1200, "stranger": 1200}
GROWTH_BYTES = 40 * 2**20


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return file, add_key(file, "tester")


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, secret: tuple[Path, str]) -> Iterator[Endpoint]:
    spec = checked(
        name="front",
        port=0,
        arms={"echo": {"source": ".", "engine": "echo", "cpus": 0.1, "slots": 64}},
        keys=secret[0],
        limits={"body_bytes": BODY_BYTES, "body_timeout_s": BODY_TIMEOUT_S, "completion_tokens": 64},
    )
    with deploy(spec) as running:
        yield running


@pytest.fixture
def watched(endpoint: Endpoint, secret: tuple[Path, str]) -> Iterator[list[psutil.Process]]:
    """The endpoint's processes: the same afterwards as before, idle, and not much larger."""
    # A process that has just changed its title has none for a moment.
    until(lambda: len(own_processes("ServeReplica:front")) == 3, "the control, the door and the arm", 10)
    processes = own_processes("ServeReplica:front")
    status(endpoint, secret)
    before = {process.pid: process.memory_info().rss for process in processes}
    yield processes
    assert all(process.is_running() for process in processes), "a process died"
    assert status(endpoint, secret) == 200
    arm = endpoint.ask("traffic")["routes"]["echo"]
    until(lambda: under_way(arm) == 0, "every slot to be free", 20)
    grown = {process.name(): process.memory_info().rss - before[process.pid] for process in processes}
    assert all(bytes_ < GROWTH_BYTES for bytes_ in grown.values()), grown


def under_way(route: str) -> int:
    from ray import serve

    from serving.launch import ARM_DEPLOYMENT

    return int(serve.get_deployment_handle(ARM_DEPLOYMENT, route).under_way.remote().result())


def status(endpoint: Endpoint, secret: tuple[Path, str]) -> int:
    body = {"model": "front", "prompt": "hello", "max_tokens": 2}
    headers = {"Authorization": f"Bearer {secret[1]}"}
    return httpx.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, trust_env=False).status_code


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_what_schemathesis_thinks_of(
    endpoint: Endpoint, secret: tuple[Path, str], watched: list[psutil.Process], mode: Any
) -> None:
    session = requests.Session()
    session.trust_env = False
    document = session.get(f"{endpoint.url}/openapi.json", timeout=30).json()
    counted = Counter[int]()
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing about it can be wrong

        @settings(
            max_examples=SCHEMA_CASES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def hold(case: Any) -> None:
            headers = {"Authorization": f"Bearer {secret[1]}"}
            response = case.call(base_url=endpoint.url, session=session, headers=headers, timeout=60)
            case.validate_response(response, checks=CHECKS)
            counted[response.status_code] += 1

        hold()
    assert counted.total() >= SCHEMA_CASES
    assert not [code for code in counted if code >= 500], counted


def head(secret: str, length: int | None, more: str = "", path: str = "/v1/completions") -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: application/json\r\n{size}{more}\r\n"
    ).encode("latin-1", "replace")


GOOD = json.dumps({"model": "front", "prompt": "hello", "max_tokens": 2}).encode()


def hostile(dice: random.Random, secret: str) -> tuple[bytes, set[int]]:
    """Bytes to send, and which statuses are right; 0 is a connection that is closed without one."""
    junk = dice.randbytes(dice.randint(1, 200))
    deep, chunked = b"[" * 9000, b"5000\r\n" + b"x" * 0x5000 + b"\r\n0\r\n\r\n"
    size = dice.randint(BODY_BYTES + 1, 10 * BODY_BYTES)
    flood = "".join(f"X-{at}: {'y' * 100}\r\n" for at in range(dice.randint(700, 1500)))
    kinds: list[tuple[bytes, set[int]]] = [
        (head(secret, size) + b"x" * size, {413, 0}),
        (head(secret, None, "Transfer-Encoding: chunked\r\n") + chunked, {413, 0}),
        (head(secret, len(junk)) + junk, {400}),
        (head(secret, len(deep)) + deep, {400}),
        (head(secret, 2) + b"\xff\xfe", {400}),
        (head(secret, len(GOOD), flood) + GOOD, {200, 400, 431, 0}),
        (head(secret, len(GOOD), f"X-Session-Id: {'s' * dice.randint(1, 9000)}\r\n") + GOOD, {200}),
        (head(secret, len(GOOD), "X-Session-Id: \xff\xfe\r\n") + GOOD, {200, 400}),
        (head(secret, len(GOOD), "X-Stillhouse-Arm: \xff\r\n") + GOOD, {400}),
        (head(secret, -5) + GOOD, {400, 0}),
        (head(secret, 10**18), {413, 0}),
        (junk + b"\r\n\r\n", {400, 0}),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", {400, 404, 414, 0}),
        (b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + secret.encode() + b"\r\n\r\n", {404}),
        (head(secret, len(GOOD), path="/v1/../v1/completions") + GOOD, {404, 405}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 405, 505, 0}),
    ]
    return dice.choice(kinds)


async def exchange(endpoint: Endpoint, sent: bytes, patience_s: float = 20.0) -> int:
    """The status of what comes back; 0 where the connection ends without one."""
    address = httpx.URL(endpoint.url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(sent)
        async with asyncio.timeout(patience_s):
            await writer.drain()
            line = await reader.readline()
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


def together(count: int, work: Callable[[int], Awaitable[None]], at_a_time: int = 16) -> None:
    async def go() -> None:
        places = asyncio.Semaphore(at_a_time)

        async def one(number: int) -> None:
            async with places:
                await work(number)

        await asyncio.gather(*(one(number) for number in range(count)))

    asyncio.run(go())


def test_what_no_client_library_would_send(
    endpoint: Endpoint, secret: tuple[Path, str], watched: list[psutil.Process]
) -> None:
    dice, wrong = random.Random(7), []

    async def one(_: int) -> None:
        sent, right = hostile(dice, secret[1])
        if (code := await exchange(endpoint, sent)) not in right:
            wrong.append((code, right, sent[:200]))

    together(ROUNDS["socket"] * 8, one)
    assert not wrong, wrong[:5]


def test_slow_bodies_are_given_up(endpoint: Endpoint, secret: tuple[Path, str], watched: list[psutil.Process]) -> None:
    """And while they dribble, others are answered."""
    codes = Counter[int]()

    async def slow(number: int) -> None:
        sent = head(secret[1], 5000) + b"{" * (number % 50)
        codes[await exchange(endpoint, sent)] += 1

    async def mixed(number: int) -> None:
        if number % 2:
            await slow(number)
        else:
            codes[await exchange(endpoint, head(secret[1], len(GOOD)) + GOOD)] += 1

    together(ROUNDS["slow"] * 2, mixed, 40)
    assert codes == {408: ROUNDS["slow"], 200: ROUNDS["slow"]}


def test_clients_that_hang_up_at_any_moment(
    endpoint: Endpoint, secret: tuple[Path, str], watched: list[psutil.Process]
) -> None:
    dice = random.Random(8)
    body = json.dumps({"model": "front", "prompt": "hello " * 20, "max_tokens": 64, "stream": True, "n": 2}).encode()
    address = httpx.URL(endpoint.url)

    async def one(_: int) -> None:
        _, writer = await asyncio.open_connection(address.host, address.port)
        whole = head(secret[1], len(body)) + body
        writer.write(whole[: dice.randint(1, len(whole))] if dice.random() < 0.3 else whole)
        await asyncio.sleep(dice.random() * 0.02)
        if dice.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()

    together(ROUNDS["cancelled"], one)


def test_strangers_are_never_served(
    endpoint: Endpoint, secret: tuple[Path, str], watched: list[psutil.Process]
) -> None:
    dice, codes = random.Random(9), Counter[int]()
    served = 'stillhouse_requests_total{arm="echo",key="tester",kind="split",status="200"}'

    def count() -> float:
        lines = [line for line in endpoint.ask("metrics").splitlines() if line.startswith(served)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    time.sleep(1)  # the door's own reports have arrived
    before = count()

    async def one(_: int) -> None:
        key = list(secret[1])
        for _ in range(dice.randint(1, 4)):
            key[dice.randrange(len(key))] = dice.choice("abcdefghij-_=.\x80 ")
        guess = "".join(key)
        if guess == secret[1]:
            return
        codes[await exchange(endpoint, head(guess, len(GOOD)) + GOOD)] += 1

    together(ROUNDS["stranger"], one)
    assert codes.keys() == {401}, codes
    assert count() == before
