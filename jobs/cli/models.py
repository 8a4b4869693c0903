"""`stillhouse promote` and `stillhouse rollback`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.options import TrackingUri

models = typer.Typer()
Model = Annotated[str, typer.Argument(help="A registered model: the family's name, a dash and the student's.")]


@models.command("promote")
def promote(
    model: Model,
    version: Annotated[int | None, typer.Option(help="Which version. Default: the challenger.", min=1)] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Make a version of a model its champion, whatever the gate said."""
    from jobs.promotion import promote as promote_version

    promote_version(model, version, tracking_uri)


@models.command("rollback")
def rollback(model: Model, tracking_uri: TrackingUri = None) -> None:
    """Make the version champion again that was it before the present one."""
    from jobs.promotion import rollback as roll_back

    roll_back(model, tracking_uri)
