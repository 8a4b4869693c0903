"""The sample that is read of every file before a start, and how many unusable rows a corpus may have."""

import gzip
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from cluster.corpus import sample
from cluster.corpus.read import SCHEMA
from cluster.corpus.sample import check_corpus, check_files
from cluster.corpus.unusable import Unusable
from cluster.errors import UserError
from cluster.spec import CorpusSpec

GOOD = '{"text": "a text"}\n'


def spec_of(*paths: Path, **fields: Any) -> CorpusSpec:
    return CorpusSpec.model_validate({"paths": [str(path) for path in paths]} | fields)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(*paths: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_files(spec_of(*paths, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_few_unusable_rows_are_told_and_more_than_the_share_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD * 98 + '{"text": "\\ud83d"}\n{"text": "cut')
    message = refusal(path)
    reasons = f"lone surrogate: 1, first at {path}:99; line cut short: 1, first at {path}:100"
    assert f"2 of 100 rows cannot be used ({reasons}), more than corpus.max_bad_share 0.01" in message
    assert "repair or remove them, or raise corpus.max_bad_share" in message
    assert check_files(spec_of(path, max_bad_share=0.02))[1] == [f"2 of 100 rows cannot be used, left out ({reasons})"]
    write(tmp_path / "b.jsonl", GOOD * 100)
    assert len(check_files(spec_of(tmp_path))[1]) == 1
    assert "2 of 200" in refusal(tmp_path, max_bad_share=0.009)


def test_a_row_without_the_field_or_without_text_is_no_unusable_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD + '{"id": 1}\n{"text": null}\n{"text": " "}\n')
    assert check_files(spec_of(path, max_bad_share=0.0))[1] == ["3 of 4 rows without text"]


def test_a_path_on_the_cluster_that_is_not_here_is_refused_with_where_to_check_it(tmp_path: Path) -> None:
    hint = "with corpus.upload: false these are paths on the cluster, so check them there"
    assert refusal(tmp_path / "a.txt", upload=False).endswith(hint)
    assert hint not in refusal(tmp_path / "a.txt")


def test_rows_without_any_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": null}\n{"text": " "}\n')
    assert "a.jsonl has no text in any of 2 rows" in refusal(path)


def test_every_file_is_looked_at(tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number:02}.jsonl", GOOD)
    write(tmp_path / "17.jsonl", '{"messages": []}\n')
    assert "'text' is not there; the rows have messages (" in refusal(tmp_path)
    assert "17.jsonl" in refusal(tmp_path)


def test_chats_that_are_named_as_the_text_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"messages": [{"role": "user"}]}\n')
    assert "chats are not supported yet" in refusal(path, text_field="messages")


def test_latin1_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    for name, content in (("a.txt", "café"), ("a.jsonl", '{"text": "café"}\n')):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        assert "iconv -f WINDOWS-1252 -t UTF-8" in refusal(tmp_path / name)


def test_empty_files_are_counted_and_refused_when_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    empty, blank = write(tmp_path / "b.jsonl", ""), write(tmp_path / "c.jsonl", "\n\n")
    none = [tmp_path / "a.jsonl.gz", empty, blank, write(tmp_path / "e.parquet", "")]
    for paths in (none, *([path] for path in none)):
        assert f"{paths[-1]} is empty; give files with text" in refusal(*paths)
    text = write(tmp_path / "d.jsonl", GOOD)
    found, lines = check_files(spec_of(empty, tmp_path, text))
    # One is named twice: as a path of its own, and by its folder, which does not give empty files.
    assert found.skipped == {"empty": 5, "named twice": 1}
    assert lines == ["skipped: 6 files (empty: 5, named twice: 1)"]


def test_a_large_file_is_read_in_part_and_refused_where_the_part_is_enough_to_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 4000)
    monkeypatch.setattr(sample, "LEAST", 1000)
    path = write(tmp_path / "a.jsonl", '{"text": 1}\n' + GOOD * 1000)
    # One of some 200, which is below what a sample of them can tell from one in a hundred.
    (line,) = check_files(spec_of(path, max_bad_share=0.001))[1]
    assert line.startswith("1 of 211 sampled rows cannot be used")
    bad = write(tmp_path / "b.jsonl", '{"text": 1}\n' * 40 + GOOD * 1000)
    assert "40 of 226 sampled rows" in refusal(bad)
    # The rest is not looked at.
    assert check_files(spec_of(write(tmp_path / "c.jsonl", GOOD * 1000 + '{"text": 1}\n' * 1000)))[1] == []
    monkeypatch.setattr(sample, "SAMPLE", 10**6)
    assert "1 of 1,001 rows" in refusal(path, max_bad_share=0.0001)


