"""`stillhouse labels`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.options import AsJson

labels = typer.Typer(
    help="Look after a label store: labels that teachers have made, kept to be learnt from again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Store = Annotated[
    str | None,
    typer.Option(
        help="A folder or s3://bucket/prefix. Default: that of the context in use, else $STILLHOUSE_HOME/labels.",
        metavar="URI",
    ),
]


@labels.command("ls")
def labels_ls(store: Store = None, as_json: AsJson = False) -> None:
    """List the complete passes in a store, the latest first."""
    from jobs.labels import list_passes

    list_passes(store, as_json)


@labels.command("stat")
def labels_stat(store: Store = None, as_json: AsJson = False) -> None:
    """Say how much a store holds of each teacher and labels section."""
    from jobs.labels import show_holdings

    show_holdings(store, as_json)


@labels.command("verify")
def labels_verify(
    store: Store = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what is damaged, so that it is scored again.")
    ] = False,
) -> None:
    """Read everything in a store and name what is wrong; ends with 1 when something is."""
    from jobs.labels import verify_store

    raise typer.Exit(verify_store(store, remove))


@labels.command("gc")
def labels_gc(
    store: Store = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove labels written longer ago than this, such as 30d.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove the oldest labels until the rest fits, such as 200GB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing; say what would go.")] = False,
) -> None:
    """Remove old labels, and what dead writers left; never what a run holds a lease on."""
    from jobs.labels import collect

    collect(store, older_than, max_size, dry_run)
