"""Reads the texts of one file: lines or an array of JSON, parquet, or plain text, compressed or not.

A file is read as a stream of small tables, so that its size does not show in a worker's memory; a .txt file and a
.json file with one array are held whole. Only the text field of a row is used. A row that cannot be used does not stop
the reader: it becomes a row without text that names the reason, and :mod:`cluster.corpus.unusable` counts it.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.corpus.files import CODECS, EMPTY, PARQUET, S3, error_reason, format_of
from cluster.errors import UserError

# Rows of one table.
ROWS = 256
# Columns of a table: the text, or why there is none and where.
TEXT, UNUSABLE, PLACE = "text", "unusable", "place"
SCHEMA = pa.schema([(TEXT, pa.large_string()), (UNUSABLE, pa.string()), (PLACE, pa.string())])
# Reasons why a row cannot be used, beside "<JSON type> instead of text"; a file without rows comes as one, EMPTY.
CUT_SHORT, NO_JSON, NOT_UTF8, SURROGATE = "line cut short", "not JSON", "not UTF-8", "lone surrogate"
# What JSON calls the types that Python reads it as.
JSON_TYPES = {float: "number", bool: "boolean", list: "array", dict: "object", str: "string", type(None): "null"}
# Fields that hold a conversation or the parts of one, in the data sets of the Hugging Face Hub.
CHAT_FIELDS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "instruction")
NO_CHATS = "chats are not supported yet; render each into one text and name its field in corpus.text_field"
NAMED_FIELDS = 12
# Bytes of the longest row, and of an array, that a sample holds in memory.
LONGEST = 32 * 1024**2
# In Arrow's messages on a compressed stream and on a parquet file without its end.
SIGNS_OF_THE_CUT = ("Truncated compressed stream", "magic bytes not found in footer", "smaller than the minimum file")
# First bytes that identify a format. A Git LFS pointer is smaller than HEAD, by its specification.
HEAD = 1024
LFS = b"version https://git-lfs.github.com/spec/"
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", PARQUET: b"PAR1", "zip": b"PK\x03\x04"}
BOMS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}

# A row: its place, its content, and why it cannot be used. A text: itself, that reason, and its place.
_Row = tuple[str, Any, str | None]
_Text = tuple[str | None, str | None, str | None]


class TextReader:
    """The texts of one file, as tables of ``SCHEMA``.

    Args:
        path: as the user named it, a file of ``filesystem``.
        field: that holds a row's text; a .txt file is one text.
        limit: bytes of uncompressed content after which to stop at the end of a row; none reads all. What is longer
            than ``LONGEST`` is not read either.

    Attributes:
        whole: the end of the file was reached.
        share: of the file's rows that were read, about; a .txt file is one row.
        doubt: why the file will be refused unless a row that was not read is different; None if nothing speaks for it.
    """

    def __init__(self, path: str, filesystem: Any, field: str, limit: int | None = None) -> None:
        known = format_of(path)
        assert known is not None
        self._suffix, self._codec = known
        self._path, self._filesystem, self._field, self._limit = path, filesystem, field, limit
        self._read = 0
        self.whole, self.share = False, 1.0
        self.doubt: UserError | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        """Read the file from its beginning.

        Raises:
            UserError: the file cannot be read, is not what its name promises, is cut short in a way that leaves the
                rest unknown, or no row has the field.
        """
        rows = 0
        try:
            for table in self._tables():
                rows += len(table)
                yield table
        except (OSError, pa.ArrowException) as error:
            reason = error_reason(error)
            if any(sign in reason for sign in SIGNS_OF_THE_CUT):
                raise self._refusal("is cut short; copy or download it again") from None
            raise UserError(f"corpus.paths: cannot read {self._path}: {reason}") from None
        if not rows and self.whole:
            yield _table([(None, EMPTY, self._path)])

    def _refusal(self, what: str) -> UserError:
        return UserError(f"corpus.paths: {self._path} {what}")

    def _tables(self) -> Iterator[pa.Table]:
        inner = self._path.removeprefix(S3)
        if self._suffix == PARQUET:
            with self._filesystem.open_input_file(inner) as file:
                head = file.read(HEAD)
                self.whole = not head
                if head:
                    self._check_head(head)
                    yield from self._parquet(file)
            return
        # Without Arrow's own decompression, to see the first bytes of the file itself.
        with (
            self._filesystem.open_input_file(inner) as raw,
            io.BufferedReader(raw, 1 << 16) as file,
        ):
            head = file.peek(HEAD)[:HEAD]
            if not head:
                self.whole = True
                return
            self._check_head(head)
            # All members of a concatenated file are read.
            stream = pa.CompressedInputStream(file, self._codec) if self._codec else file
            with stream, io.BufferedReader(stream, 1 << 16) as text:
                self._check_encoding(text.peek(HEAD)[:HEAD])
                yield from self._texts(text)
                if not self.whole and self._suffix != ".txt":
                    # In stored bytes, because the number of unpacked bytes is not known.
                    read = raw.tell() if self._codec else self._read
                    self.share = read / max(read, raw.size())

    def _check_head(self, head: bytes) -> None:
        """Refuse a file of another kind than its name promises."""
        promised = self._codec or self._suffix
        if head.startswith(LFS) and len(head) < HEAD:
            raise self._refusal("is a Git LFS pointer, not the text; run `git lfs pull` in its directory")
        found = next((kind for kind, magic in MAGIC.items() if head.startswith(magic)), None)
        if found not in (promised, None):
            suffix = next((suffix for suffix, codec in CODECS.items() if codec == found), found)
            todo = "unpack it" if found == "zip" else f"rename it to end in {suffix}"
            raise self._refusal(f"holds {found.removeprefix('.')} data; {todo}")
        web = promised != ".txt" and head.lstrip().startswith(b"<")
        if web or (found is None and promised in MAGIC):
            instead = " but a web page, such as an error or a login" if web else ""
            raise self._refusal(f"is not {promised.removeprefix('.')}{instead}; download it again, or rename it")

    def _check_encoding(self, head: bytes) -> None:
        """Refuse UTF-16 and UTF-32, in which every character of ASCII has bytes that are zero."""
        encoding = next((name for bom, name in BOMS.items() if head.startswith(bom)), None)
        # Four of them in a row are no character in either.
        if encoding is None and head.count(0) > len(head) // 5 and bytes(4) not in head:
            order = "LE" if head[1::2].count(0) > head[::2].count(0) else "BE"
            encoding = "UTF-32" if head.count(0) > 0.6 * len(head) else f"UTF-16{order}"
        if encoding:
            raise self._refusal(f"is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8")

    def _texts(self, text: io.BufferedReader) -> Iterator[pa.Table]:
        if self._suffix == ".txt":
            yield from self._document(text)
        elif self._suffix == ".json" and _is_array(text):
            yield from self._fields(self._array(text))
        else:
            yield from self._fields(self._lines(text))

    def _content(self, stream: io.BufferedReader) -> str:
        """All of a file, or what of it is whole within the limit."""
        content = stream.read(-1 if self._limit is None else min(self._limit, LONGEST))
        self.whole, self._read = not stream.peek(1), len(content)
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=self.whole)

    def _document(self, stream: io.BufferedReader) -> Iterator[pa.Table]:
        try:
            if text := self._content(stream):
                yield _table([(text, None, None)])
        except UnicodeDecodeError as error:
            yield _table([(None, NOT_UTF8, f"{self._path}: byte {error.start}")])

    def _array(self, stream: io.BufferedReader) -> Iterator[_Row]:
        try:
            content = self._content(stream)
            rows = json.loads(content, parse_int=float) if self.whole else _first_rows(content)
        except UnicodeDecodeError as error:
            raise self._refusal(f"is not UTF-8 (byte {error.start}); {ENCODING_HINT}") from None
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}: {error.msg}"
            raise self._refusal(f"cannot be read as an array of JSON: {where}") from None
        except RecursionError:
            raise self._refusal("is nested too deeply for an array of JSON") from None
        for number, row in enumerate(rows, 1):
            yield f"{self._path}: row {number}", row, None

    def _lines(self, stream: io.BufferedReader) -> Iterator[_Row]:
        longest = -1 if self._limit is None else LONGEST
        for number in itertools.count(1):
            line = stream.readline(longest)
            if not line.endswith(b"\n") and stream.peek(1):  # it is longer
                return
            self._read += len(line)
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield f"{self._path}:{number}", *_parsed(line)
            if not stream.peek(1):
                break
            if self._limit is not None and self._read >= self._limit:
                return
        self.whole = True

    def _fields(self, rows: Iterator[_Row]) -> Iterator[pa.Table]:
        """The field of rows of JSON."""
        names: dict[str, None] = {}
        there = objects = others = False
        while part := list(itertools.islice(rows, ROWS)):
            found: list[_Text] = []
            for place, row, reason in part:
                text = None
                if isinstance(row, dict):
                    objects = True
                    there = there or self._field in row
                    if not there and len(names) < NAMED_FIELDS:
                        names.update(dict.fromkeys(row))
                    text = row.get(self._field)
                    if not isinstance(text, str | None):
                        text, reason = None, f"{JSON_TYPES[type(text)]} instead of text"
                elif reason is None:
                    others = True
                    reason = f"{JSON_TYPES[type(row)]} instead of an object"
                found.append((text, reason, place))
            yield _table(found)
        if others and not objects:
            todo = "give a JSON object per line, or one array of them in a .json file, or leave it out by a glob"
            self.doubt = self._refusal(f"holds JSON, but no row of it is an object; {todo}")
        elif names and not there:
            self.doubt = no_field(self._path, self._field, names)
        if self.doubt and self.whole:
            raise self.doubt

    def _parquet(self, file: Any) -> Iterator[pa.Table]:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        if self._field not in schema.names:
            raise no_field(self._path, self._field, schema.names)
        if schema.names.count(self._field) > 1:
            raise self._refusal(f"has several columns named {self._field!r}; rename all but one")
        kind = schema.field(self._field).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        known = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        if not any(is_text(values) for is_text in known):
            chat = f"; {NO_CHATS}" if pa.types.is_nested(values) else ""
            raise UserError(f"corpus.text_field: {self._field!r} of {self._path} holds {kind}, not text{chat}")
        read = row = 0
        for batch in parquet.iter_batches(ROWS, columns=[self._field]):
            texts = batch.column(0).cast(pa.large_string())
            yield _valid(texts, [f"{self._path}: row {row + n}" for n in range(1, len(texts) + 1)])
            row, read = row + len(texts), read + texts.nbytes
            if self._limit is not None and read >= self._limit and row < parquet.metadata.num_rows:
                self.share = row / parquet.metadata.num_rows
                return
        self.whole = True


ENCODING_HINT = "convert it to UTF-8, for Latin-1 or Windows-1252: iconv -f WINDOWS-1252 -t UTF-8"


def _parsed(line: bytes) -> tuple[Any, str | None]:
    """The row of a line of JSON, or why there is none."""
    # Bytes that are not UTF-8 become lone surrogates, which do no harm in other fields.
    text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        # An integer may have more digits than Python converts.
        return json.loads(text, parse_int=float), None
    except (json.JSONDecodeError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return None, CUT_SHORT
        encoded = not text.isascii() and _has_escaped(text)
        return None, NOT_UTF8 if encoded and isinstance(error, json.JSONDecodeError) else NO_JSON


def _has_escaped(text: str) -> bool:
    """Whether a text holds bytes that were not UTF-8."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def _first_rows(content: str) -> Iterator[Any]:
    """The rows at the beginning of an array that is cut off."""
    decoder, at = json.JSONDecoder(parse_int=float), content.index("[") + 1
    while True:
        at += len(content) - at - len(content[at:].lstrip(", \t\r\n"))
        try:
            row, at = decoder.raw_decode(content, at)
        except json.JSONDecodeError:
            return
        yield row


