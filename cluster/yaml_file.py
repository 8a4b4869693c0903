"""Reads the YAML files that people write: strictly, and with refusals that say where and what."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a YAML node, or a refusal that names both lines of a key given twice."""
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"{key!r} is given twice, on lines {seen[key]} and {line}; names must differ")
            seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, what: str) -> Any:
    """A YAML text's content.

    Args:
        what: where it stands, for the refusal.

    Raises:
        UserError: not YAML, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise UserError(f"{what}: not valid YAML{where}: {problem}") from None


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        what: what it should hold, such as "a family spec is a YAML mapping with name and teacher".

    Raises:
        UserError: unreadable, malformed, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {what}")
    return tree
