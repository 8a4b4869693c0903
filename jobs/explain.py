"""`stillhouse explain`: what a field of the family spec means, read from the spec's own JSON Schema."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from cluster.spec import FamilySpec

WIDTH = 100
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
Schema = dict[str, Any]
ROOT: Schema = FamilySpec.model_json_schema()


@dataclass(frozen=True)
class Field:
    """One field of the spec. ``variant`` is how the section that has it is chosen where there are several."""

    name: str
    schema: Schema
    required: bool
    variant: str = ""

    @property
    def about(self) -> str:
        """What the field means; where only its section is described, what that is."""
        own = self.schema.get("description")
        sections = [] if own else [section["description"] for section in sections_of(self.schema)]
        return " ".join((own or " ".join(sections)).split())

    @property
    def summary(self) -> str:
        """Its type and its default; a section's own fields have theirs."""
        given = self.schema.get("default")
        default = "none" if given is None else json.dumps(given).strip('"')
        shown = "required" if self.required else "optional" if isinstance(given, dict) else f"default {default}"
        return f"{type_of(self.schema)}, {shown}"


def _alternatives(schema: Schema) -> Iterator[Schema]:
    """What a value may be, references followed; null is left out, for it only means that a field is not set."""
    if "$ref" in schema:
        yield ROOT["$defs"][schema["$ref"].rpartition("/")[2]]
    elif several := schema.get("anyOf", schema.get("oneOf")):
        for each in several:
            yield from _alternatives(each)
    elif schema.get("type") != "null":
        yield schema


def _values(schema: Schema) -> Schema | None:
    """The schema of a mapping's values, such as each student's; None where it is no mapping of names."""
    return next(iter(schema.get("patternProperties", {}).values()), None)


def sections_of(schema: Schema) -> list[Schema]:
    """The sections that a value may be, those of a mapping's values included; empty for a plain value."""
    found: list[Schema] = []
    for each in _alternatives(schema):
        inner = _values(each)
        found += sections_of(inner) if inner is not None else [each] if "properties" in each else []
    return found


def fields_of(schema: Schema) -> list[Field]:
    """The fields of all sections that a value may be."""
    sections = sections_of(schema)
    return [
        Field(name, own, name in section.get("required", ()), _variant(section) if len(sections) > 1 else "")
        for section in sections
        for name, own in section["properties"].items()
    ]


def _variant(section: Schema) -> str:
    """The field that tells a section from the others in its place, such as ``source: teacher``."""
    return next((f"{name}: {own['const']}" for name, own in section["properties"].items() if "const" in own), "")


def type_of(schema: Schema) -> str:
    """A type in words, with what bounds it."""
    names = dict.fromkeys(_type(each) for each in _alternatives(schema))
    return " or ".join(names)


def _type(schema: Schema) -> str:
    if "properties" in schema:
        return "section"
    if (inner := _values(schema)) is not None:
        return f"mapping of names to {type_of(inner)}s"
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "array":
        parts = schema.get("prefixItems")
        if parts:
            return f"[{', '.join(map(type_of, parts))}]"
        # "list of strings", but "list of one of a, b".
        return f"list of {type_of(schema['items'])}" + "s" * ("one of" not in type_of(schema["items"]))
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return f"{schema.get('type', 'any value')} {' and '.join(bounds)}".strip()


def find(path: str) -> list[Field]:
    """The field at a dotted path; several where it depends on a section's variant. "" is the whole spec.

    A student's name may be there or not: ``students.lr`` and ``students.small.lr`` are the same field.

    Raises:
        UserError: there is none; names the nearest.
    """
    found, parts = [Field("", ROOT, required=True)], path.split(".") if path else []
    while parts:
        inner = [field for each in found for field in fields_of(each.schema)]
        named = any(_values(each) is not None for field in found for each in _alternatives(field.schema))
        if named and len(parts) > 1 and parts[0] not in {field.name for field in inner}:
            parts = parts[1:]
        found, parts = [field for field in inner if field.name == parts[0]], parts[1:]
        if not found:
            raise UserError(
                f"explain: there is no field {path!r}; nearest: {', '.join(nearest(path))}; `stillhouse explain` lists "
                f"all sections"
            )
    return found


def _paths(schema: Schema, prefix: str = "") -> Iterator[str]:
    for field in fields_of(schema):
        yield f"{prefix}{field.name}"
        yield from _paths(field.schema, f"{prefix}{field.name}.")


def nearest(path: str) -> list[str]:
    """Up to three paths that somebody may have meant."""
    known, last = list(dict.fromkeys(_paths(ROOT))), path.rpartition(".")[2]
    names = difflib.get_close_matches(last, {each.rpartition(".")[2] for each in known}, n=3)
    alike = [each for each in known if each.rpartition(".")[2] in names]
    return difflib.get_close_matches(path, alike or known, n=3, cutoff=0.0)


def explain(path: str) -> str:
    """What stands behind a field: its type, its default, what it means, and its own fields.

    Raises:
        UserError: there is no such field; names the nearest.
    """
    lines: list[str] = []
    for field in find(path):
        where = f"{path} (with {field.variant})" if field.variant else path or "the family spec"
        lines += [f"{where}: {field.summary}" if path else where, "", *_wrapped(field.about, "  ")]
        if inner := fields_of(field.schema):
            lines += ["", *_table(inner)]
        lines.append("")
    return "\n".join(lines[:-1])


def _table(fields: list[Field]) -> Iterator[str]:
    variant = None
    for field in fields:
        if field.variant != variant:
            variant = field.variant
            yield f"Fields with {variant}:" if variant else "Fields:"
        yield f"  {field.name}: {field.summary}"
        yield from _wrapped(field.about, "      ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
