"""`stillhouse schedule` and `stillhouse scheduler`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs.cli.options import Address, AsJson, ContextName, Overrides, SpecPath

schedules = typer.Typer(
    help="Families that a cluster runs by itself, such as every night.", no_args_is_help=True, rich_markup_mode=None
)
Name = Annotated[str, typer.Argument(help="The schedule's name.")]
Cron = Annotated[str, typer.Option(help="Minute, hour, day of month, month, day of week, such as '0 2 * * *'.")]
Timezone = Annotated[str, typer.Option(help="Whose clock it goes by, such as Europe/Berlin.")]
Overlap = Annotated[
    str, typer.Option(help="What a night does that finds the one before still running: skip, queue or replace.")
]
Missed = Annotated[
    str, typer.Option(help="Nights that nobody was there to start: once catches up the last, skip none.")
]


def _context(context: str | None, address: str | None) -> Any:
    from jobs.contexts import context_for

    return context_for(context, address)


@schedules.command("add")
def schedule_add(
    spec: SpecPath,
    cron: Cron,
    timezone: Timezone = "UTC",
    name: Annotated[str | None, typer.Option(help="Default: the family's name.")] = None,
    overlap: Overlap = "skip",
    missed: Missed = "once",
    retries: Annotated[int, typer.Option(help="Times that a night which failed is tried again.")] = 2,
    retry_s: Annotated[float, typer.Option(help="Seconds before the first of them; then twice as long.")] = 60.0,
    longest_s: Annotated[float | None, typer.Option(help="Seconds after which a night is stopped.")] = None,
    overrides: Overrides = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Set a variable for each night; the cluster keeps it. May repeat."),
    ] = None,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="Let every run read the local corpus files as they are now.")
    ] = False,
    address: Address = None,
    context: ContextName = None,
) -> None:
    """Have a family run by a schedule from now on, in the place of one of the same name."""
    from cluster.specfile import load_spec
    from jobs.schedules.plan import schedule_of
    from jobs.schedules.remote import add_schedule
    from jobs.schedules.shown import say_scheduler
    from jobs.submit import corpus_lines

    family = load_spec(spec, overrides or [])
    schedule = schedule_of(
        name=name or family.name,
        cron=cron,
        timezone=timezone,
        overlap=overlap,
        missed=missed,
        retries=retries,
        retry_s=retry_s,
        longest_s=longest_s,
    )
    where = _context(context, address)
    answer = add_schedule(schedule, family, where, env or [], snapshot)
    typer.echo(f"schedule {schedule.name} {'replaced' if answer['replaced'] else 'added'}: {cron} {timezone}")
    for line in corpus_lines(family):
        typer.echo(line)
    say_scheduler(answer, where, begin=True)


@schedules.command("ls")
def schedule_ls(address: Address = None, context: ContextName = None, as_json: AsJson = False) -> None:
    """List the schedules: when each is due next, and how its last night ended."""
    from jobs.schedules.remote import ask
    from jobs.schedules.shown import say_scheduler, show_schedules

    where = _context(context, address)
    answer = ask(where, "ls")
    if as_json:
        typer.echo(json.dumps(answer["schedules"]))
        return
    show_schedules(answer["schedules"])
    say_scheduler(answer, where)


@schedules.command("show")
def schedule_show(name: Name, address: Address = None, context: ContextName = None, as_json: AsJson = False) -> None:
    """Say all that is known of a schedule."""
    from jobs.schedules.remote import ask
    from jobs.schedules.shown import say_scheduler, show_facts

    where = _context(context, address)
    answer = ask(where, "show", name=name)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    show_facts(answer)
    say_scheduler(answer, where)


@schedules.command("history")
def schedule_history(
    name: Annotated[str | None, typer.Argument(help="The schedule's name; none means all.")] = None,
    last: Annotated[int, typer.Option(min=1, help="Nights that are shown.")] = 30,
    address: Address = None,
    context: ContextName = None,
    as_json: AsJson = False,
) -> None:
    """List the nights, the latest first: how each ended, why, and what was promoted."""
    from jobs.schedules.remote import ask
    from jobs.schedules.shown import show_nights

    answer = ask(_context(context, address), "history", name=name, most=last)
    if as_json:
        typer.echo(json.dumps(answer["nights"]))
        return
    show_nights(answer["nights"])


@schedules.command("pause")
def schedule_pause(name: Name, address: Address = None, context: ContextName = None) -> None:
    """Pause a schedule; a night that runs continues."""
    from jobs.schedules.remote import ask

    ask(_context(context, address), "pause", name=name, paused=True)
    typer.echo(f"schedule {name} is paused; resume it with: stillhouse schedule resume {name}")


@schedules.command("resume")
def schedule_resume(name: Name, address: Address = None, context: ContextName = None) -> None:
    """Resume a paused schedule, from now."""
    from jobs.schedules.remote import ask
    from jobs.schedules.shown import say_scheduler

    where = _context(context, address)
    answer = ask(where, "pause", name=name, paused=False)
    typer.echo(f"schedule {name} is resumed")
    say_scheduler(answer, where, begin=True)


@schedules.command("rm")
def schedule_rm(name: Name, address: Address = None, context: ContextName = None) -> None:
    """Forget a schedule; its history stays."""
    from jobs.schedules.remote import ask

    answer = ask(_context(context, address), "rm", name=name)
    typer.echo(f"schedule {name} is forgotten")
    for job in answer["running"]:
        typer.echo(f"its night {job} continues; stop it with: stillhouse jobs stop {job}")


@schedules.command("run-now")
def schedule_run_now(name: Name, address: Address = None, context: ContextName = None) -> None:
    """One more night at once, under the schedule's own rules."""
    from jobs.schedules.remote import ask
    from jobs.schedules.shown import say_scheduler

    where = _context(context, address)
    answer = ask(where, "run_now", name=name)
    typer.echo(f"schedule {name} has a night due now; see it with: stillhouse schedule history {name}")
    say_scheduler(answer, where, begin=True)


@schedules.command("export")
def schedule_export(
    spec: SpecPath,
    cron: Cron,
    image: Annotated[str, typer.Option(help="Container image that has Stillhouse.")],
    timezone: Timezone = "UTC",
    name: Annotated[str | None, typer.Option(help="Default: the family's name.")] = None,
    namespace: Annotated[str, typer.Option(help="Of the Kubernetes objects.")] = "stillhouse",
    overlap: Overlap = "skip",
    missed: Missed = "once",
    token_secret: Annotated[
        str, typer.Option(help="Secret whose key auth_token holds the cluster's token.")
    ] = "stillhouse",
    overrides: Overrides = None,
    address: Address = None,
    context: ContextName = None,
) -> None:
    """Print the same schedule as Kubernetes manifests, for those who prefer the cluster's own CronJob."""
    from jobs.schedules.export import manifests

    text = manifests(
        spec,
        overrides or [],
        _context(context, address),
        {"name": name, "cron": cron, "timezone": timezone, "overlap": overlap, "missed": missed},
        image=image,
        namespace=namespace,
        token_secret=token_secret,
    )
    typer.echo(text, nl=False)


def scheduler(
    address: Annotated[
        str | None, typer.Option(help="URL of the job server. Default: the cluster that this process runs on.")
    ] = None,
) -> None:
    """Start the nights of a cluster's schedules, until told to end; runs beside the head or as a job."""
    from jobs.schedules.process import run_scheduler

    run_scheduler(address)
