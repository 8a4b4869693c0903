"""`stillhouse context`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.cli.options import AsJson

contexts = typer.Typer(
    help="Clusters by name, so that nobody types addresses.", no_args_is_help=True, rich_markup_mode=None
)
Name = Annotated[str, typer.Argument(help="The context's name.")]


@contexts.command("add")
def context_add(
    name: Name,
    address: Annotated[str, typer.Option(help="URL of the cluster's job server.", metavar="URL")],
    tracking_uri: Annotated[str | None, typer.Option(help="For tracking.uri, where a spec has none.")] = None,
    store: Annotated[str | None, typer.Option(help="For store.uri, where a spec has none.")] = None,
    token_file: Annotated[str | None, typer.Option(help="A file with the cluster's token.")] = None,
) -> None:
    """Add a context, or replace the one of this name."""
    from jobs.contexts import add_context, config_path

    added = add_context(name, address=address, tracking_uri=tracking_uri, store=store, token_file=token_file)
    typer.echo(f"{name} is {added.address}, kept in {config_path()}")


@contexts.command("use")
def context_use(name: Name) -> None:
    """Use a context from now on."""
    from jobs.contexts import use_context

    use_context(name)
    typer.echo(f"{name} is in use")


@contexts.command("ls")
def context_ls(as_json: AsJson = False) -> None:
    """List the contexts; a star marks the one in use."""
    from jobs.contexts import rows
    from jobs.tables import show_table

    found = rows()
    if as_json:
        typer.echo(json.dumps(found))
        return
    shown = [("*" if row["current"] else "", *(row[key] or "" for key in list(row)[1:])) for row in found]
    show_table(("in use", "name", "address", "tracking URI", "store", "token file"), shown)


@contexts.command("rm")
def context_rm(name: Name) -> None:
    """Forget a context."""
    from jobs.contexts import remove_context

    remove_context(name)
    typer.echo(f"{name} is forgotten")
