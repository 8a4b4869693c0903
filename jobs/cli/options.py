"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SpecPath = Annotated[Path, typer.Argument(metavar="FAMILY.yaml", help="The family spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, such as students.small.lr=3e-4. May repeat."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        help="MLflow tracking URI. Default: the one of the context in use, else $MLFLOW_TRACKING_URI, else SQLite "
        "under the Stillhouse home."
    ),
]
Address = Annotated[
    str | None, typer.Option(help="URL of the cluster's job server. Default: the context's.", metavar="URL")
]
ContextName = Annotated[
    str | None, typer.Option(help="A cluster by its name, see `stillhouse context`. Default: the one in use.")
]
Ds = Annotated[
    str | None,
    typer.Option("--ds", metavar="YYYY-MM-DD", help="The date for the macros in corpus.paths. Default: today's."),
]
DueBy = Annotated[
    str | None,
    typer.Option(
        metavar="'CRON ZONE'",
        help="Instead of --ds: the date of the night that was last due by it, such as '0 2 * * * Europe/Berlin'.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
