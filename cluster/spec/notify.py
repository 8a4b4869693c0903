"""Who is told how a run ended."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cluster.spec.base import Section

Event = Literal["succeeded", "failed", "stopped", "promoted"]


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class NotifySpec(Section):
    """A webhook that is told when a run has ended, by a POST of a small JSON document. No run fails by it."""

    webhook: str
    """An `https://` URL; `http://` is for this machine itself. Redirects are not followed. The URL is kept with the run
    as all of the spec is, so a secret does not belong into it."""
    events: Annotated[tuple[Event, ...], Field(min_length=1)] = ("succeeded", "failed", "promoted")
    """Which of `succeeded`, `failed`, `stopped` (by Ctrl-C, or as a job) and `promoted` it is told of."""
    secret_env: str | None = None
    """The environment variable that holds the secret which signs what is sent; none sends it without a signature."""

    @field_validator("events")
    @classmethod
    def _each_once(cls, events: tuple[Event, ...]) -> tuple[Event, ...]:
        if len(set(events)) < len(events):
            raise ValueError(f"each at most once; there are {', '.join(get_args(Event))}")
        return events

    # Checked over the whole section, because what is wrong with a single field is shown with its value: a URL with a
    # password in it, or a secret given in the place of a variable's name.
    @model_validator(mode="after")
    def _safe(self) -> NotifySpec:
        try:
            parts = urlsplit(self.webhook)
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            raise ValueError("webhook is no URL; give one such as https://hooks.example.org/stillhouse") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError("webhook must not hold a user or a password; sign what is sent by secret_env instead")
        if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
            raise ValueError("webhook must be an https:// URL; http:// is allowed to this machine itself, 127.0.0.1")
        if self.secret_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.secret_env):
            raise ValueError("secret_env must be the name of an environment variable, such as WEBHOOK_SECRET")
        return self
