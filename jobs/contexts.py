"""Named clusters in a file of the user's own, so that nobody types addresses; `stillhouse context`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import Field, ValidationError, field_validator

from cluster.errors import UserError
from cluster.spec.base import Section

LOCAL_ADDRESS = "http://127.0.0.1:8265"


def checked_address(address: str) -> str:
    """A job server's URL.

    Raises:
        ValueError: it is none.
    """
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"got {address!r}; give the job server's URL, such as {LOCAL_ADDRESS}")
    return address.rstrip("/")


class Context(Section):
    """A cluster, and what a family that is submitted to it uses unless its spec says otherwise."""

    address: str
    """URL of the job server."""
    tracking_uri: str | None = None
    """For `tracking.uri`."""
    store: str | None = None
    """For `store.uri`."""
    token_file: str | None = None
    """Holds the cluster's token. Without it Ray's own places count: RAY_AUTH_TOKEN, then ~/.ray/auth_token."""

    _address = field_validator("address")(checked_address)


class Contexts(Section):
    """All that the file holds; ``current`` is the one that is used."""

    current: str | None = None
    contexts: dict[str, Context] = Field(default_factory=dict)


def config_path() -> Path:
    """``$STILLHOUSE_CONFIG``, else where the system keeps users' settings."""
    return Path(os.environ.get("STILLHOUSE_CONFIG") or Path(typer.get_app_dir("stillhouse")) / "config.yaml")


def read_contexts() -> Contexts:
    """What the file holds; nothing when there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = config_path()
    if not path.exists():
        return Contexts()
    try:
        return Contexts.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(map(str, detail["loc"]))
        raise UserError(f"{path}: {where}: {detail['msg']}; mend the file, or remove it") from None


def _write(contexts: Contexts) -> None:
    path = config_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(yaml.safe_dump(contexts.model_dump(exclude_none=True), sort_keys=False))
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; set STILLHOUSE_CONFIG to another file") from None


def add_context(name: str, **fields: str | None) -> Context:
    """Add a context, or replace the one of this name; the first one is used from now on.

    Args:
        fields: of :class:`Context`.

    Raises:
        UserError: a field is not what it should be.
    """
    known = read_contexts()
    try:
        context = Context.model_validate(fields)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        option = str(detail["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {detail['msg'].removeprefix('Value error, ')}") from None
    _write(Contexts(current=known.current or name, contexts={**known.contexts, name: context}))
    return context


def use_context(name: str) -> None:
    """Use a context from now on.

    Raises:
        UserError: there is none of this name.
    """
    known = read_contexts()
    _named(known, name)
    _write(Contexts(current=name, contexts=known.contexts))


def remove_context(name: str) -> None:
    """Forget a context.

    Raises:
        UserError: there is none of this name.
    """
    known = read_contexts()
    _named(known, name)
    left = {other: context for other, context in known.contexts.items() if other != name}
    _write(Contexts(current=None if known.current == name else known.current, contexts=left))


def _named(known: Contexts, name: str) -> Context:
    if name not in known.contexts:
        there = ", ".join(known.contexts) or "none yet; see `stillhouse context add`"
        raise UserError(f"there is no context {name!r}; there are: {there}")
    return known.contexts[name]


def context_for(name: str | None, address: str | None) -> Context:
    """The cluster that a command means: the address it gives, the context it names, the current one, or this machine.

    Raises:
        UserError: both are given, there is no such context, or the address is none.
    """
    if address is not None:
        if name is not None:
            raise UserError("--address and --context name a cluster each; give one of them")
        try:
            return Context(address=address)
        except ValidationError as error:
            raise UserError(f"--address: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    known = read_contexts()
    if name is not None:
        return _named(known, name)
    return known.contexts.get(known.current or "") or Context(address=LOCAL_ADDRESS)


def rows() -> list[dict[str, Any]]:
    """Every context as ``context ls`` shows it."""
    known = read_contexts()
    return [
        {"current": name == known.current, "name": name, **context.model_dump()}
        for name, context in known.contexts.items()
    ]
