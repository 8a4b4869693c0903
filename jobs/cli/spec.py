"""`stillhouse init`, `explain` and `schema`: how a family spec is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

specs = typer.Typer()


@specs.command("init")
def init(
    path: Annotated[Path, typer.Argument(metavar="[FAMILY.yaml]", help="The file to write.")] = Path("family.yaml"),
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A directory, models:/name@alias or hf://org/name.")
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A file, a folder or a glob, local or s3://. May repeat.")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LAYERS|MODEL",
            help="A student of so many of the teacher's layers, or one that starts from a model. May repeat. Default: "
            "small, of half of the teacher's layers.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The family's name. Default: the file's.")] = None,
) -> None:
    """Write a commented family file; never over one that is there."""
    from jobs.init import write_family

    missing = write_family(path, teacher, corpus or [], student or [], name)
    fill = f"fill in {' and '.join(missing)}, then run" if missing else "next"
    typer.echo(f"wrote {path}; {fill}: stillhouse check {path}")


@specs.command("explain")
def explain(
    path: Annotated[str, typer.Argument(metavar="[FIELD]", help="A dotted path, such as students.loss.")] = "",
) -> None:
    """Print what a field of the family spec means: its type, its default and its own fields."""
    from jobs.explain import explain as explained

    typer.echo(explained(path))


@specs.command("schema")
def schema() -> None:
    """Print the JSON Schema of the family spec, for editors and other programs; see `explain` for people."""
    from cluster.spec import FamilySpec

    typer.echo(json.dumps(FamilySpec.model_json_schema(), indent=2))
