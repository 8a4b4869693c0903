"""The figures of ``stillhouse bench`` held against guidellm's on the same endpoint.

Both send the same prompts with the same limit, in rounds that take turns, closed loop or Poisson arrivals; guidellm is
a program of its own (``python -m venv E && E/bin/pip install guidellm``, then ``--guidellm E/bin/guidellm``). Without a
URL both measure a stub that answers by the clock, so that it is also known what is true.

``python benchmarks/bench_against_guidellm.py [URL --model NAME] [--concurrency 2 | --rate 10] --guidellm PATH``

What is compared: time to the first token and whole latency, both from when the request was sent (in a closed loop that
is when ours was due; with ``--rate`` ours count from when it was due, so they may only be higher); the time per output
token behind the first, which guidellm calls inter-token latency (its own "TPOT" includes the first token); answers
per second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import arguments, write

from serving.bench import Settings, measure
from serving.bench.lengths import Length
from serving.prompts import PROMPTS

FIGURES = ("first token ms, p50", "per token ms, p50", "latency ms, p50", "answers/s")
ROUND_LIMIT_S = 900.0


def main() -> None:
    """Measure with both, print and keep the figures."""
    parser = arguments(__doc__ or "", threads=False)
    parser.add_argument("url", nargs="?", help="the endpoint; none: a stub of this benchmark's own")
    parser.add_argument("--model", help="the model to ask for; none: the first that is listed")
    parser.add_argument("--guidellm", default="guidellm", help="the command, or the path to it")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--rate", type=float, help="Poisson arrivals per second in the place of a closed loop")
    parser.add_argument("--requests", type=int, default=100, help="in each round of each")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with contextlib.ExitStack() as held:
        url = args.url or held.enter_context(stub())
        settings = Settings(
            url,
            models=(args.model,) if args.model else None,
            concurrency=None if args.rate else args.concurrency,
            rate=args.rate,
            requests=args.requests,
            max_tokens=Length("fixed", (float(args.max_tokens),)),
        )
        rounds: dict[str, list[dict[str, float]]] = {"stillhouse": [], "guidellm": []}
        for number in range(1, args.rounds + 1):
            rounds["stillhouse"].append(ours(settings))
            rounds["guidellm"].append(theirs(settings, args.guidellm))
            for name, figures in rounds.items():
                shown = ", ".join(f"{what} {value:.2f}" for what, value in figures[-1].items())
                print(f"round {number}, {name}: {shown}", flush=True)
    rows = {}
    print(
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs; figures need a machine that is idle otherwise"
    )
    print(f"\nmedians of {args.rounds} rounds of {args.requests} requests, {settings.load}, {args.max_tokens} tokens")
    print(f"{'':24}{'stillhouse':>12}{'guidellm':>12}{'ratio':>8}")
    for what in FIGURES:
        mine, other = (median(figures[what] for figures in rounds[name]) for name in rounds)
        rows[what] = {"stillhouse": mine, "guidellm": other, "ratio": mine / other}
        print(f"{what:24}{mine:12.2f}{other:12.2f}{mine / other:8.3f}")
    write(args.out, "bench against guidellm", {"load": settings.load, "medians": rows, "rounds": rounds})


def ours(settings: Settings) -> dict[str, float]:
    """One round of the package's own generator."""
    result = asyncio.run(measure(settings, PROMPTS))
    for warning in result.warnings:
        print(f"  warning: {warning}")
    if result.errors:
        raise SystemExit(f"requests failed: {result.errors}")
    (arm,) = result.arms  # one model was asked; a split over several would need one --model
    values = (arm.first_token_ms["p50"], arm.per_token_ms["p50"], arm.latency_ms["p50"], result.pace.answered_per_s)
    return dict(zip(FIGURES, values, strict=True))


def theirs(settings: Settings, command: str) -> dict[str, float]:
    """One round of guidellm."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, report = Path(folder, "prompts.txt"), Path(folder, "report.json")
        assert settings.requests is not None and settings.max_tokens is not None
        # It reads the file once, so there is a line for each request.
        lines = [PROMPTS[i % len(PROMPTS)] for i in range(settings.requests)]
        prompts.write_text("\n".join(lines) + "\n")
        # It would ask for /health first, a path of one kind of server.
        backend = f"kind=openai_http,target={settings.base},max_tokens={settings.max_tokens},validate_backend=false"
        if settings.models:
            backend += f",model={settings.models[0]}"
        profile = (
            f"kind=poisson,rate={settings.rate:g}" if settings.rate else f"kind=concurrent,streams={settings.clients}"
        )
        line = [command, "run", "--disable-console", "--backend", backend, "--profile", profile]
        line += ["--constraint", f"kind=max_requests,count={settings.requests}"]
        line += ["--data", f"kind=text_file,path={prompts}", "--output", f"kind=json,path={report}"]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            line, env={**os.environ, **offline}, capture_output=True, text=True, timeout=ROUND_LIMIT_S, check=False
        )
        if done.returncode or not report.is_file():
            raise SystemExit(f"guidellm ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
        metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    # With Poisson arrivals it may end a request short of what it was told.
    if totals["errored"] or totals["successful"] < 0.95 * settings.requests:
        raise SystemExit(f"guidellm's requests ended as {totals}; {settings.requests} were to be answered")

    def p50(metric: str) -> float:
        return float(metrics[metric]["successful"]["percentiles"]["p50"])

    values = (p50("time_to_first_token_ms"), p50("inter_token_latency_ms"), 1000 * p50("request_latency"))
    return dict(zip(FIGURES, (*values, metrics["requests_per_second"]["successful"]["mean"]), strict=True))


@contextlib.contextmanager
def stub() -> Iterator[str]:
    """The URL of a stub in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("stub_endpoint.py"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("the stub did not start")
        _wait_for(url)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str) -> None:
    """Until it answers: it prints its URL before it listens."""
    import time
    import urllib.request

    for _ in range(200):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
            return
        time.sleep(0.1)
    raise SystemExit(f"the stub at {url} does not answer")


if __name__ == "__main__":
    main()
