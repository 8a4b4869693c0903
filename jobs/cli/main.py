"""The `stillhouse` command. Every subcommand imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import sys
from datetime import date
from typing import Annotated

import typer

from cluster.errors import StillhouseError, UserError
from jobs.cli.contexts import contexts
from jobs.cli.endpoints import endpoints
from jobs.cli.jobs import jobs
from jobs.cli.labels import labels
from jobs.cli.models import models
from jobs.cli.options import Address, ContextName, Ds, DueBy, Overrides, SpecPath
from jobs.cli.runs import runs
from jobs.cli.schedules import scheduler, schedules
from jobs.cli.serving import serving
from jobs.cli.spec import specs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("stillhouse"))
        raise typer.Exit


@app.callback()
def stillhouse(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """Distil one large teacher into a family of students in a single pass; register, serve and compare them."""


app.add_typer(jobs, name="jobs")
app.add_typer(contexts, name="context")
app.add_typer(schedules, name="schedule")
app.add_typer(labels, name="labels")
app.add_typer(runs, name="runs")
app.command()(scheduler)
# Without a name: their commands are commands of their own.
app.add_typer(specs)
app.add_typer(models)
app.add_typer(serving)
app.add_typer(endpoints)


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the family's last run.")] = False,
    ds: Ds = None,
) -> None:
    """Run a family here, or on the cluster that RAY_ADDRESS names."""
    from cluster.dates import date_of
    from jobs.run import run as run_family

    run_family(spec, overrides or [], resume, date_of(ds) if ds is not None else None)


@app.command()
def check(
    spec: SpecPath,
    overrides: Overrides = None,
    ds: Ds = None,
    address: Annotated[str | None, typer.Option(help="Check against the cluster behind this job server.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Check against this context. Default: RAY_ADDRESS, then the context in use.")
    ] = None,
) -> None:
    """Validate a spec, its models, its corpus files, and its size where a cluster answers; start nothing."""
    from cluster.dates import date_of, rendered
    from cluster.specfile import load_spec
    from jobs.capacity import check_size, find_cluster

    day = date_of(ds) if ds is not None else date.today()
    family = rendered(load_spec(spec, overrides or []), day)
    # First, because a context's token has to be set before Ray is imported, which the preflight does.
    cluster = find_cluster(context, address)
    from cluster.preflight import preflight
    from cluster.registry import few_retries

    with few_retries():  # a run waits for an MLflow that is away, a check need not
        checked = preflight(family)
    notice = check_size(checked.sized, checked.estimates, cluster)
    memory = checked.memory_report(elsewhere=cluster.named)
    names = ", ".join(checked.spec.students)
    typer.echo(
        f"{spec}: good; teacher {checked.teacher.folder}, students {names}, vocabulary {checked.teacher.vocabulary}"
    )
    for line in [*checked.sizes(), *checked.notices(), *memory, *([notice] if notice else [])]:
        typer.echo(line)


@app.command()
def audit(run: Annotated[str, typer.Argument(help="A run's name, or its folder.")]) -> None:
    """Check that every student of a run learnt from each batch exactly once."""
    from jobs.audit import audit as audit_run

    audit_run(run)


def _day(ds: str | None, due_by: str | None) -> date | None:
    """The date that a command names, or None."""
    from cluster.dates import date_of
    from jobs.schedules.plan import due_date

    if ds is not None and due_by is not None:
        raise UserError("--ds and --due-by name a date each; give one of them")
    if due_by is not None:
        return due_date(due_by)
    return date_of(ds) if ds is not None else None


@app.command()
def submit(
    spec: SpecPath,
    overrides: Overrides = None,
    address: Address = None,
    context: ContextName = None,
    name: Annotated[str | None, typer.Option(help="The job's id. Default: the family's name and the time.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Set a variable for the job, of itself to the value it has here. Who may see the cluster's jobs may "
            "see it. May repeat.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the family's last run there.")] = False,
    ds: Ds = None,
    due_by: DueBy = None,
    follow: Annotated[bool | None, typer.Option(help="Show its log and end with its outcome. Default: yes.")] = None,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Have KubeRay run it, on the cluster that kubectl points to.")
    ] = False,
    image: Annotated[str | None, typer.Option(help="For --kubernetes: a container image that has Stillhouse.")] = None,
    namespace: Annotated[str | None, typer.Option(help="For --kubernetes. Default: stillhouse.")] = None,
    cluster: Annotated[str | None, typer.Option(help="For --kubernetes: the RayCluster. Default: stillhouse.")] = None,
    token_secret: Annotated[
        str | None,
        typer.Option(
            help="For --kubernetes: Secret whose key auth_token holds its token. Default: the cluster's name."
        ),
    ] = None,
    dry_run: Annotated[
        bool | None, typer.Option("--dry-run", help="For --kubernetes: print the objects, create nothing.")
    ] = None,
) -> None:
    """Run a family as a Ray job on a running cluster."""
    from jobs import kubernetes as kube
    from jobs.contexts import context_for
    from jobs.submit import submit as submit_family

    day = _day(ds, due_by)
    own = {"image": image, "namespace": namespace, "cluster": cluster, "token_secret": token_secret}
    place = kube.place_of(kubernetes, {"address": address, "env": env, "follow": follow}, dry_run=dry_run, **own)
    if place is None:
        where = context_for(context, address)
        on = follow is not False
        raise typer.Exit(submit_family(spec, overrides or [], where, name, env or [], resume, on, day))
    named = context_for(context, None) if context is not None else None
    made = kube.manifests(spec, overrides or [], named, place, name=name, resume=resume, ds=day)
    kube.submit(made, place, dry_run=bool(dry_run))


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Look at the cluster behind this job server instead.")] = None,
    context: Annotated[str | None, typer.Option(help="Look at the cluster of this context instead.")] = None,
) -> None:
    """Say what this machine or a cluster has, and what is missing for which command."""
    from jobs.contexts import context_for
    from jobs.doctor import doctor as look

    raise typer.Exit(look(context_for(context, address) if context or address else None))


def main() -> None:
    """Entry point: a user's mistake costs one line and exit code 2, a failed run one line and 1."""
    try:
        app(standalone_mode=True)
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "cluster", "jobs", "serving"):
            raise
        # The light base brings what it takes to submit; the rest comes by extras.
        print(f"error: {missing} is not installed; pip install 'stillhouse[train,serve]'", file=sys.stderr)  # noqa: T201
        sys.exit(2)
