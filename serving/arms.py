"""Arms: what is served, under which name, with which share of the traffic.

An *arm* is one student version (or the teacher, for reference) in an experiment. On the command line it is written
``[name=]SOURCE[:WEIGHT]``::

    models:/demo-small@champion            weight 1, named "demo-small"
    big=models:/demo-large/3:50            weight 50, named "big"
    teacher=./models/teacher:0             gets no split traffic, answers only when asked by name
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError

FORM = "[name=]SOURCE[:WEIGHT] with SOURCE models:/NAME@ALIAS, models:/NAME/VERSION or a directory"

# A name travels in an HTTP header, a URL path and a metric label.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# However long: a family's and a student's name and what stands for its champion make more than 64 of them.
_SIGNS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REGISTERED = re.compile(r"models:/(?P<name>[^/@:]+)(?:@[^/@:]+|/[0-9]+)")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Arm:
    """One model behind the endpoint.

    ``source`` is a ``models:/`` URI or a directory. ``weight`` is its share of the split traffic relative to the
    other arms' (any unit, finite, >= 0); an arm of weight 0 answers only when it is asked for by name.
    """

    name: str
    source: str
    weight: float = 1.0

    @property
    def registered(self) -> bool:
        """Whether the source is a model version in the registry (and not a directory)."""
        return self.source.startswith("models:/")


def parse_arm(text: str) -> Arm:
    """Read one ``[name=]SOURCE[:WEIGHT]``.

    A number after the last colon is always the weight, so a directory whose own name ends in ``:50`` needs the
    weight written out. An ``=`` behind the first slash belongs to the directory's name.

    Raises:
        UserError: the text, the name or the weight cannot be used. Whether the source exists is not looked at here.
    """
    source, weight = _split_weight(text)
    before, equals, after = source.partition("=")
    given = before if equals and "/" not in before else None
    if given is not None:
        source = after
    if not source:
        raise UserError(f"arm {text!r} has no source; allowed: {FORM}.")

    registered = _REGISTERED.fullmatch(source)
    if source.startswith("models:") and not registered:
        raise UserError(
            f"arm {text!r}: {source!r} is not a model version; allowed: models:/NAME@ALIAS or "
            "models:/NAME/VERSION, then :WEIGHT if wanted."
        )
    default = registered["name"] if registered else Path(source).absolute().name
    name = default if given is None else given
    if not _NAME.fullmatch(name):
        raise UserError(
            f"arm {text!r} would be named {name!r}; allowed: letters, digits and . _ - (64 at most); "
            f"name it yourself: NAME={source}."
        )
    return Arm(name, source, weight)


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Read several arms, in the order given.

    Raises:
        UserError: one of them cannot be read, two share a name, there is none, or all weights are 0.
    """
    arms = [parse_arm(text) for text in texts]
    check_arms(arms)
    return arms


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuse a list of arms that cannot stand behind one endpoint.

    Raises:
        UserError: no arm, a name that is none, two of one name, a weight that is negative or not finite, or nothing but
            weights of 0.
    """
    if not arms:
        raise UserError(f"no arm given; give at least one: {FORM}.")
    for arm in arms:
        if not _SIGNS.fullmatch(arm.name):
            raise UserError(
                f"an arm is named {arm.name!r}; allowed: letters, digits and . _ -, the first a letter or a digit."
            )
        twins = [other.source for other in arms if other.name == arm.name]
        if len(twins) > 1:
            raise UserError(
                f"{len(twins)} arms are named {arm.name!r} ({', '.join(twins)}); each needs its own name: "
                f"write NAME={twins[-1]}."
            )
    check_weights({arm.name: arm.weight for arm in arms})


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights no arm can be drawn by.

    Raises:
        UserError: a weight is negative or not finite, or all are 0.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"arm {name!r} has weight {weight:g}; allowed: a finite number, 0 or more.")
    if not any(weights.values()):
        raise UserError(f"all weights are 0 ({', '.join(weights)}); give at least one arm a weight above 0.")


def pick(weights: Mapping[str, float], point: float) -> str:
    """The arm at ``point`` in [0, 1) when the weights are laid end to end; an arm of weight 0 is never drawn."""
    drawable = [(name, weight) for name, weight in weights.items() if weight > 0]
    left = point * sum(weight for _, weight in drawable)
    for name, weight in drawable:
        if left < weight:
            return name
        left -= weight
    return drawable[-1][0]  # rounding in the subtractions may leave the point just past the end


def pinned(source: str, tracking_uri: str | None) -> str:
    """The source with an alias replaced by the version that it points at now, so that the arm stays what it is.

    Raises:
        UserError: there is no such model or alias.
    """
    if not source.startswith("models:/") or "@" not in source or tracking_uri is None:
        return source
    from cluster.registry import Models

    name, version = Models(tracking_uri).resolve(source)
    return f"models:/{name}/{version}"


def locate(arm: Arm, tracking_uri: str | None = None, engine: str = "transformers") -> Path | None:
    """The arm's model as a local Hugging Face directory, fetched from the registry when it is a registered version.

    None for the echo engine, which has no model.

    Raises:
        UserError: there is no such directory or version, no registry was given for one, or the directory lacks
            config.json, safetensors weights or a tokenizer.
    """
    if engine == "echo":
        return None
    if arm.registered:
        if tracking_uri is None:
            raise UserError(
                f"arm {arm.name!r}: {arm.source!r} is in a registry; give its tracking URI, or a directory."
            )
        from cluster.registry import Models, fetch_model

        directory = fetch_model(arm.source, tracking_uri)
        Models(tracking_uri).check_weights(arm.source, directory)
    else:
        directory = Path(arm.source).absolute()
        if not directory.is_dir():
            raise UserError(f"arm {arm.name!r}: there is no directory {arm.source!r}; allowed: {FORM}.")
    missing = _missing(directory)
    if missing:
        raise UserError(
            f"arm {arm.name!r}: {directory} has no {' and no '.join(missing)}; give a directory written by "
            "save_pretrained (model and tokenizer)."
        )
    return directory


def _missing(directory: Path) -> list[str]:
    def any_of(names: Iterable[str]) -> bool:
        return any((directory / name).is_file() for name in names)

    wanted = {
        "config.json": any_of(["config.json"]),
        "*.safetensors": any(directory.glob("*.safetensors")),
        "tokenizer": any_of(_TOKENIZER_FILES),
    }
    return [what for what, there in wanted.items() if not there]


def _split_weight(text: str) -> tuple[str, float]:
    source, colon, tail = text.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return text, 1.0
    if not colon:
        return text, 1.0  # a directory whose name is a number
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"arm {text!r} has weight {tail}; allowed: a finite number, 0 or more.")
    return source, weight
