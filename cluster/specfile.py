"""Reads a family spec: YAML text and ``--set`` overrides in, a frozen :class:`FamilySpec` or a clear refusal out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.corpus.files import is_glob
from cluster.errors import UserError
from cluster.spec import FamilySpec
from cluster.yaml_file import parse_yaml, read_mapping

# Unions in the spec: the field that tells the branches apart, and their names.
UNIONS = {
    "init": ("source", ("teacher", "pretrained", "scratch")),
    "labels": ("kind", ("topk", "sampled", "hidden", "dense")),
}
REMOTE_SCHEMES = ("s3://", "hf://", "models:/")


def home() -> Path:
    """The Stillhouse home: runs, the embedded MLflow and caches. ``$STILLHOUSE_HOME``, else ``~/.stillhouse``."""
    return Path(os.environ.get("STILLHOUSE_HOME") or Path.home() / ".stillhouse").expanduser().resolve()


def _apply_override(tree: dict[str, Any], assignment: str) -> None:
    """Set one ``dotted.path=value`` in the tree; the value is read as YAML."""
    path, sign, text = assignment.partition("=")
    keys = path.split(".")
    if not sign or not all(keys):
        raise UserError(f"--set {assignment}: give a dotted path and a value, such as students.small.lr=3e-4")
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"--set {assignment}: {'.'.join(keys[: depth + 1])} is a value and has no fields")
    node[keys[-1]] = parse_yaml(text, f"--set {path}")


def _spell(location: tuple[int | str, ...]) -> str:
    """Path of a field as it is written in YAML; pydantic's own union tags are left out."""
    # What pydantic puts behind a field to say which branch of a union it tried.
    branches = {field: names for field, (_, names) in UNIONS.items()}
    branches |= {"layers": ("int", "list[int]"), "soft": ("number", "ramp"), "temperature": ("number", "ramp")}
    branches["replicas"] = ("number", "range")
    parts = [str(p) for i, p in enumerate(location) if not (i and p in branches.get(str(location[i - 1]), ()))]
    return ".".join(part for part in parts if part != "[key]")


def _explain(error: ValidationError) -> str:
    """All that is wrong with a spec in one line: path, what was given, what is allowed."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, message = _spell(detail["loc"]), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            of = f" of {detail['loc'][1]} labels" if detail["loc"][0] == "labels" else ""
            # A student's fields are those of all students.
            section = "students" if detail["loc"][:-2] == ("students",) else path.rpartition(".")[0]
            problem = f"{path}: no such field{of}; see `stillhouse explain{' ' + section if section else ''}`"
        elif detail["type"].startswith("union_tag"):
            key, names = UNIONS[path.rpartition(".")[2]]
            given = repr(detail["input"].get(key)) if isinstance(detail["input"], dict) else "no mapping"
            problem = f"{path}.{key}: got {given}; allowed are {', '.join(map(repr, names))}"
        elif detail["type"] == "missing":
            problem = f"{path}: is required and was not given"
        elif detail["type"] == "value_error" and isinstance(detail["input"], dict):
            problem = f"{path}: {message}" if path else message
        else:
            given = repr(detail["input"]) if not isinstance(detail["input"], dict) else "a mapping"
            problem = f"{path}: got {given}; {message[:1].lower()}{message[1:]}"
        # One problem per field: the branches of a union each have something to say, the first says enough.
        problems.setdefault(path, problem)
    return "; ".join(problems.values())


def anchored(path: str, folder: Path) -> str:
    """An absolute path for a local one (relative to the spec's own folder); a remote one as it is."""
    if path.startswith(REMOTE_SCHEMES):
        return path
    local = Path(os.path.expandvars(path))
    # Where there is no such user, the name of a file may begin like that.
    with contextlib.suppress(RuntimeError):
        local = local.expanduser()
    return os.path.normpath(folder / local)


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    corpus, teacher, students = tree.get("corpus"), tree.get("teacher"), tree.get("students")
    if isinstance(corpus, dict) and isinstance(corpus.get("paths"), list):
        # A glob that ends in a slash names folders.
        corpus["paths"] = [
            anchored(p, folder) + "/" * (is_glob(p) and p.endswith("/") and not p.startswith(REMOTE_SCHEMES))
            if isinstance(p, str)
            else p
            for p in corpus["paths"]
        ]
    inits = [s.get("init") for s in students.values() if isinstance(s, dict)] if isinstance(students, dict) else []
    if isinstance(store := tree.get("store"), dict) and isinstance(store.get("uri"), str):
        store["uri"] = anchored(store["uri"], folder)
    for holder in (teacher, *inits):
        if isinstance(holder, dict) and isinstance(holder.get("model"), str):
            holder["model"] = anchored(holder["model"], folder)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> FamilySpec:
    """Read, override and validate a spec file.

    Relative paths in it are relative to its own folder; ``$VARIABLES`` and ``~`` in them are expanded.

    Raises:
        UserError: unreadable file, malformed YAML, unknown or contradictory field; says which and what is allowed.
    """
    tree = read_mapping(path, "a family spec is a YAML mapping with name, teacher, corpus and students")
    for assignment in overrides:
        _apply_override(tree, assignment)
    _anchor_paths(tree, path.resolve().parent)
    try:
        return FamilySpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


# What decides neither the students' weights nor the text that they are measured on: where things run and on how many
# ranks (only the order of sums differs), how often they are tried, what is kept or shown. Nor does it matter where the
# corpus lies: what it holds is compared when it has been read.
_NOT_TRAINING: Any = {
    "corpus": {"paths", "upload"},
    "tracking": True,
    "serving": True,
    "notify": True,
    "promotion": True,
    "stream": True,
    "store": True,
    "evaluation": {"angle_every"},
    "checkpoints": True,
    "limits": True,
    "patience_s": True,
    "teacher": {"replicas", "max_restarts", "start_timeout_s", "cpus_per_shard", "memory_per_shard"},
    "students": {
        "__all__": {"max_failures", "ranks", "micro_batch", "cpus_per_rank", "gpus_per_rank", "memory_per_rank"}
    },
}


def training_part(spec: FamilySpec) -> dict[str, Any]:
    """All in a spec that decides the students' weights and figures: what a resumed run must agree on."""
    return spec.model_dump(mode="json", exclude=_NOT_TRAINING)


def training_hash(spec: FamilySpec) -> str:
    """16 hex digits over :func:`training_part`."""
    return hashlib.sha256(json.dumps(training_part(spec), sort_keys=True).encode()).hexdigest()[:16]
