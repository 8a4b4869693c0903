"""The corpus through real Ray Data: every format, a real S3 server, and text that cannot be used."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import zstandard

from cluster.corpus.batches import CorpusFacts
from cluster.corpus.prepare import prepare_corpus
from cluster.errors import UserError
from cluster.spec import CorpusSpec
from tests.tiny import write_tiny_corpus

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def pack(tiny: Path, out: Path, *paths: Path | str, **settings: Any) -> tuple[CorpusFacts, np.ndarray]:
    layout = {"pack": settings.pop("pack")} if "pack" in settings else {}
    spec = CorpusSpec.model_validate({"paths": [str(p) for p in paths], "sequence_length": 32} | settings)
    facts = prepare_corpus(spec, str(tiny / "teacher"), out, **layout)
    return facts, np.load(out / "tokens.npy")


def test_the_same_text_gives_the_same_tokens_in_every_format(tiny: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (tiny / "corpus.jsonl").read_text().splitlines()]
    pq.write_table(pa.table({"text": texts, "other": range(len(texts))}), tmp_path / "corpus.parquet")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    rows = (tiny / "corpus.jsonl").read_bytes()
    half = rows.index(b"\n", len(rows) // 2) + 1
    (tmp_path / "packed" / "sub").mkdir(parents=True)
    (tmp_path / "packed" / "1.jsonl.gz").write_bytes(gzip.compress(rows[:half]))
    (tmp_path / "packed" / "sub" / "2.json.zst").write_bytes(zstandard.compress(rows[half:]))
    (tmp_path / "array.json").write_text(json.dumps([{"text": text} for text in texts]))
    facts, tokens = pack(tiny, tmp_path / "a", tiny / "corpus.jsonl")
    assert facts.documents == len(texts)
    assert tokens.shape == (facts.sequences, 32)
    for source in ("corpus.parquet", "texts", "packed", "packed/**/*.js*", "array.json"):
        same, same_tokens = pack(tiny, tmp_path / "out" / source.replace("/", "-"), tmp_path / source)
        assert same == facts
        np.testing.assert_array_equal(same_tokens, tokens)


def test_a_packed_corpus_is_the_documents_in_some_order_with_an_end_behind_each(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    facts, tokens = pack(tiny, tmp_path / "a", tiny / "corpus.jsonl", seed=1)
    _, other = pack(tiny, tmp_path / "b", tiny / "corpus.jsonl", seed=2)
    texts = {json.loads(line)["text"] for line in (tiny / "corpus.jsonl").read_text().splitlines()}
    sides = [tokens[: -facts.held_out], tokens[-facts.held_out :]]
    # All but the last of either side, which the end of the last whole sequence cuts.
    trained, held_out = (tokenizer.decode(side.reshape(-1)).split(tokenizer.eos_token)[:-1] for side in sides)
    assert {*trained, *held_out} <= texts
    assert not set(trained) & set(held_out)
    assert len(trained) + len(held_out) > 0.9 * len(texts)
    assert 1 <= len(held_out) <= 0.1 * len(texts)
    assert not np.array_equal(tokens, other)


def test_special_tokens_in_a_text_are_text_unless_wanted_and_the_end_token_is_added(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher")
    text = f"one pass{tokenizer.eos_token} of spirit <|user|> fills every cask "
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{text}{n}"}) + "\n" for n in range(20)))
    for option, ends in (("text", 20), ("control", 40)):
        facts, tokens = pack(tiny, tmp_path / option, tmp_path / "a.jsonl", special_tokens=option, pack=False)
        assert (tokens == tokenizer.eos_token_id).sum() - facts.pad_tokens == ends
        assert facts.spelled == 20
    whole, tokens = pack(tiny, tmp_path / "whole", tmp_path / "a.jsonl", sequence_length=128, pack=False)
    lengths = np.load(tmp_path / "whole" / "lengths.npy")
    read = {tokenizer.decode(row[: length - 1]) for row, length in zip(tokens, lengths, strict=True)}
    assert read == {f"{text}{n}" for n in range(20)}
    assert whole.sequences == 20


def test_a_run_goes_on_with_the_same_text_from_elsewhere_and_with_no_other(tiny: Path, tmp_path: Path) -> None:
    facts, tokens = pack(tiny, tmp_path / "a", tiny / "corpus.jsonl")
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_bytes((tiny / "corpus.jsonl").read_bytes())
    assert pack(tiny, tmp_path / "a", elsewhere)[0] == facts
    with elsewhere.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"not what the run was started with: 64 documents .* 65 .*without --resume"):
        pack(tiny, tmp_path / "a", elsewhere)
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "tokens.npy"), tokens)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("blank.jsonl", b'{"text": "  "}\n{"text": ""}\n', "too few"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": \n', "torn.jsonl:2), more than corpus.max_bad_share 0.01"),
        ("nofield.jsonl", b'{"body": "a"}\n', "'text' is not there; the rows have body"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("torn.parquet", b"PAR1 and then nothing", "torn.parquet is cut short"),
        ("empty.jsonl", b"", "too few"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_name(
    tiny: Path, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^corpus") as refused:
        pack(tiny, tmp_path / "out", tmp_path / name)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_begin_token_is_added_as_declared_and_unusable_rows_are_counted(tiny: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "teacher", bos_token="<|user|>")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begin)]
    )
    tokenizer.save_pretrained(tmp_path / "declares" / "teacher")
    text = tmp_path / "a.jsonl"
    text.write_text((tiny / "corpus.jsonl").read_text() + '{"text": "half \\ud83d"}\n{"text": "cut')
    plain, _ = pack(tiny, tmp_path / "plain", text, max_bad_share=0.05)
    assert plain.unusable == {"lone surrogate": 1, "line cut short": 1}
    assert plain.first_unusable == {"lone surrogate": f"{text}:65", "line cut short": f"{text}:66"}
    assert plain.address == pack(tiny, tmp_path / "clean", tiny / "corpus.jsonl")[0].address
    packed = {
        bos: pack(tmp_path / "declares", tmp_path / str(bos), text, max_bad_share=0.05, bos=bos)
        for bos in (None, "never", "document", "sequence")
    }
    assert packed["never"][0] == plain
    assert packed[None][0] == packed["document"][0]
    facts, tokens = packed["document"]
    starts = np.load(tmp_path / "document" / "starts.npy")
    assert (facts.bos, facts.documents) == ("document", 64)
    np.testing.assert_array_equal(tokens == begin, starts)
    facts, tokens = packed["sequence"]
    assert facts.bos == "sequence"
    np.testing.assert_array_equal(np.argwhere(tokens == begin)[:, 1], np.zeros(len(tokens)))
    assert len({facts.address for facts, _ in packed.values()}) == 3


@pytest.fixture(scope="module")
def texts(s3: Any) -> Any:
    """A client of an S3 server that has a bucket ``texts``."""
    s3.create_bucket(Bucket="texts")
    return s3


def test_a_bucket_gives_the_tokens_of_the_same_local_files(texts: Any, tiny: Path, tmp_path: Path) -> None:
    files = [write_tiny_corpus(tmp_path / "in" / f"{n}.jsonl", documents=20, seed=n) for n in range(3)]
    for file in files:
        texts.upload_file(str(file), "texts", f"nightly/dt=1/{file.name}")
    texts.put_object(Bucket="texts", Key="nightly/_SUCCESS", Body=b"")
    texts.put_object(Bucket="texts", Key="nightly/dt=1/.part.jsonl", Body=b"{}")
    local, local_tokens = pack(tiny, tmp_path / "local", tmp_path / "in")
    for number, path in enumerate(["nightly", "nightly/dt=*/", "nightly/**/*.jsonl", "nightly/dt=1/[0-2].jsonl"]):
        remote, remote_tokens = pack(tiny, tmp_path / f"{number}", f"s3://texts/{path}")
        assert remote.address == local.address
        assert remote.skipped.get("hidden", 0) == (number < 3)
        np.testing.assert_array_equal(remote_tokens, local_tokens)


@pytest.mark.parametrize("path", ["s3://texts/absent.jsonl", "s3://nobucket/a.jsonl", "s3://texts/absent/*.jsonl"])
def test_an_object_that_is_not_there_is_refused_by_name(texts: Any, tiny: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=re.escape(path)):
        pack(tiny, tmp_path / "out", path)


def test_a_limit_on_the_cpus_changes_no_token_and_leaves_one_to_read_with(tiny: Path, tmp_path: Path) -> None:
    facts, tokens = pack(tiny, tmp_path / "a", tiny / "corpus.jsonl")
    spec = CorpusSpec(paths=[str(tiny / "corpus.jsonl")], sequence_length=32)
    assert prepare_corpus(spec, str(tiny / "teacher"), tmp_path / "b", cpus=0.2) == facts
    assert ray.data.DataContext.get_current().execution_options.resource_limits.cpu == 1.0
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "tokens.npy"), tokens)
