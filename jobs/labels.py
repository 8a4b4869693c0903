"""`stillhouse labels`: what a label store holds, whether it is good, and what may go."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from cluster.errors import UserError
from cluster.labels.store.objects import HEADS
from cluster.labels.store.store import LabelStore
from cluster.labels.store.upkeep import SETTLED_S, gc, passes, stat, verify
from cluster.specfile import home
from jobs.contexts import context_for
from jobs.tables import show_table

# A person waits for the answer.
_PATIENCE_S = 20.0


def open_store(uri: str | None, removes: bool = False) -> LabelStore:
    """The store that a user names, by default that of the context in use, else the Stillhouse home's own.

    Args:
        removes: what is to be done takes labels away, so a store that may be others' has to be named.

    Raises:
        UserError: it is not there or cannot be used, or has to be named.
    """
    own, shared = str(home() / "labels"), context_for(None, None).store
    if removes and uri is None and shared is not None:
        raise UserError(f"name the store to remove from: --store {shared} (of the context in use) or --store {own}")
    name = uri or shared or own
    store = LabelStore.open(name, patience_s=_PATIENCE_S)
    if "://" not in name and not Path(store.bucket.uri).exists():
        raise UserError(f"label store {store.bucket.uri} is not there; name one with --store DIRECTORY or s3://...")
    return store


def list_passes(uri: str | None, as_json: bool) -> None:
    """Print the complete passes, the latest first."""
    found = passes(open_store(uri))
    if as_json:
        typer.echo(
            json.dumps([{**each.model_dump(exclude={"batches"}), "batches": len(each.batches)} for each in found])
        )
        return
    rows = [
        (each.name, each.teacher, each.tokenizer, each.labels, str(len(each.batches)), _when(each.published))
        for each in found
    ]
    show_table(("pass", "teacher", "tokenizer", "labels", "batches", "published"), rows, right=("batches",))


def show_holdings(uri: str | None, as_json: bool) -> None:
    """Print what the store holds, a line for each teacher and labels section and for each head."""
    found = stat(open_store(uri))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found]))
        return
    rows = [
        (
            *(each.teacher, each.model, each.tokenizer, each.labels, each.kind, str(each.objects)),
            *(show_size(each.size), _when(each.oldest), _when(each.newest)),
        )
        for each in found
    ]
    columns = ("teacher", "model", "tokenizer", "labels", "kind", "objects", "size", "oldest", "newest")
    show_table(columns, rows, right=("objects", "size"))


def verify_store(uri: str | None, remove: bool) -> int:
    """Read everything and print what is wrong. Returns 0 when nothing is, else 1."""
    read, wrong = 0, 0
    for entry, problem in verify(open_store(uri, removes=remove), remove):
        read += 1
        if problem is not None:
            wrong += 1
            typer.echo(f"{entry.key}: {problem}")
    typer.echo(f"read {read} objects, {wrong} of them wrong")
    return 1 if wrong else 0


def collect(uri: str | None, older_than: str | None, max_size: str | None, dry_run: bool) -> None:
    """Remove what is old or too much, and print what went.

    Raises:
        UserError: an age or a size that cannot be read.
    """
    age = parse_age(older_than).total_seconds() if older_than is not None else None
    at_most = parse_size(max_size) if max_size is not None else None
    removed = gc(open_store(uri, removes=not dry_run), age, at_most, dry_run)
    heads = {entry.key: removed.models.get(entry.key.removeprefix(HEADS), "?") for entry in removed.heads}
    for entry in (*removed.entries, *removed.leftovers):
        head = f" (head of {heads[entry.key]}, {show_size(entry.size)})" if entry.key in heads else ""
        typer.echo(f"{entry.key}{head}")
    count = len(removed.entries) + len(removed.leftovers)
    in_heads = f", {show_size(sum(head.size for head in removed.heads))} of it in heads" if heads else ""
    spared = f"; {removed.leased} more are under a live lease" if removed.leased else ""
    did = "would remove" if dry_run else "removed"
    typer.echo(f"{did} {count} objects, {show_size(removed.size)}{in_heads}{spared}; {show_size(removed.left)} left")
    if at_most is not None and removed.left > at_most:
        typer.echo(
            f"warning: more than --max-size {max_size} is left; a run holds a lease on it, or wrote it within the last "
            f"{SETTLED_S / 60:g} minutes"
        )


def parse_age(text: str) -> timedelta:
    """An age such as ``30d``: a number of seconds, minutes, hours, days or weeks.

    Raises:
        UserError: anything else.
    """
    number, unit = text[:-1], text[-1:]
    try:
        # As ISO 8601 writes them, which pydantic reads: P30D, PT12H.
        whole = f"P{'T' if unit in 'smh' else ''}{int(number)}{unit.upper()}" if unit in "smhdw" else ""
        return TypeAdapter(timedelta).validate_python(whole)
    except ValueError:
        raise UserError(f"--older-than {text}: give a whole number and s, m, h, d or w, such as 30d") from None


def parse_size(text: str) -> int:
    """A size such as ``200GB`` in bytes.

    Raises:
        UserError: anything else.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise UserError(f"--max-size {text}: give bytes or a unit such as MB, GB, TB or GiB, such as 200GB") from None


def show_size(size: int) -> str:
    """Bytes with a decimal unit, such as ``757.2MB``."""
    return ByteSize(size).human_readable(decimal=True)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
