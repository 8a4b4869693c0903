"""Reads the texts of one file: lines or an array of JSON, parquet, or plain text, compressed or not.

A file is read as a stream of small tables, so that its size does not show in a worker's memory; a .txt file and a
.json file with one array are held whole.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.corpus.files import PARQUET, format_of
from cluster.errors import UserError

# Rows of one table.
ROWS = 256
TEXT = "text"


def read_texts(path: str, inner: str, filesystem: Any, field: str) -> Iterator[pa.Table]:
    """The texts of a file as tables of one column ``text``; null where a row has none.

    Args:
        path: as the user named it; ``inner`` is the path inside ``filesystem``.
        field: that holds a row's text; a .txt file is one text.

    Raises:
        UserError: the content is not what the name promises, no row has the field, or it holds something else.
    """
    known = format_of(path)
    assert known is not None
    suffix, codec = known
    try:
        if suffix == PARQUET:
            with filesystem.open_input_file(inner) as file:
                yield from _parquet(path, file, field)
            return
        # Arrow reads all members of a concatenated file, and refuses one that is cut short.
        with filesystem.open_input_stream(inner, compression=codec) as stream, io.BufferedReader(stream) as lines:
            if suffix == ".txt":
                yield _table([lines.read().decode("utf-8-sig")])
                return
            rows = _array(path, lines) if suffix == ".json" and _is_array(lines) else _lines(path, lines)
            yield from _field_of(path, rows, field)
    except UnicodeDecodeError as error:
        raise UserError(f"corpus.paths: {path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    except UnicodeEncodeError as error:
        where = f"half of a surrogate pair, {error.object[error.start : error.end]!r}"
        raise UserError(f"corpus.paths: {path} holds {where}, which is no character") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"corpus.paths: {path} cannot be read as {suffix}: {reason}") from None


def _table(texts: list[str | None]) -> pa.Table:
    return pa.table({TEXT: pa.array(texts, pa.large_string())})


def _parquet(path: str, file: Any, field: str) -> Iterator[pa.Table]:
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    if field not in schema.names:
        raise _no_field(path, field, schema.names)
    kind = schema.field(field).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(values) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise UserError(f"corpus.text_field: {field!r} of {path} holds {kind}, not text")
    for batch in parquet.iter_batches(ROWS, columns=[field]):
        yield pa.table({TEXT: batch.column(0).cast(pa.large_string())})


def _no_field(path: str, field: str, names: Iterable[str]) -> UserError:
    return UserError(f"corpus.text_field: {field!r} is not there; the rows have {', '.join(names)} ({path})")


def _is_array(stream: io.BufferedReader) -> bool:
    """Whether JSON is one array rather than a row per line, by its first character."""
    return stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(path: str, stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(json.loads(stream.read().decode("utf-8-sig")), 1)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}: {error.msg}"
        raise UserError(f"corpus.paths: {path} cannot be read as an array of JSON: {where}") from None


def _lines(path: str, stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"corpus.paths: {path} cannot be read as lines of JSON: line {number}: {error.msg}"
            ) from None


def _field_of(path: str, rows: Iterator[tuple[int, Any]], field: str) -> Iterator[pa.Table]:
    """The field of rows of JSON."""
    names: dict[str, None] = {}
    while part := list(itertools.islice(rows, ROWS)):
        texts: list[str | None] = []
        for number, row in part:
            if not isinstance(row, dict):
                raise UserError(
                    f"corpus.paths: {path}: row {number} is no JSON object: {json.dumps(row)[:40]}; a file that is no "
                    f"part of the corpus can be left out by a glob, such as folder/*.jsonl"
                )
            names.update(dict.fromkeys(row))
            text = row.get(field)
            if not isinstance(text, str | None):
                raise UserError(f"corpus.text_field: {field!r} holds {type(text).__name__}, not text ({path})")
            texts.append(text)
        yield _table(texts)
    if names and field not in names:
        raise _no_field(path, field, names)
