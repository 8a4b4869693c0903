"""How long prompts and answers are: a fixed number of tokens, or one drawn from a distribution."""

import math
from dataclasses import dataclass

import numpy as np

from cluster.errors import UserError

LENGTH_FORM = "N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA"
LONGEST = 1_000_000
_PARAMETERS = {"fixed": 1, "uniform": 2, "lognormal": 2}


@dataclass(frozen=True)
class Length:
    """A distribution of numbers of tokens, each at least 1.

    ``fixed`` (N), ``uniform`` (LOW and HIGH, both may come up) or ``lognormal``: MEAN is the mean in tokens, SIGMA the
    standard deviation of the logarithm, so the logarithm's mean is ln MEAN - SIGMA²/2.
    """

    form: str
    parameters: tuple[float, ...]

    def __str__(self) -> str:
        numbers = ":".join(f"{value:g}" for value in self.parameters)
        return numbers if self.form == "fixed" else f"{self.form}:{numbers}"

    def draw(self, rng: np.random.Generator) -> int:
        """One number of tokens."""
        if self.form == "uniform":
            low, high = self.parameters
            return int(rng.integers(int(low), int(high), endpoint=True))
        if self.form == "lognormal":
            mean, sigma = self.parameters
            drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma)
            return int(min(max(round(drawn), 1), LONGEST))
        return int(self.parameters[0])


def parse_length(text: str, option: str) -> Length:
    """Read one :data:`LENGTH_FORM`.

    Raises:
        UserError: it is in no such form, or a number in it makes no sense.
    """
    form, *numbers = text.split(":") if ":" in text else ("fixed", text)
    try:
        values = tuple(float(number) for number in numbers)
    except ValueError:
        values = ()
    if len(values) != _PARAMETERS.get(form) or not all(math.isfinite(value) for value in values):
        raise UserError(f"{option} is {text!r}; allowed: {LENGTH_FORM}.")
    lengths = values[:1] if form == "lognormal" else values
    if not all(1 <= value <= LONGEST for value in lengths):
        raise UserError(f"{option} is {text!r}; allowed: lengths from 1 to {LONGEST} tokens.")
    if form != "lognormal" and any(value != int(value) for value in values):
        raise UserError(f"{option} is {text!r}; allowed: whole numbers of tokens.")
    if form == "uniform" and values[0] > values[1]:
        raise UserError(f"{option} is {text!r}; LOW must not be above HIGH.")
    if form == "lognormal" and not 0 <= values[1] <= 5:
        raise UserError(f"{option} is {text!r}; allowed: a SIGMA from 0 to 5.")
    return Length(form, values)