def _table(rows: list[_Text]) -> pa.Table:
    """Texts as a table; a text with a lone surrogate, which UTF-8 cannot encode, becomes an unusable row."""
    texts, reasons, places = zip(*rows, strict=True)
    try:
        column = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:
        return _table([row if row[0] is None else _encodable(row) for row in rows])
    named = [place if reason else None for reason, place in zip(reasons, places, strict=True)]
    return pa.table([column, pa.array(reasons, pa.string()), pa.array(named, pa.string())], schema=SCHEMA)


def _encodable(row: _Text) -> _Text:
    text, _, place = row
    assert text is not None
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, NOT_UTF8 if _has_escaped(text) else SURROGATE, place
    return row


def _valid(texts: pa.Array, places: list[str]) -> pa.Table:
    """Texts of parquet as a table; not every writer makes sure that they are UTF-8."""
    try:
        texts.validate(full=True)
        nothing = pa.nulls(len(texts), pa.string())
        return pa.table([texts, nothing, nothing], schema=SCHEMA)
    except pa.ArrowInvalid:
        raw = texts.cast(pa.large_binary()).to_pylist()
        # As for a line of JSON.
        read = [None if text is None else text.decode("utf-8", "surrogateescape") for text in raw]
        return _table([(text, None, place) for text, place in zip(read, places, strict=True)])


def no_field(path: str, field: str, names: Iterable[str]) -> UserError:
    """The refusal of a file of which no row has the text field."""
    known = list(names)
    named = ", ".join(known[:NAMED_FIELDS]).encode("utf-8", "backslashreplace").decode()
    more = ", ..." if len(known) > NAMED_FIELDS else ""
    chat = f"; {NO_CHATS}" if any(name in CHAT_FIELDS for name in known) else "; name one in corpus.text_field"
    return UserError(f"corpus.text_field: {field!r} is not there; the rows have {named}{more} ({path}){chat}")


def _is_array(stream: io.BufferedReader) -> bool:
    """Whether JSON is one array rather than a row per line, by its first character."""
    return stream.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
