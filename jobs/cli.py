"""The `stillhouse` command. Every subcommand imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import StillhouseError

app = typer.Typer(
    help="Distil one large teacher into a family of students in a single pass; register, serve and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecPath = Annotated[Path, typer.Argument(metavar="FAMILY.yaml", help="The family spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a field, such as students.small.lr=3e-4. May repeat."),
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI for models:/ arms. Default: the embedded one.")
]

labels = typer.Typer(
    help="Look after a label store: labels that teachers have made, kept to be learnt from again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(labels, name="labels")
Store = Annotated[
    str | None, typer.Option(help="A folder or s3://bucket/prefix. Default: $STILLHOUSE_HOME/labels.", metavar="URI")
]
Address = Annotated[
    str | None, typer.Option(help="URL of the cluster's job server. Default: the context's.", metavar="URL")
]
ContextName = Annotated[
    str | None, typer.Option(help="A cluster by its name, see `stillhouse context`. Default: the one in use.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

jobs = typer.Typer(help="The families that were submitted to a cluster.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(jobs, name="jobs")
Job = Annotated[str, typer.Argument(help="The job's id.")]

contexts = typer.Typer(
    help="Clusters by name, so that nobody types addresses.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(contexts, name="context")
Name = Annotated[str, typer.Argument(help="The context's name.")]


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the family's last run.")] = False,
) -> None:
    """Run a family here, or on the cluster that RAY_ADDRESS names."""
    from jobs.run import run as run_family

    run_family(spec, overrides or [], resume)


@app.command()
def check(spec: SpecPath, overrides: Overrides = None) -> None:
    """Validate a spec, its models and its corpus files; start nothing."""
    from cluster.preflight import preflight
    from cluster.specfile import load_spec

    checked = preflight(load_spec(spec, overrides or []))
    names = ", ".join(checked.spec.students)
    typer.echo(
        f"{spec}: good; teacher {checked.teacher.folder}, students {names}, vocabulary {checked.teacher.vocabulary}"
    )


@app.command()
def audit(run: Annotated[str, typer.Argument(help="A run's name, or its folder.")]) -> None:
    """Check that every student of a run learnt from each batch exactly once."""
    from jobs.audit import audit as audit_run

    audit_run(run)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the family spec: every field, its meaning and its default."""
    from cluster.spec import FamilySpec

    typer.echo(json.dumps(FamilySpec.model_json_schema(), indent=2))


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the family's last run there.")] = False,
    follow: Annotated[bool, typer.Option(help="Show its log and end with its outcome.")] = True,
) -> None:
    """Run a family as a Ray job on a running cluster."""
    from jobs.contexts import context_for
    from jobs.submit import submit as submit_family

    raise typer.Exit(
        submit_family(spec, overrides or [], context_for(context, address), name, env or [], resume, follow)
    )


@app.command()
def serve(
    arm: Annotated[
        list[str], typer.Option(help="[NAME=]models:/NAME@ALIAS[:WEIGHT] or [NAME=]DIRECTORY[:WEIGHT]. May repeat.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; anything but loopback is open to others.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="Model name that means: split by weight.")] = "stillhouse",
    cpus_per_arm: Annotated[float, typer.Option(help="CPUs that one arm asks Ray for.")] = 0.5,
    gpus_per_arm: Annotated[float, typer.Option(help="GPUs that one arm asks Ray for.")] = 0.0,
    tracking_uri: TrackingUri = None,
) -> None:
    """Serve students behind one OpenAI-compatible endpoint, until Ctrl-C."""
    from jobs.serve import serve as serve_arms

    serve_arms(arm, host, port, name, cpus_per_arm, gpus_per_arm, tracking_uri)


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="The endpoint, such as http://127.0.0.1:8000.")],
    requests: Annotated[int, typer.Option(help="Requests in all; per model where --model is given.")] = 32,
    concurrency: Annotated[int, typer.Option(help="Requests under way at a time.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Tokens asked for per request.")] = 32,
    model: Annotated[list[str] | None, typer.Option(help="Send to this model or arm. May repeat.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure time to first token and whole latency per arm."""
    from rich.console import Console

    from serving.bench import run_bench
    from serving.prompts import PROMPTS

    result = run_bench(url, requests, concurrency, max_tokens, PROMPTS, model)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        Console().print(result.table())


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="Look at the cluster behind this job server instead.")] = None,
    context: Annotated[str | None, typer.Option(help="Look at the cluster of this context instead.")] = None,
) -> None:
    """Say what this machine or a cluster has, and what is missing for which command."""
    from jobs.contexts import context_for
    from jobs.doctor import doctor as look

    raise typer.Exit(look(context_for(context, address) if context or address else None))


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


@jobs.command("ls")
def jobs_ls(address: Address = None, context: ContextName = None, as_json: AsJson = False) -> None:
    """List the families that were submitted, the latest first."""
    from jobs.contexts import context_for
    from jobs.manage import list_jobs

    list_jobs(context_for(context, address), as_json)


@jobs.command("show")
def jobs_show(job: Job, address: Address = None, context: ContextName = None) -> None:
    """Say what is known of a job, and how far it has come."""
    from jobs.contexts import context_for
    from jobs.manage import show_job

    show_job(context_for(context, address), job)


@jobs.command("logs")
def jobs_logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    address: Address = None,
    context: ContextName = None,
) -> None:
    """Print a job's log; with --follow end with its outcome."""
    from jobs.contexts import context_for
    from jobs.manage import show_logs

    raise typer.Exit(show_logs(context_for(context, address), job, follow))


@jobs.command("stop")
def jobs_stop(job: Job, address: Address = None, context: ContextName = None) -> None:
    """Tell a job to end, and wait until it has; `submit --resume` goes on with it."""
    from jobs.contexts import context_for
    from jobs.manage import stop_job

    stop_job(context_for(context, address), job)


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
    show_table(("", "name", "address", "tracking URI", "store", "token file"), shown)


@contexts.command("rm")
def context_rm(name: Name) -> None:
    """Forget a context."""
    from jobs.contexts import remove_context

    remove_context(name)
    typer.echo(f"{name} is forgotten")


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
