"""The experiment spec: which arms, what is compared, what decides.

A spec is data: it is read once, frozen, and not changed while the experiment runs. :func:`parse_experiment` turns what
is wrong with one into one sentence.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import UserError
from cluster.spec import TeacherSpec

Metric = Literal["latency_ms", "first_token_ms", "per_token_ms"]
Statistic = Literal["mean", "p50", "p95", "p99"]
Weight = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the spec: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Guards(Section):
    """What no candidate may break. A guard that is None does not count.

    A candidate that surely breaks one (its interval lies past the limit) is rolled back at once; one whose estimate is
    past the limit without being sure is not promoted meanwhile.
    """

    error_rate: Share | None = 0.02
    """How much higher than control's the candidate's share of failed requests may be, absolute: 0.02 allows 3 % beside
    1 %."""
    kl: Annotated[float, Field(gt=0.0)] | None = None
    """Highest mean KL(teacher || arm) over the scored answers, nats per token."""
    agreement: Share | None = None
    """Lowest mean agreement with the teacher over the scored answers."""
    slower: Annotated[float, Field(ge=0.0)] | None = None
    """Share by which the candidate's statistic may be higher than control's: 0.2 rolls back one that is surely 20 %
    slower. None lets a slow candidate run until the experiment ends."""


class RampStep(Section):
    """Weights that hold from some time on."""

    after_s: Annotated[float, Field(ge=0.0)]
    """Seconds since the experiment's start."""
    weights: dict[str, Weight]
    """Arm -> weight, every arm of the experiment."""


class ExperimentSpec(Section):
    """One experiment: candidates against a control, on the traffic that an endpoint splits."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Letters, digits and . _ - (64 at most)."""
    control: str
    """The arm that is compared with: what serves today."""
    candidates: Annotated[list[str], Field(min_length=1)]
    """The arms that may take its place."""
    metric: Metric = "latency_ms"
    """What is compared: the whole answer, the time to its first token, or the time per token after that."""
    statistic: Statistic = "p50"
    """Of which statistic. Means rest on an asymptotic interval, quantiles on one that holds for every distribution."""
    gain: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Promote a candidate whose statistic is surely lower than control's by more than this share."""
    confidence: Annotated[float, Field(ge=0.5, le=0.9999)] = 0.95
    """With how much confidence: the chance that anything is promoted or rolled back that should not be, over all
    candidates, rules and looks together, is at most 1 - confidence."""
    min_requests: Annotated[int, Field(ge=1)] = 100
    """Answers that control and a candidate must each have given before it is promoted."""
    max_requests: Annotated[int, Field(ge=1)] = 20000
    """Requests over all arms after which the experiment ends without a winner."""
    guards: Guards = Guards()
    """What no candidate may break."""
    traffic: dict[str, Weight] = {}
    """Arm -> weight in the split. Empty means equal shares."""
    ramp: list[RampStep] = []
    """Later weights, by time; empty means that `traffic` holds throughout."""
    sample: Share = 0.0
    """Share of the answers that the teacher scores; the guards on KL and agreement need some."""
    teacher: TeacherSpec | None = None
    """The teacher that scores them, as in a family's spec: its `model`, and how many shards and replicas of it; needed
    with `sample`."""
    cost_per_hour: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    """Arm -> what all its replicas cost per hour, in any one currency."""
    promote_alias: str = "champion"
    """The MLflow alias that a promotion moves to the winner."""

    @property
    def arms(self) -> list[str]:
        """Control first, then the candidates as given."""
        return [self.control, *self.candidates]

    def weights(self) -> dict[str, float]:
        """Arm -> weight at the start."""
        return dict(self.traffic) or dict.fromkeys(self.arms, 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"control and candidates are {', '.join(self.arms)}; each arm may be named once")
        for where, weights in [("traffic", self.traffic), *(("ramp", step.weights) for step in self.ramp)]:
            if (weights or where == "ramp") and set(weights) != set(self.arms):
                given = ", ".join(weights) or "nothing"
                raise ValueError(f"{where} weighs {given}; give each of {', '.join(self.arms)} a weight")
            if weights and not any(weights.values()):
                raise ValueError(f"{where} has only weights of 0; give at least one arm more")
        times = [step.after_s for step in self.ramp]
        if times != sorted(set(times)):
            raise ValueError(f"ramp has its steps after {times} s; give them in order, each later than the one before")
        if strangers := sorted(set(self.cost_per_hour) - set(self.arms)):
            raise ValueError(f"cost_per_hour names {', '.join(strangers)}; allowed are {', '.join(self.arms)}")
        scored = [name for name in ("kl", "agreement") if getattr(self.guards, name) is not None]
        if scored and not self.sample:
            raise ValueError(
                f"guards.{scored[0]} needs answers that the teacher scored; set sample above 0, such as 0.1"
            )
        if self.sample and self.teacher is None:
            raise ValueError(
                f"sample is {self.sample:g} and there is no teacher to score it; set teacher, or sample to 0"
            )
        return self


def parse_experiment(tree: Mapping[str, Any]) -> ExperimentSpec:
    """Validate a spec that was read from YAML or JSON.

    Raises:
        UserError: a field is unknown, missing, out of range or contradicts another; says which, and what is allowed.
    """
    try:
        return ExperimentSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"the experiment spec cannot be used: {'; '.join(_problems(error))}.") from None


def _problems(error: ValidationError) -> list[str]:
    problems = []
    for detail in error.errors(include_url=False):
        path, message = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            parts = {"guards": Guards.model_fields, "ramp": RampStep.model_fields}
            fields = parts.get(path.partition(".")[0], ExperimentSpec.model_fields)
            problems.append(f"{path}: no such field; there are {', '.join(fields)}")
        elif detail["type"] == "missing":
            problems.append(f"{path}: is required and was not given")
        elif not path:
            problems.append(message)
        else:
            given = "a mapping" if isinstance(detail["input"], dict) else repr(detail["input"])
            problems.append(f"{path}: got {given}; {message[:1].lower()}{message[1:]}")
    return problems
