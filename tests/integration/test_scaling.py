"""Arms that grow and shrink with their load, on another machine than the doors: two nodes of processes of their own."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import yaml

from tests.chaos.nodes import Nodes
from tests.integration.heads import environment, read_until, start
from tests.tiny import write_endless_model

pytestmark = [pytest.mark.integration, pytest.mark.nightly]
NAME = "scaled"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("scaling")
    arm = {
        "source": str(write_endless_model(home / "model")),
        "cpus": 0.5,
        "dtype": "float32",
        "replicas": {"min": 1, "max": 2, "target": 2, "up_after_s": 1, "down_after_s": 5},
    }
    path = home / "endpoint.yaml"
    path.write_text(yaml.safe_dump({"name": NAME, "port": 0, "arms": {"tiny": arm}}))
    # The head has no CPU to offer: the arms have to lie on the other node, the doors listen on the head.
    with Nodes(home, 0, inlined=True) as nodes:
        node = nodes.add(2)
        process = start("serve", str(path), env=environment(home, **nodes.client))
        try:
            said = read_until(process, "answers as")
            assert nodes.processes(node, "ServeReplica"), "no arm lies on the node"
            yield said.rpartition("/v1 answers as")[0].split()[-1]
        finally:
            process.terminate()
            process.communicate(timeout=60)


def processes(url: str) -> int:
    traffic = httpx.get(f"{url}/admin/traffic", trust_env=False, timeout=30).json()
    return int(traffic["processes"]["tiny"])


def until(done: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.2)


def tokens(url: str, count: int) -> int:
    """The tokens of one streamed answer of ``count``, read to its end; -1 where it did not end as it should."""
    body = {"model": NAME, "prompt": "hello", "max_tokens": count, "stream": True, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, trust_env=False, timeout=300) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    if answer.status_code != 200 or events[-1] != "[DONE]":
        return -1
    return int(json.loads(events[-2])["usage"]["completion_tokens"])


def test_an_arm_grows_with_its_load_and_shrinks_without_cutting_an_answer_short(url: str) -> None:
    assert processes(url) == 1
    counts: list[int] = []
    ended = threading.Event()

    def ask(length: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            while not ended.is_set():
                counts.append(tokens(url, length))
            return
        counts.append(-1)

    clients = [threading.Thread(target=ask, args=(200,)) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        until(lambda: processes(url) == 2, "a second process")
        before = len(counts)
        until(lambda: len(counts) > before + 12, "answers of both")
    finally:
        ended.set()
        for client in clients:
            client.join()
    # Two long answers, one on each of them: the one that is to go has to end its own first.
    ended.clear()
    last = [threading.Thread(target=lambda: counts.append(tokens(url, 6000))) for _ in range(2)]
    for client in last:
        client.start()
    until(lambda: processes(url) == 1, "one process again")
    for client in last:
        client.join()
    assert set(counts) == {200, 6000}
