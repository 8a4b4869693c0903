"""`stillhouse init`: a commented family file, written from the spec's own schema."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.spec import NAME_PATTERN, CorpusSpec
from cluster.specfile import REMOTE_SCHEMES, anchored, load_spec
from cluster.yaml_file import parse_yaml
from jobs.explain import Field, fields_of, find

TEACHER, CORPUS = "/path/to/teacher", "/path/to/corpus.jsonl"
WIDTH = 110
HEADER = """\
# A family of students for Stillhouse: one teacher, one pass over the text, several students.
# A line that begins with # and no space holds a default: remove the # to change it.
# stillhouse explain students.loss   what a field means
# stillhouse check {file}   whether the family can start
# stillhouse run {file}
"""


def write_family(
    path: Path, teacher: str | None, corpus: Sequence[str], students: Sequence[str], name: str | None
) -> list[str]:
    """Write a family file.

    Args:
        teacher: its model; none leaves a path to be filled in. ``corpus`` likewise.
        students: ``NAME=LAYERS`` for some of the teacher's layers, or ``NAME=MODEL``; none means one of half of the
            teacher's layers.
        name: the family's; none means the file's.

    Returns:
        The fields that are still to be filled in.

    Raises:
        UserError: the file is there already or cannot be written, or an option cannot be used. Nothing is left then.
    """
    model = _anchored(teacher) if teacher else TEACHER
    layers = _configured(model, "num_hidden_layers", "n_layer") or 4
    positions = _configured(model, "max_position_embeddings", "n_positions")
    inits = dict(_student(given) for given in students or [f"small={max(1, layers // 2)}"])
    if len(inits) < len(students):
        raise UserError("--student: a name is given twice; give each student its own")
    required = {
        "name": name or (path.stem if re.match(NAME_PATTERN, path.stem) else "family"),
        "teacher": {"model": model},
        "corpus": {"paths": [_anchored(each) for each in corpus] or [CORPUS], **_shortened(positions)},
        "students": {student: {"init": init} for student, init in inits.items()},
    }
    text = "\n".join([HEADER.format(file=path), *_section(find("")[0], required, ""), ""])
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} is there already and is not overwritten; give another name, or remove it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give a file in a folder that is there") from None
    try:
        load_spec(path)
    except UserError:
        path.unlink()
        raise
    return [field for field, given in (("teacher.model", teacher), ("corpus.paths", corpus)) if not given]


def _shortened(positions: int | None) -> dict[str, int]:
    """A length for the corpus' sequences, where the default is more than the teacher reads."""
    default = CorpusSpec.model_fields["sequence_length"].default
    return {} if positions is None or positions >= default else {"sequence_length": positions}


def _student(given: str) -> tuple[str, dict[str, Any]]:
    """One student's name and its ``init``."""
    name, sign, what = given.partition("=")
    if not sign or not name or not what:
        raise UserError(
            f"--student: got {given!r}; give NAME=LAYERS for some of the teacher's layers, such as small=6, or "
            f"NAME=MODEL for a directory, models:/name@alias or hf://org/name"
        )
    if what.isdecimal():
        return name, {"source": "teacher", "layers": int(what)}
    return name, {"source": "pretrained", "model": _anchored(what)}


def _configured(teacher: str, *names: str) -> int | None:
    """A number of the teacher's configuration, by the first of several names; None where it cannot be read here."""
    try:
        config = json.loads((Path(teacher) / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _anchored(path: str) -> str:
    """A local path as an absolute one, for the file may lie elsewhere."""
    if path.startswith(REMOTE_SCHEMES):
        return path
    # A glob that ends in a slash names folders.
    return anchored(path, Path.cwd()) + "/" * path.endswith("/")


def _section(of: Field, given: dict[str, Any], indent: str) -> Iterator[str]:
    """The lines of a section: what is given, and every other field with its default behind a ``#``."""
    for field in fields_of(of.schema):
        value = given.get(field.name)
        if not indent:
            yield ""
        yield from textwrap.wrap(field.about, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if value is None:
            yield f"{indent}#{field.name}: {json.dumps(_without_nulls(field.schema['default']))}"
        elif indent or not isinstance(value, dict):
            yield f"{indent}{field.name}: {json.dumps(value)}"
        elif field.name == "students":
            yield "students:"
            for student, own in value.items():
                yield f"  {_key(student)}:"
                yield from _section(field, own, "    ")
        else:
            yield f"{field.name}:"
            yield from _section(field, value, "  ")


def _key(name: str) -> str:
    """A student's name as YAML reads it back: some are no text without quotes, such as on, 1 and 2026-11-24."""
    plain = re.match(NAME_PATTERN, name) and isinstance(parse_yaml(name, "--student"), str)
    return name if plain else json.dumps(name)


def _without_nulls(default: Any) -> Any:
    if not isinstance(default, dict):
        return default
    return {name: value for name, value in default.items() if value is not None}
