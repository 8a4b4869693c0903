"""`stillhouse traffic`, `roll`, `ab` and `keys`: what an administrator does to a running endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import AsJson
from jobs.tables import plain_console

endpoints = typer.Typer()
ab = typer.Typer(help="Compare arms on live traffic, and let declared rules decide.", no_args_is_help=True)
keys = typer.Typer(help="API keys of an endpoint: kept as hashes, shown once.", no_args_is_help=True)
endpoints.add_typer(ab, name="ab")
endpoints.add_typer(keys, name="keys")

Url = Annotated[str, typer.Argument(help="The endpoint, such as http://127.0.0.1:8000.")]
AdminKey = Annotated[
    str | None,
    typer.Option("--api-key", help="An admin key, where the endpoint asks for keys. Default: $STILLHOUSE_API_KEY."),
]
KeyFile = Annotated[Path, typer.Argument(help="The file of keys that the endpoint's spec names.")]


@endpoints.command()
def traffic(
    url: Url,
    weights: Annotated[
        list[str] | None, typer.Argument(metavar="[ARM=WEIGHT]...", help="New weights; arms not named keep theirs.")
    ] = None,
    shadow: Annotated[
        list[str] | None, typer.Option(metavar="ARM=SHARE", help="Copy this share of the traffic to an arm; 0 ends it.")
    ] = None,
    api_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Show how an endpoint splits its traffic, or change it without a dropped request."""
    from jobs.endpoints import Administration, show_traffic, weights_of

    change = {"weights": weights_of(weights or []), "shadow": weights_of(shadow or [])}
    endpoint = Administration(url, api_key)
    shown = endpoint.ask("PUT" if weights or shadow else "GET", "traffic", change if weights or shadow else None)
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
    else:
        show_traffic(plain_console(), shown)


@endpoints.command()
def ramp(
    url: Url,
    steps: Annotated[
        list[str], typer.Option("--step", help="SECONDS:ARM=WEIGHT[,ARM=WEIGHT]: weights from then on. May repeat.")
    ],
    api_key: AdminKey = None,
) -> None:
    """Move an endpoint's traffic step by step, by itself."""
    from cluster.errors import UserError
    from jobs.endpoints import Administration, weights_of

    body = []
    for step in steps:
        after, _, weights = step.partition(":")
        try:
            body.append({"after_s": float(after), "weights": weights_of(weights.split(","))})
        except ValueError:
            raise UserError(f"{step!r} is no SECONDS:ARM=WEIGHT, such as 60:small=1,large=3.") from None
    Administration(url, api_key).ask("POST", "ramp", {"steps": body})
    typer.echo(f"{len(body)} steps; `stillhouse traffic {url}` shows where it is")


@endpoints.command()
def roll(
    url: Url,
    arm: Annotated[str, typer.Argument(help="The arm that is to answer by another model.")],
    source: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory.")],
    api_key: AdminKey = None,
) -> None:
    """Have an arm answer by another model version: it is loaded and warm before it takes over."""
    from jobs.endpoints import Administration

    Administration(url, api_key).roll(arm, source)
    typer.echo(f"{arm} answers by {source}")


@ab.command("start")
def ab_start(
    url: Url,
    spec: Annotated[Path, typer.Argument(help="The experiment, a YAML file.")],
    api_key: AdminKey = None,
) -> None:
    """Begin an experiment: from now on its arms share the traffic as it says."""
    from jobs.endpoints import Administration, read_experiment

    shown = Administration(url, api_key).ask("POST", "experiment", read_experiment(spec), timeout_s=900.0)
    spec_of = shown["spec"]
    typer.echo(f"{spec_of['name']}: {', '.join(spec_of['candidates'])} against {spec_of['control']}")
    typer.echo(f"see `stillhouse ab status {url}`")


@ab.command("status")
def ab_status(url: Url, api_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show how the experiment stands. Looking as often as you like does not make its answer less certain."""
    from jobs.endpoints import Administration, show_experiment

    shown = Administration(url, api_key).ask("GET", "experiment")
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
    else:
        show_experiment(plain_console(), shown)


@ab.command("report")
def ab_report(
    url: Url,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes.")] = Path("experiment.html"),
    api_key: AdminKey = None,
) -> None:
    """Write the experiment's report, one HTML page that needs nothing beside it."""
    from jobs.endpoints import Administration

    page = Administration(url, api_key).ask("GET", "experiment/report", timeout_s=120.0)
    aside = output.with_name(f".{output.name}.part")
    aside.write_text(page, encoding="utf-8")
    aside.replace(output)
    typer.echo(f"report {output.absolute()}")


@ab.command("stop")
def ab_stop(url: Url, api_key: AdminKey = None) -> None:
    """End the experiment without a winner: control gets the traffic of all its arms."""
    from jobs.endpoints import Administration

    Administration(url, api_key).ask("DELETE", "experiment")
    typer.echo("stopped; control has the traffic")


@keys.command("add")
def keys_add(
    file: KeyFile,
    name: Annotated[str, typer.Argument(help="Whose key it is; logs and metrics say this.")],
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="How many requests it may make a minute.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms may be asked for by name. May repeat.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may change the traffic and run experiments.")] = False,
) -> None:
    """Make a key. It is printed once and cannot be had again."""
    from serving.keys import add_key

    typer.echo(add_key(file, name, requests_per_minute, arm, admin))


@keys.command("ls")
def keys_ls(file: KeyFile) -> None:
    """Show whose keys there are."""
    from rich.table import Table

    from serving.keys import read_keys

    table = Table(box=None, pad_edge=False)
    for column in ("name", "a minute", "arms", "admin"):
        table.add_column(column)
    for key in read_keys(file):
        arms = "all" if key.arms is None else ", ".join(key.arms)
        table.add_row(key.name, str(key.requests_per_minute or "any"), arms, "yes" if key.admin else "")
    plain_console().print(table)


@keys.command("rm")
def keys_rm(file: KeyFile, name: Annotated[str, typer.Argument(help="Whose key is to go.")]) -> None:
    """Remove a key; running endpoints refuse it within seconds."""
    from serving.keys import remove_key

    remove_key(file, name)
    typer.echo(f"{name}'s key is gone")
