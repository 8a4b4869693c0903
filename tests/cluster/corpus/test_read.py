"""The texts of a file, whatever it is written in, and what is said of content that cannot be used."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import fs

from cluster.corpus import read
from cluster.corpus.read import read_texts
from cluster.errors import UserError

TEXTS = ["one", "two\nlines", None, "fünf 五", ""]
ROWS: list[dict[str, Any]] = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts_of(path: Path, field: str = "text") -> list[str | None]:
    tables = read_texts(str(path), str(path), fs.LocalFileSystem(), field)
    return [text for table in tables for text in table.column("text").to_pylist()]


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, ensure_ascii=False).encode()),
    ],
)
def test_the_same_rows_are_read_from_lines_and_arrays_compressed_or_not(
    tmp_path: Path, name: str, content: bytes, codec: str
) -> None:
    assert texts_of(write(tmp_path / (name + codec), content)) == TEXTS


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
def test_a_text_file_is_one_text(tmp_path: Path, codec: str) -> None:
    assert texts_of(write(tmp_path / f"a.txt{codec}", "é\n\nb\n".encode())) == ["é\n\nb\n"]


def test_all_members_of_a_concatenated_file_are_read(tmp_path: Path) -> None:
    half = len(LINES) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    assert texts_of(tmp_path / "a.jsonl.gz") == texts_of(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, LINES * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{name} cannot be read as .jsonl"):
        texts_of(path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_is_read_in_parts_and_only_its_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(TEXTS * 200, pa.string()).cast(kind)
    pq.write_table(pa.table({"body": column, "n": range(1000)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", "body") == TEXTS * 200


def test_a_large_file_comes_in_small_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES * 500)
    tables = list(read_texts(str(path), str(path), fs.LocalFileSystem(), "text"))
    assert [len(table) for table in tables] == [read.ROWS] * 9 + [2500 - 9 * read.ROWS]


def test_other_fields_may_hold_anything(tmp_path: Path) -> None:
    content = b'{"text": "a", "meta": "x"}\n{"meta": {"y": 1}, "text": "b"}\n{"other": 1}\n'
    assert texts_of(write(tmp_path / "a.jsonl", content)) == ["a", "b", None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "a", "n": 1}\n', "'text' is not there; the rows have body, n"),
        ("a.jsonl", b'{"text": 3}\n', "'text' holds int, not text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
        ("a.jsonl", b'["a"]\n', 'row 1 is no JSON object: ["a"]'),
        ("a.json", b'[{"text": "a"}, "b"]', 'row 2 is no JSON object: "b"'),
        ("a.json", b'[{"text": "a"},\n {]', "an array of JSON: line 2"),
        ("a.json", b'{\n"text": "a"\n}', "lines of JSON: line 1"),
        ("a.txt", "é".encode("latin-1"), "not UTF-8 text: byte 0"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}', r"half of a surrogate pair, '\ud800'"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8 text"),
        ("a.parquet", b"PAR1 and then nothing", "cannot be read as .parquet"),
    ],
)
def test_content_that_cannot_be_used_is_refused_with_file_and_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        texts_of(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("column", "message"), [("n", "holds int64, not text"), ("x", "the rows have text, n")])
def test_a_parquet_column_that_is_no_text_is_refused(tmp_path: Path, column: str, message: str) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / "a.parquet", column)
