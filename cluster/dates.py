"""Dates in ``corpus.paths``: ``s3://bucket/dt={{ ds }}/`` is another folder every day."""

from __future__ import annotations

import re
from datetime import date, timedelta

from cluster.errors import UserError
from cluster.spec import FamilySpec

MACROS = "{{ ds }}, {{ ds_nodash }} and {{ ds_add(ds, DAYS) }}"
# What a path must hold to be rendered; another one stays to the letter.
OPENS = "{{"


def date_of(text: str) -> date:
    """A date as it is given to ``--ds``.

    Raises:
        UserError: it is none.
    """
    # Python alone would take 20261124 and 2026-W48-2 too.
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        try:
            return date.fromisoformat(text)
        except ValueError as error:
            raise UserError(f"--ds: got {text!r}; {error}; give a date as YYYY-MM-DD") from None
    raise UserError(f"--ds: got {text!r}; give a date as YYYY-MM-DD")


def ds_add(ds: str, days: int) -> str:
    """The date so many days after another, both as YYYY-MM-DD; what Airflow calls by this name.

    Raises:
        ValueError: ``ds`` is no date.
        OverflowError: the date does not exist.
    """
    return (date.fromisoformat(ds) + timedelta(days=days)).isoformat()


def has_macros(spec: FamilySpec) -> bool:
    """Whether the family's corpus lies elsewhere on another day."""
    return any(OPENS in path for path in spec.corpus.paths)


def rendered(spec: FamilySpec, ds: date) -> FamilySpec:
    """The family of one date: the macros in ``corpus.paths`` are filled in, all else is as it was.

    Raises:
        UserError: a macro that does not exist, or a template that cannot be read; names the path and what is allowed.
    """
    if not has_macros(spec):
        return spec
    paths = [_render(path, ds) if OPENS in path else path for path in spec.corpus.paths]
    return spec.model_copy(update={"corpus": spec.corpus.model_copy(update={"paths": paths})})


def _render(path: str, ds: date) -> str:
    # Imported here, because most families have no use for it.
    from jinja2 import StrictUndefined, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    # Not Jinja's own, such as range: nothing but what MACROS names.
    environment.globals.clear()
    environment.globals.update(ds=ds.isoformat(), ds_nodash=ds.isoformat().replace("-", ""), ds_add=ds_add)
    try:
        if any(not isinstance(node, nodes.Output) for node in environment.parse(path).body):
            raise ValueError("a path has no statements")
        return environment.from_string(path).render()
    except Exception as error:  # whatever goes wrong here is wrong with the path that was given
        reason = (getattr(error, "message", None) or str(error) or type(error).__name__).removesuffix(".")
        line = " ".join(f"corpus.paths: {path}: {reason}; the macros are {MACROS}".split())
        raise UserError(line) from None
