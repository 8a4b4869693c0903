"""The spec of an endpoint: every setting of the serving side, declared once.

Written as YAML for ``stillhouse serve endpoint.yaml``, or built from the command line's arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cluster.errors import UserError
from cluster.spec.base import Bytes, Section
from cluster.yaml_file import read_mapping
from serving.arms import FORM, Arm, check_arms, parse_arms

Unit = Literal["user", "session", "key"]


class ReplicasSpec(Section):
    """How many processes serve an arm; between ``min`` and ``max``, by the requests under way."""

    min: PositiveInt = 1
    """How many at least."""
    max: PositiveInt = 1
    """How many at most; where it is above ``min``, the arm grows and shrinks with its load."""
    target: PositiveFloat = 4.0
    """Requests under way per replica that the number of replicas is steered to."""
    up_after_s: NonNegativeFloat = 10.0
    """Seconds for which there must be too few before one is started."""
    down_after_s: NonNegativeFloat = 300.0
    """Seconds for which there must be too many before one ends; it still answers what it has taken in."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasSpec:
        if self.max < self.min:
            raise ValueError(f"replicas.max {self.max} is below replicas.min {self.min}")
        return self


class ArmSpec(Section):
    """One model behind the endpoint."""

    source: str
    """``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a directory written by ``save_pretrained``."""
    weight: NonNegativeFloat = 1.0
    """Share of the split traffic, relative to the other arms'; one of weight 0 answers only when asked by name."""
    engine: Literal["transformers", "vllm", "echo"] = "transformers"
    """What runs the model: ``transformers``, ``vllm`` or ``echo``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; ``auto`` takes them as stored. Arms whose latencies are compared want the same."""
    cpus: PositiveFloat = 0.5
    """CPUs that each replica asks Ray for; their whole part, at least 1, is its number of torch threads."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that each replica asks Ray for; with 0 it runs on the CPU."""
    memory: Bytes | None = None
    """Host memory that each replica asks Ray for, such as 3GiB; none means estimated from the model's files."""
    slots: PositiveInt = 8
    """Requests that one replica answers at the same time; they share the model's forward passes."""
    queue: NonNegativeInt = 32
    """Requests that may wait beyond these, for each door; the next is told 503."""
    replicas: ReplicasSpec = ReplicasSpec()
    """How many processes serve it."""


class LimitsSpec(Section):
    """What one request may ask for, and how long it may take."""

    body_bytes: Annotated[PositiveInt, Field(le=32 * 2**20)] = 1_048_576
    """Largest body of a request; 32 MiB at most, for it goes to the arm in one frame."""
    prompt_tokens: PositiveInt | None = None
    """Longest prompt; none means the model's context."""
    completion_tokens: PositiveInt | None = None
    """Longest answer; a request that asks for more is refused, one that asks for nothing gets this. None means the
    rest of the context."""
    body_timeout_s: PositiveFloat = 10.0
    """Seconds in which a request's body has to arrive."""
    timeout_s: PositiveFloat = 300.0
    """Seconds that a whole answer may take, waiting included; then it ends with 504."""
    requests: PositiveInt = 512
    """Completions that one door has under way at the same time, for all arms; the next is told 503."""


class BreakerSpec(Section):
    """When an arm that fails is taken out of the split, and when it may come back."""

    failures: PositiveInt = 3
    """Failures one after another that take an arm out; a process that dies takes it out at once."""
    probe_s: PositiveFloat = 2.0
    """Seconds between two tries of an arm that is out; one answer lets it back in."""


