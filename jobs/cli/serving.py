"""`stillhouse serve` and `stillhouse bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.options import AsJson, TrackingUri
from jobs.tables import plain_console

serving = typer.Typer()
# What does not fit into a column of help.
_BENCH_HELP = """Measure an OpenAI-compatible endpoint, per arm.

Without --rate and --trace each of --concurrency clients waits for its answer before it asks again. With one of them
requests come when they are due, whatever the server does, and all times count from when they were due.

Lengths are N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA, in tokens; SIGMA is the standard deviation of the logarithm.
A trace is JSONL, or CSV with a header: `at` in seconds, and where wanted `prompt_tokens` and `max_tokens`; a file that
--samples wrote is one. Prompts are one per line, or JSONL with `prompt` or `messages` in each line.
"""


@serving.command()
def serve(
    spec: Annotated[
        Path | None, typer.Argument(metavar="[ENDPOINT.yaml]", help="The endpoint; it may say more than the options.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]models:/NAME@ALIAS[:WEIGHT] or [NAME=]DIRECTORY[:WEIGHT]. May repeat."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; all but loopback need --keys.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default: 8000.")] = None,
    name: Annotated[str | None, typer.Option(help="Model name that means: split by weight.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, see `stillhouse keys`.")] = None,
    engine: Annotated[str | None, typer.Option(help="What runs the --arm models: transformers, vllm or echo.")] = None,
    cpus_per_arm: Annotated[float | None, typer.Option(help="CPUs that one --arm asks Ray for.")] = None,
    gpus_per_arm: Annotated[float | None, typer.Option(help="GPUs that one --arm asks Ray for.")] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Serve students behind one OpenAI-compatible endpoint, until Ctrl-C."""
    from jobs.serve import serve as serve_arms
    from serving.spec import read_endpoint

    per_arm = {"cpus": cpus_per_arm, "gpus": gpus_per_arm, "engine": engine}
    endpoint = read_endpoint(spec, arm or [], per_arm, host=host, port=port, name=name, keys=keys)
    serve_arms(endpoint, tracking_uri)


@serving.command(help=_BENCH_HELP)
def bench(
    url: Annotated[str, typer.Argument(help="The endpoint, such as http://127.0.0.1:8000.")],
    requests: Annotated[
        int | None,
        typer.Option(
            help="Requests in all; per model where --model is given. Default: 32, or all of the trace or duration."
        ),
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds after which no request begins.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Clients that wait for their answers. Default: 1.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, Poisson arrivals.")] = None,
    trace: Annotated[Path | None, typer.Option(help="File of arrivals to replay.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Send to this model or arm. May repeat.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts. Default: some short questions.")] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(metavar="LENGTH", help="Synthetic prompts of this length.")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="LENGTH", help="Tokens asked for per request. Default: 32, or the trace's.")
    ] = None,
    api: Annotated[Literal["chat", "completions"], typer.Option(help="Which of the server's two calls.")] = "chat",
    warmup: Annotated[int, typer.Option(help="Requests to each model that do not count.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 300.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="STILLHOUSE_API_KEY", help="Sent as a bearer token; better by the variable, which nobody else sees."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and synthetic prompts.")] = 0,
    samples: Annotated[Path | None, typer.Option(help="Write every request to this JSONL file.")] = None,
    as_json: AsJson = False,
) -> None:
    import asyncio

    from cluster.errors import UserError
    from serving.bench import Settings, measure
    from serving.bench.lengths import parse_length
    from serving.bench.progress import ProgressLine
    from serving.bench.table import render

    settings = Settings(
        url,
        models=tuple(model) if model else None,
        concurrency=concurrency,
        rate=rate,
        trace=trace,
        requests=requests,
        duration_s=duration,
        warmup=warmup,
        timeout_s=timeout,
        prompts=prompts,
        prompt_tokens=parse_length(prompt_tokens, "--prompt-tokens") if prompt_tokens is not None else None,
        max_tokens=parse_length(max_tokens, "--max-tokens") if max_tokens is not None else None,
        api=api,
        seed=seed,
        api_key=api_key or None,
    )
    if samples is not None and (samples.is_dir() or not samples.absolute().parent.is_dir()):
        raise UserError(f"--samples is {samples}; allowed: a file in a folder that is there.")
    with ProgressLine() as line:
        result = asyncio.run(measure(settings, show=line.show))
    if samples is not None:
        result.write_samples(samples)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        plain_console().print(render(result), highlight=False)
