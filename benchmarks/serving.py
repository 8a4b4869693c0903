"""What serving costs, in one run: the door's share of a request's time, and what continuous batching gives.

* **The door**: the same requests at the same moments (Poisson, 50/s) to a near-instant engine, called directly in
  this process, and through the endpoint with one arm: client, door, arm and back over HTTP. The difference of the
  quantiles is what the way adds. The client is as bare as can be (`bare_client.py`); how much of it is still its own
  and the network's is seen at a bare socket in another process, which says the same to everybody.
* **Batching**: tokens/s of 8 clients at once over one client, both through the endpoint, in turn. With ``--model DIR``
  on that model, else on random weights of the demo student's size.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from bare_client import latencies
from batching import random_model
from common import arguments, hardware, write

from cluster.session import ray_session
from serving.arms import Arm
from serving.bench import Settings, measure
from serving.bench.arrivals import poisson
from serving.bench.lengths import Length
from serving.deploy import Endpoint, deploy, endpoint_of
from serving.engines import open_engine
from serving.engines.base import Sampling

_PROMPT = "What does the assert statement do in Python, and when is it left out?"
_TOKENS = 16


def main() -> None:
    """Measure both, print and keep the figures."""
    parser = arguments(__doc__.partition("\n")[0], threads=False)
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second at the door")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round at the door")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", type=Path, help="a model directory for batching; default: random weights")
    parser.add_argument("--only", choices=["door", "batching"])
    options = parser.parse_args()
    print(hardware())
    figures: dict[str, Any] = {}
    # The workers' own niceness would make them wait for this process, which is not what is measured.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as directory, ray_session():
        if options.only != "batching":
            with deploy(endpoint_of([Arm("instant", ".")], engine="echo", port=0, slots=64)) as endpoint:
                figures["door"] = door(endpoint, options.rate, options.seconds, options.rounds)
        if options.only != "door":
            model = options.model or random_model(Path(directory), "demo", None)
            settings = {"cpus": 1.5, "dtype": "bfloat16", "slots": options.clients, "port": 0}
            with deploy(endpoint_of([Arm("student", str(model))], **settings)) as endpoint:
                figures["batching"] = batching(endpoint, options.clients, options.rounds)
    write(options.out, "serving", figures)


def door(endpoint: Endpoint, rate: float, seconds: float, rounds: int) -> dict[str, Any]:
    """Quantiles, in ms, of a request at the engine and through the door; whole answers and streams."""
    engine = open_engine("echo", None)

    def moments(seed: int) -> list[float]:
        return [each.at for each in itertools.islice(poisson(rate, seed), int(rate * seconds))]

    async def direct(seed: int) -> list[float]:
        started, took = time.perf_counter(), []

        async def one(at: float) -> None:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            begun = time.perf_counter()
            ids = engine.encode_chat([{"role": "user", "content": _PROMPT}])
            async for _ in engine.generate(ids, Sampling(max_tokens=_TOKENS, temperature=0)):
                pass
            took.append((time.perf_counter() - begun) * 1000)

        await asyncio.gather(*(one(at) for at in moments(seed)))
        return took

    async def through(url: str, seed: int) -> list[float]:
        body = {"model": _model_at(url), "max_tokens": _TOKENS, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": _PROMPT}]}
        return await latencies(url, moments(seed), body)

    at_engine, at_door, at_bare = [], [], []
    with _bare_endpoint() as bare:
        for seed in range(rounds):
            at_engine.append(asyncio.run(direct(seed)))
            at_bare.append(asyncio.run(through(bare, seed)))
            at_door.append(asyncio.run(through(endpoint.url, seed)))
    figures = {}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        engine_ms, bare_ms, door_ms = (
            [float(np.quantile(took, quantile)) for took in each] for each in (at_engine, at_bare, at_door)
        )
        added = [through_it - alone for through_it, alone in zip(door_ms, engine_ms, strict=True)]
        figures[name] = {"engine_ms": engine_ms, "bare_ms": bare_ms, "door_ms": door_ms, "added_ms": added}
        rounds_ms = ", ".join(f"{each:.2f}" for each in added)
        print(
            f"{name}: engine {statistics.median(engine_ms):.2f} ms, through the door "
            f"{statistics.median(door_ms):.2f} ms, added {statistics.median(added):.2f} ms (rounds: {rounds_ms}); "
            f"a bare socket {statistics.median(bare_ms):.2f} ms"
        )
    return {"rate": rate, "requests": int(rate * seconds), **figures}


def _model_at(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return str(json.loads(answer.read())["data"][0]["id"])


@contextlib.contextmanager
def _bare_endpoint() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("bare_endpoint.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def batching(endpoint: Endpoint, clients: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of one client and of several."""

    def rate(concurrency: int, requests: int) -> float:
        settings = Settings(
            endpoint.url,
            concurrency=concurrency,
            requests=requests,
            max_tokens=Length("fixed", (48.0,)),
            api="completions",  # random weights have no chat template
        )
        return asyncio.run(measure(settings)).tokens_per_s

    rate(clients, clients)
    alone, together = [], []
    for _ in range(rounds):
        alone.append(rate(1, clients))
        together.append(rate(clients, 4 * clients))
    ratios = [fast / slow for fast, slow in zip(together, alone, strict=True)]
    print(
        f"batching: 1 client {statistics.median(alone):.1f} tokens/s, {clients} clients "
        f"{statistics.median(together):.1f}, ratio {statistics.median(ratios):.2f} "
        f"(rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )
    return {"clients": clients, "alone": alone, "together": together, "ratios": ratios}


if __name__ == "__main__":
    main()