class EndpointSpec(Section):
    """Arms behind one OpenAI-compatible endpoint."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "stillhouse"
    """The model name that means: split by weight."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs ``keys``."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    arms: Annotated[dict[str, ArmSpec], Field(min_length=1)]
    """The arms, by name."""
    shadow: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(default={})
    """Arms that get a copy of this share of the split traffic; their answers are thrown away and slow nobody."""
    sticky: tuple[Unit, ...] = ("session", "user")
    """What keeps a caller on one arm: the first of these that a request has decides. ``session`` is the header
    ``x-session-id``, ``user`` the parameter ``user`` (or ``safety_identifier``), ``key`` the API key. A request with
    none of them is drawn by itself."""
    doors: PositiveInt = 1
    """Processes that listen; they share the port and agree on the split."""
    keys: Path | None = None
    """File of API keys, made by ``stillhouse keys``; it is read again when it changes. None asks for no key."""
    limits: LimitsSpec = LimitsSpec()
    """What one request may ask for."""
    breaker: BreakerSpec = BreakerSpec()
    """When a failing arm is taken out."""
    log_requests: bool = False
    """Write prompts and answers into the endpoint's log; never done unless asked for."""
    state: Path | None = None
    """Folder where weights and experiments are kept over a restart. None keeps them while the endpoint runs;
    `stillhouse serve` then takes one in the Stillhouse home."""
    start_timeout_s: PositiveFloat = 300.0
    """How long an arm may take to load."""

    @model_validator(mode="after")
    def _consistent(self) -> EndpointSpec:
        if self.name in self.arms:
            raise ValueError(f"an arm has the endpoint's name {self.name!r}; give the arm another")
        if unknown := sorted(set(self.shadow) - set(self.arms)):
            raise ValueError(f"shadow names {unknown[0]!r}, which is no arm; there are: {', '.join(self.arms)}")
        if self.host not in ("127.0.0.1", "localhost", "::1") and self.keys is None:
            raise ValueError(
                f"host {self.host} is open to others, and there are no API keys; give keys, or listen on 127.0.0.1"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Of every arm, its share of the split."""
        return {name: arm.weight for name, arm in self.arms.items()}


def checked(**fields: object) -> EndpointSpec:
    """An endpoint's spec from its fields.

    Raises:
        UserError: one of them cannot be used; it names the first.
    """
    try:
        spec = EndpointSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if where and not isinstance(first["input"], dict) else ""
        raise UserError(f"{where + ': ' if where else ''}{message}{given}") from error
    check_arms([Arm(name, arm.source, arm.weight) for name, arm in spec.arms.items()])
    return spec


def _from_here(tree: dict[str, Any], folder: Path) -> None:
    """Relative paths in a file are relative to it."""
    for name in ("keys", "state"):
        if isinstance(tree.get(name), str):
            tree[name] = folder / tree[name]
    arms = tree.get("arms")
    for arm in arms.values() if isinstance(arms, dict) else ():
        if isinstance(arm, dict) and isinstance(arm.get("source"), str) and not arm["source"].startswith("models:"):
            arm["source"] = str(folder / arm["source"])


def read_endpoint(
    path: Path | None, arms: Sequence[str] = (), per_arm: Mapping[str, Any] | None = None, **given: Any
) -> EndpointSpec:
    """The spec in a YAML file, or of arms as the command line has them.

    Args:
        arms: ``[name=]SOURCE[:WEIGHT]`` each; they stand beside those of the file.
        per_arm: fields of these arms. None is the same as left out.
        given: fields of the endpoint; they win over the file's.

    Raises:
        UserError: no such file, not YAML, or a field that cannot be used.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_mapping(path, "an endpoint is a YAML mapping with `arms:`, and a source for each of them")
        _from_here(tree, path.parent)
    elif not arms:
        raise UserError(f"no arm given; give an endpoint's file, or --arm {FORM}.")
    own = {name: value for name, value in (per_arm or {}).items() if value is not None}
    if own and not arms:
        raise UserError(f"{next(iter(own))} is for arms that --arm names; in a file it stands at the arm itself.")
    if arms:
        more = {each.name: {"source": each.source, "weight": each.weight, **own} for each in parse_arms(arms)}
        there = tree.get("arms") or {}
        tree["arms"] = {**there, **more} if isinstance(there, dict) else there
    return checked(**tree | {name: value for name, value in given.items() if value is not None})
