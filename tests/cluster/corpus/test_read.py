"""The texts of a file, whatever it is written in, and what is said of content that cannot be used."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import fs

from cluster.corpus import read
from cluster.corpus.read import TextReader
from cluster.errors import UserError

TEXTS = ["one", "two\nlines", None, "fünf 五", ""]
ROWS: list[dict[str, Any]] = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts_of(path: Path, field: str = "text") -> list[str | None]:
    return [row["text"] for row in rows_of(path, field)]


def rows_of(path: Path, field: str = "text", limit: int | None = None) -> list[dict[str, Any]]:
    tables = TextReader(str(path), fs.LocalFileSystem(), field, limit)
    return [row for table in tables for row in table.to_pylist()]


def unusable(path: Path) -> list[tuple[str, str]]:
    """Reason and place, without the folder, of each row that cannot be used."""
    rows = [row for row in rows_of(path) if row["unusable"]]
    assert all(row["text"] is None for row in rows)
    return [(row["unusable"], row["place"].removeprefix(f"{path.parent}/")) for row in rows]


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
    with pytest.raises(UserError, match=rf"{name} is cut short; copy or download it again"):
        texts_of(path)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read_in_parts_and_only_its_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(TEXTS * 200, pa.string()).cast(kind)
    pq.write_table(pa.table({"body": column, "n": range(1000)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", "body") == TEXTS * 200


def test_a_large_file_comes_in_small_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES * 500)
    tables = list(TextReader(str(path), fs.LocalFileSystem(), "text"))
    assert [len(table) for table in tables] == [read.ROWS] * 9 + [2500 - 9 * read.ROWS]


def test_only_the_text_field_counts_and_all_others_may_hold_anything(tmp_path: Path) -> None:
    # id a number, then a string (datasets #5827, #7222); nested changes (#5596); a number with more digits than Python
    # converts; half a surrogate pair and bytes of Latin-1 outside of the text; a key twice; a row without the text.
    content = b"""{"id": 1, "text": "a", "meta": "x"}
{"id": "2", "meta": {"y": 1}, "text": "b"}
{"meta": [{"y": null}, 3], "text": "c", "id": %s}
{"text": "d", "other": "\\ud83d", "\\ud83d": 1}
{"text": "e", "author": "Andr\xe9"}
{"text": "x", "text": "f", "nan": NaN}
{"other": 1}
""" % (b"9" * 5000)
    for name in ("a.jsonl", "a.json"):
        assert texts_of(write(tmp_path / name, content)) == [*"abcdef", None]
        assert unusable(tmp_path / name) == []
    array = b"[" + content.replace(b"\xe9", b"e").strip().replace(b"\n", b",") + b"]"
    assert texts_of(write(tmp_path / "a.json", array)) == [*"abcdef", None]


def test_a_row_that_cannot_be_used_is_left_out_with_the_reason_and_its_line(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    content = (
        b"""{"text": "a"}
{"text": "b \\ud83d"}
{"text": "c" "d"}
{"text": "\xe9"}

{"text": 3}
{"text": ["e"]}
{"text": {"f": 1}}
{"text": true}
["g"]
"h"
\xe9t\xe9
{"text": "pair \\ud83c\\udf78"}
%s
{"text": "cut"""
        % deep
    )
    expected = [
        ("lone surrogate", 2),
        ("not JSON", 3),
        ("not UTF-8", 4),
        ("number instead of text", 6),
        ("array instead of text", 7),
        ("object instead of text", 8),
        ("boolean instead of text", 9),
        ("array instead of an object", 10),
        ("string instead of an object", 11),
        ("not UTF-8", 12),
        ("not JSON", 14),
        ("line cut short", 15),
    ]
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.zst"):
        path = write(tmp_path / name, content)
        assert unusable(path) == [(reason, f"{name}:{line}") for reason, line in expected]
        assert [text for text in texts_of(path) if text] == ["a", "pair \U0001f378"]


def test_a_last_line_without_an_end_is_whole_when_it_is_json(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b"}')) == ["a", "b"]
    assert unusable(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"text": "a"}, "b"]', [("string instead of an object", "a.json: row 2")]),
        (
            "a.json",
            b'{\n"text": "a"\n}',
            [("not JSON", "a.json:1"), ("not JSON", "a.json:2"), ("line cut short", "a.json:3")],
        ),
        ("a.txt", "caf\u00e9".encode("latin-1"), [("not UTF-8", "a.txt: byte 3")]),
    ],
)
def test_an_array_and_a_text_tell_the_place_too(
    tmp_path: Path, name: str, content: bytes, expected: list[tuple[str, str]]
) -> None:
    assert unusable(write(tmp_path / name, content)) == expected


def test_parquet_that_is_not_utf8_is_left_out_by_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xe9", None, b"b"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["a", None, None, "b"]
    assert unusable(tmp_path / "a.parquet") == [("not UTF-8", "a.parquet: row 2")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.txt.zst", "a.parquet", "b.parquet"])
def test_a_file_without_a_row_is_counted_as_empty(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"")
    if name == "b.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert unusable(path) == [("empty", name)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.txt"])
