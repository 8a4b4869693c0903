"""`stillhouse runs`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.options import AsJson

runs = typer.Typer(
    help="The folders of runs under the Stillhouse home, and the room that they take.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@runs.command("ls")
def runs_ls(as_json: AsJson = False) -> None:
    """List the runs, the longest unused first: state, age, size, and the bytes that removing one frees."""
    from jobs.runs import list_runs

    list_runs(as_json)


@runs.command("rm")
def runs_rm(names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names or folders of runs.")]) -> None:
    """Remove runs that are not running; their registered models and their runs in MLflow stay."""
    from jobs.runs import remove_runs

    remove_runs(names)


@runs.command("gc")
def runs_gc(
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove runs not written to for longer than this, such as 30d.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove the longest unused until the rest fits, such as 200GB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing; list what would go.")] = False,
) -> None:
    """Remove old runs; never one that is running, that its family can be resumed from, or that is still needed."""
    from jobs.runs import collect

    collect(older_than, max_size, dry_run)
