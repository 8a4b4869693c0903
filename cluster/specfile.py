"""Reads a family spec: YAML text and ``--set`` overrides in, a frozen :class:`FamilySpec` or a clear refusal out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import UserError
from cluster.spec import FamilySpec

REMOTE_SCHEMES = ("s3://", "hf://", "models:/")


def home() -> Path:
    """The Stillhouse home: runs, the embedded MLflow and caches. ``$STILLHOUSE_HOME``, else ``~/.stillhouse``."""
    return Path(os.environ.get("STILLHOUSE_HOME") or Path.home() / ".stillhouse").expanduser().resolve()


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"{key!r} is given twice, on lines {seen[key]} and {line}; names must differ")
            seen[key] = line
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise UserError(f"{what}: not valid YAML{where}: {problem}") from None


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
    node[keys[-1]] = _parse_yaml(text, f"--set {path}")


def _spell(location: tuple[int | str, ...]) -> str:
    """Path of a field as it is written in YAML; pydantic's own union tags are left out."""
    tags = {"teacher", "pretrained", "scratch"}
    parts = [str(p) for i, p in enumerate(location) if not (i and location[i - 1] == "init" and p in tags)]
    return ".".join(p for p in parts if p not in ("int", "constrained-int", "list[constrained-int]", "[key]"))


def _explain(error: ValidationError) -> str:
    """All that is wrong with a spec in one line: path, what was given, what is allowed."""
    problems = []
    for detail in error.errors(include_url=False):
        path, message = _spell(detail["loc"]), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            problem = f"{path}: no such field; see `stillhouse schema` for those there are"
        elif detail["type"] == "missing":
            problem = f"{path}: is required and was not given"
        elif detail["type"] == "value_error" and isinstance(detail["input"], dict):
            problem = f"{path}: {message}" if path else message
        else:
            given = detail["input"] if not isinstance(detail["input"], dict) else "a mapping"
            problem = f"{path}: got {given!r}; {message[:1].lower()}{message[1:]}"
        if problem not in problems:
            problems.append(problem)
    return "; ".join(problems)


def _anchor(path: str, folder: Path) -> str:
    """An absolute path for a local one (relative to the spec's own folder); a remote one as it is."""
    if path.startswith(REMOTE_SCHEMES):
        return path
    return os.path.normpath(folder / Path(os.path.expandvars(path)).expanduser())


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    corpus, teacher, students = tree.get("corpus"), tree.get("teacher"), tree.get("students")
    if isinstance(corpus, dict) and isinstance(corpus.get("paths"), list):
        corpus["paths"] = [_anchor(p, folder) if isinstance(p, str) else p for p in corpus["paths"]]
    inits = [s.get("init") for s in students.values() if isinstance(s, dict)] if isinstance(students, dict) else []
    for holder in (teacher, *inits):
        if isinstance(holder, dict) and isinstance(holder.get("model"), str):
            holder["model"] = _anchor(holder["model"], folder)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> FamilySpec:
    """Read, override and validate a spec file.

    Relative paths in it are relative to its own folder; ``$VARIABLES`` and ``~`` in them are expanded.

    Raises:
        UserError: unreadable file, malformed YAML, unknown or contradictory field; says which and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the spec: {getattr(error, 'strerror', None) or error}") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a family spec is a YAML mapping with name, teacher, corpus and students")
    for assignment in overrides:
        _apply_override(tree, assignment)
    _anchor_paths(tree, path.resolve().parent)
    try:
        return FamilySpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def training_hash(spec: FamilySpec) -> str:
    """16 hex digits over all that decides the students' weights: what a resumed run must agree on."""
    kept = spec.model_dump(mode="json", exclude={"tracking", "serving", "stream", "evaluation", "checkpoints"})
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