def test_a_limit_reads_the_beginning_in_whole_rows(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{n} " + "\u00e9" * 50} for n in range(1000)]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "a.json":
        write(path, json.dumps(rows, ensure_ascii=False, indent=1).encode())
    elif name == "a.txt":
        write(path, "".join(row["text"] for row in rows).encode())
    else:
        write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    for limit, whole in ((10_001, False), (10_002, False), (1_000_000, True)):
        reader = TextReader(str(path), fs.LocalFileSystem(), "text", limit)
        found = [row for table in reader for row in table.to_pylist()]
        assert reader.whole == whole
        assert not any(row["unusable"] for row in found)
        if name == "a.txt":
            assert "".join(row["text"] for row in rows).startswith(found[0]["text"])
            assert (len(found[0]["text"]) > 4_000) and (len(found) == 1)
        else:
            assert [row["text"] for row in found] == [row["text"] for row in rows[: len(found)]]
            assert len(found) == 1000 if whole else 50 < len(found) < 300


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_sample_says_what_share_of_the_rows_it_has(tmp_path: Path, name: str) -> None:
    rows, path = [{"text": random.Random(n).randbytes(2000).hex()} for n in range(1000)], tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(
            path, (json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)).encode()
        )
    for limit in (1_000_000, 5_000_000):
        reader = TextReader(str(path), fs.LocalFileSystem(), "text", limit)
        read = sum(map(len, reader))
        assert reader.share == pytest.approx(read / 1000, abs=0.12)


def test_a_row_that_is_too_long_for_a_sample_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST", 1000)
    short, long = b'{"text": "a"}\n', b'{"text": "%s"}\n' % (b"b" * 2000)
    for name, content, before in (
        ("a.jsonl", short + long + short, ["a"]),
        ("a.jsonl", long + short, []),
        ("a.json", b'[{"text": "%s"}]' % (b"b" * 2000), []),
    ):
        reader = TextReader(str(write(tmp_path / name, content)), fs.LocalFileSystem(), "text", 10_000)
        assert [text for table in reader for text in table.column("text").to_pylist()] == before
        assert not reader.whole
    assert len(texts_of(write(tmp_path / "a.jsonl", short + long + short))) == 3


def test_a_file_that_holds_only_a_byte_order_mark_is_empty(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt"):
        assert unusable(write(tmp_path / name, b"\xef\xbb\xbf")) == [("empty", name)]


def test_zero_bytes_alone_are_no_encoding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + bytes(4096) + b'\n{"text": "b"}\n')
    assert unusable(path) == [("not JSON", "a.jsonl:2")]


def test_a_parquet_file_with_two_columns_of_the_field_s_name_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has several columns named 'text'; rename all but one"):
        texts_of(tmp_path / "a.parquet")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4914\nsize 261136\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "a", "n": 1}\n', "'text' is not there; the rows have body, n"),
        ("a.jsonl", b'{"messages": []}\n', "the rows have messages ("),
        ("a.jsonl", b'{"messages": []}\n', "chats are not supported yet; render each into one text"),
        ("a.jsonl", b'{"%s": 1, "\\ud83d": 2}\n' % b'": 1, "'.join(b"%d" % n for n in range(20)), "10, 11, ... ("),
        ("a.jsonl", b'{"\\ud83d": 2}\n', "the rows have \\ud83d"),
        ("a.jsonl", b'["a"]\n', "no row of it is an object; give a JSON object per line, or one array of them"),
        ("a.json", b'["a", "b"]', "or leave it out by a glob"),
        ("a.json", b'[{"text": "a"},\n {]', "an array of JSON: line 2"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"text": "\xe9"}]', "is not UTF-8 (byte 11); convert it to UTF-8"),
        ("a.parquet", b"PAR1 and then nothing", "is cut short"),
        ("a.parquet", b"PAR1", "is cut short"),
        ("a.parquet", b"a,b,c,d\n", "is not parquet; download it again, or rename it"),
        *((name, LFS, "is a Git LFS pointer") for name in ("a.jsonl", "a.txt", "a.txt", "a.parquet")),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "holds gzip data; rename it to end in .gz"),
        ("a.txt", zstandard.compress(LINES), "holds zstd data; rename it to end in .zst"),
        ("a.json", b"PAR1\0\0\0\0", "holds parquet data; rename it to end in .parquet"),
        ("a.jsonl", b"PK\x03\x04rest", "holds zip data; unpack it"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "is not jsonl but a web page"),
        *(
            ("a.jsonl", LINES.decode().encode(code), f"is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8")
            for code, name in (
                *(("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")),
                *(("utf-32", "UTF-32"), ("utf-32-be", "UTF-32")),
            )
        ),
        ("a.txt", "PowerShell > a.txt".encode("utf-16"), "is UTF-16"),
        ("a.txt.gz", "inside of gzip".encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        texts_of(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(LFS, "is a Git LFS pointer"), (b"plain", "is not "), (b"<html>", "but a web page, such as an error or a login")],
)
def test_a_compressed_file_that_is_none_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / name)


def test_a_text_may_be_a_web_page_or_speak_of_git_lfs(tmp_path: Path) -> None:
    for content in ("<html>text</html>", LFS.decode() + "is how a pointer begins. " * 100):
        assert texts_of(write(tmp_path / "a.txt", content.encode())) == [content]


def test_a_parquet_column_of_chats_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "a"}]]}), tmp_path / "a.parquet")
    for field in ("messages", "text"):
        with pytest.raises(UserError, match="chats are not supported yet"):
            texts_of(tmp_path / "a.parquet", field)


@pytest.mark.parametrize(("column", "message"), [("n", "holds int64, not text"), ("x", "the rows have text, n")])
def test_a_parquet_column_that_is_no_text_is_refused(tmp_path: Path, column: str, message: str) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / "a.parquet", column)
