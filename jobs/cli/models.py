"""`stillhouse promote` and `stillhouse rollback`."""

from __future__ import annotations

from typing import Annotated

import typer

models = typer.Typer()
Model = Annotated[str, typer.Argument(help="A registered model: the family's name, a dash and the student's.")]
Registry = Annotated[
    str | None,
    typer.Option(
        help="MLflow tracking URI. Default: the one of the context in use, else $MLFLOW_TRACKING_URI, else SQLite "
        "under the Stillhouse home."
    ),
]


@models.command("promote")
def promote(
    model: Model,
    version: Annotated[int | None, typer.Option(help="Which version. Default: the challenger.", min=1)] = None,
    tracking_uri: Registry = None,
) -> None:
    """Make a version of a model its champion, whatever the gate said."""
    from jobs.promotion import promote as promote_version

    promote_version(model, version, tracking_uri)


@models.command("rollback")
def rollback(model: Model, tracking_uri: Registry = None) -> None:
    """Make the version champion again that was it before the present one."""
    from jobs.promotion import rollback as roll_back

    roll_back(model, tracking_uri)