def test_a_field_that_only_later_rows_have_is_looked_for_and_then_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("SAMPLE", 4000), ("LEAST", 1000), ("SEARCH", 40_000)):
        monkeypatch.setattr(sample, name, size)
    other = '{"body": "a text"}\n'
    for name, rows in (("a.jsonl", "{}" + GOOD), ("a.json", "[{}" + GOOD[:-1] + "]")):
        join = other if name == "a.jsonl" else other.replace("\n", ",\n")
        near, far = (write(tmp_path / f"{number}{name}", rows.replace("{}", join * number)) for number in (1000, 4000))
        assert check_files(spec_of(near))[1] == ["1,000 of 1,001 rows without text"]
        blank, doubt = check_files(spec_of(far))[1]
        assert "sampled rows without text" in blank
        assert f"{far}: a run will refuse it unless a row after the first " in doubt
        assert "'text' is not there; the rows have body" in doubt
    never = write(tmp_path / "b.jsonl", other * 1000)
    assert "'text' is not there; the rows have body" in refusal(never)


def test_a_small_bad_file_does_not_stand_for_a_large_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 4000)
    monkeypatch.setattr(sample, "LEAST", 1000)
    small, large = write(tmp_path / "a.jsonl", '{"text": 1}\n' * 20), write(tmp_path / "b.jsonl", GOOD * 4000)
    (line,) = check_files(spec_of(small, large))[1]
    assert line.startswith("20 of 126 sampled rows cannot be used, left out")
    # And the other way round.
    write(small, GOOD * 100)
    write(large, ('{"text": 1}\n' + GOOD) * 4000)
    assert "of 230 sampled rows, about 49.4 % of all, cannot be used" in refusal(small, large)
    write(large, '{"text": 1}\n' * 4000)
    assert "about 100 % of all" in refusal(large)


def test_a_row_too_long_for_the_sample_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.corpus.read.LONGEST", 1000)
    path = write(tmp_path / "a.jsonl", '{"text": "' + "a" * 2000 + '"}\n' + GOOD)
    assert check_files(spec_of(path))[1] == [f"{path}: not checked, its first row is longer than 32 MiB"]


def test_a_large_text_that_is_not_utf8_is_refused_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 1000)
    monkeypatch.setattr(sample, "LEAST", 1000)
    (tmp_path / "a.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 1000)
    assert "iconv -f WINDOWS-1252 -t UTF-8" in refusal(tmp_path / "a.txt")


def test_what_is_counted_of_files_adds_up() -> None:
    def table(*reasons: str | None, name: str) -> pa.Table:
        places = [f"{name}:{number}" if reason else None for number, reason in enumerate(reasons)]
        texts = [None if reason else "a" for reason in reasons]
        return pa.table([pa.array(texts, pa.large_string()), pa.array(reasons), pa.array(places)], schema=SCHEMA)

    first, second = Unusable(), Unusable()
    first.add(table(None, "not JSON", "not JSON", name="a"))
    second.add(table("not JSON", "not UTF-8", name="b"))
    second.add(table("empty", name="c"))
    first.merge(second)
    assert first == Unusable(
        rows=5,
        counts=Counter({"not JSON": 3, "not UTF-8": 1}),
        first={"not JSON": "a:1", "not UTF-8": "b:1"},
        empty_files=1,
    )


class Tokenizer(SimpleNamespace):
    """Puts its begin token in front, where it declares one."""

    def __call__(self, _: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, 5] if self.declares and add_special_tokens else [5]}


def test_a_begin_token_that_the_models_do_not_have_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    outside = Tokenizer(bos_token_id=300, declares=True)
    with pytest.raises(UserError, match=r"corpus.bos: .* has the id 300; ids must be below 300, .*; use never"):
        check_corpus(spec_of(path), outside, 300)
    assert check_corpus(spec_of(path, bos="never"), outside, 300) == []
    for bos, told in ((None, "document, as the tokenizer declares"), ("sequence", "sequence")):
        assert check_corpus(spec_of(path, bos=bos), outside, 301) == [f"a begin token (BOS) in front of each {told}"]
    with pytest.raises(UserError, match=r"corpus.bos: got sequence; .* has no begin token"):
        check_corpus(spec_of(path, bos="sequence"), Tokenizer(bos_token_id=None, declares=False), 300)
