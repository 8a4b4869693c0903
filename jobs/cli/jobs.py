"""`stillhouse jobs`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.options import Address, AsJson, ContextName, Overrides

jobs = typer.Typer(help="The families that were submitted to a cluster.", no_args_is_help=True, rich_markup_mode=None)
Job = Annotated[str, typer.Argument(help="The job's id.")]


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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow it until it ends.")] = False,
    address: Address = None,
    context: ContextName = None,
) -> None:
    """Print a job's log; with --follow end with its outcome."""
    from jobs.contexts import context_for
    from jobs.manage import show_logs

    raise typer.Exit(show_logs(context_for(context, address), job, follow))


@jobs.command("stop")
def jobs_stop(job: Job, address: Address = None, context: ContextName = None) -> None:
    """Tell a job to end, and wait until it has; `jobs resume` continues it."""
    from jobs.contexts import context_for
    from jobs.manage import stop_job

    stop_job(context_for(context, address), job)


@jobs.command("resume")
def jobs_resume(
    job: Job,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="The new job's id. Default: the family's name and the time.")] = None,
    follow: Annotated[bool, typer.Option(help="Show its log and end with its outcome.")] = True,
    address: Address = None,
    context: ContextName = None,
) -> None:
    """Resume a job that has ended, as a new one, from its students' last checkpoints."""
    from jobs.contexts import context_for
    from jobs.manage import resume_job

    raise typer.Exit(resume_job(context_for(context, address), job, overrides or [], name, follow))
