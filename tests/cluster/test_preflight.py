"""What a family is refused for before anything is started: the field, what was given and what is allowed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import cluster.preflight as preflight_module
from cluster.errors import UserError
from cluster.fingerprint import teacher_fingerprint, tokenizer_fingerprint
from cluster.heads import OutputHead
from cluster.labels.store.store import LabelStore
from cluster.labels.wire import Stamp, encode
from cluster.models import load_tokenizer
from cluster.preflight import Checked, preflight
from cluster.spec import FamilySpec
from tests.cluster.labels.blocks import ragged_mask, random_labels
from tests.tiny import POSITIONS, VOCABULARY, tiny_family, write_tiny_model, write_tiny_tokenizer
from tests.tiny_types import write_tiny_type

SCRATCH = {"source": "scratch", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 64}


@pytest.fixture
def check(tiny_teacher: Path, tiny_corpus: Path, stillhouse_home: Path) -> Any:
    """Preflight of a tiny family; ``init`` is the student's, the rest are fields of sections."""

    def run(init: dict[str, Any] | None = None, **sections: Any) -> Checked:
        tree = tiny_family(tiny_teacher, tiny_corpus, **sections)
        if init:
            tree["students"]["small"]["init"] = init
        return preflight(FamilySpec.model_validate(tree))

    return run


def test_a_family_that_may_start_is_described(check: Any, tiny_teacher: Path, stillhouse_home: Path) -> None:
    checked = check()
    assert checked.teacher.vocabulary == VOCABULARY < 320
    assert (checked.teacher.folder, checked.student_dirs) == (str(tiny_teacher), {})
    assert checked.teacher.fingerprint == teacher_fingerprint(tiny_teacher, checked.spec.teacher, VOCABULARY)
    assert checked.teacher.tokenizer == tokenizer_fingerprint(load_tokenizer(tiny_teacher, "teacher.model"))
    assert checked.tracking_uri == f"sqlite:///{stillhouse_home}/mlflow.db"
    # Digests of files that have just been written are not kept.
    assert {each.name for each in stillhouse_home.glob("*")} <= {"fingerprints"}


def test_what_one_precision_has_stored_is_not_found_by_another(check: Any, tmp_path: Path) -> None:
    store, mask_BS, batch = LabelStore.open(str(tmp_path / "labels")), ragged_mask(), "ee" * 16

    def stamp(dtype: str) -> Stamp:
        checked = check(teacher={"dtype": dtype})
        return Stamp.of(checked.teacher.fingerprint, checked.teacher.tokenizer, checked.spec.labels, batch)

    half, full = stamp("bfloat16"), stamp("float32")
    store.put(encode(random_labels("topk", mask_BS), half), half)
    store.put_head(half.teacher, OutputHead(np.zeros((VOCABULARY, 8), np.uint16)))
    assert (store.get(full), store.get_head(full.teacher)) == (None, None)
    assert store.get(half) is not None and store.get_head(half.teacher) is not None


def test_files_that_are_skipped_are_told(check: Any, tiny_corpus: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.csv", ".ipynb_checkpoints/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tiny_corpus, tmp_path / name)
    checked = check(corpus={"paths": [str(tmp_path)]})
    assert checked.notices()[0] == "corpus: skipped: 3 files (.csv: 2, hidden: 1)"
    assert not [line for line in check().notices() if line.startswith("corpus")]


@pytest.mark.parametrize(
    "sections",
    [
        {"labels": {"k": VOCABULARY}},
        {"corpus": {"sequence_length": POSITIONS}},
        {"teacher": {"shards": 2}},
        {"init": {"source": "teacher", "layers": 4}},
        {"init": {"source": "teacher", "layers": [3]}},
        {"init": SCRATCH},
        {"tracking": {"uri": "http://127.0.0.1:9"}},
    ],
    ids=repr,
)
def test_the_largest_allowed_is_allowed(check: Any, sections: dict[str, Any]) -> None:
    assert check(**sections)


def test_rows_that_cannot_be_used_are_told_or_refused_with_their_place(
    check: Any, tiny_corpus: Path, tmp_path: Path, stillhouse_home: Path
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text(tiny_corpus.read_text() + '{"text": "cut sh')
    with pytest.raises(UserError, match=rf"1 of 65 rows .*line cut short: 1, first at {text}:65.*max_bad_share 0.01"):
        check(corpus={"paths": [str(text)]})
    assert not stillhouse_home.exists()
    notices = check(corpus={"paths": [str(text)], "max_bad_share": 0.02}).notices()
    assert notices[0] == f"corpus: 1 of 65 rows cannot be used, left out (line cut short: 1, first at {text}:65)"


@pytest.mark.parametrize(
    ("content", "corpus", "said"),
    [
        ('{"messages": []}\n', {}, "the rows have messages .* chats are not supported yet"),
        ('{"body": ""}\n', {}, "the rows have body .*; name one in corpus.text_field"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", {}, "is a Git LFS pointer"),
        (
            '{"text": "a"}\n',
            {"bos": "document"},
            "corpus.bos: got document; the teacher's tokenizer has no begin token",
        ),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    check: Any, tmp_path: Path, stillhouse_home: Path, content: str, corpus: dict[str, Any], said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        check(corpus={"paths": [str(tmp_path)], **corpus})
    assert "\n" not in str(caught.value)
    assert not stillhouse_home.exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such teacher": ({"teacher": {"model": "/no/where"}}, "teacher.model: /no/where is not there"),
    "K above the vocabulary": ({"labels": {"k": 301}}, r"labels.k: got 301; .* 300 tokens"),
    "sequences above the positions": (
        {"corpus": {"sequence_length": 513}},
        r"corpus.sequence_length: got 513; .* at most 512",
    ),
    "shards that do not share the heads": (
        {"teacher": {"shards": 3}},
        r"teacher.shards: got 3; .* 4 attention heads",
    ),
    "shards above the kv heads": ({"teacher": {"shards": 4}}, r"teacher.shards: got 4; .* 2 key-value heads"),
    "more layers than there are": (
        {"init": {"source": "teacher", "layers": 5}},
        r"students.small.init.layers: got 5; .* 4 layers, 0 to 3",
    ),
    "a layer past the last": (
        {"init": {"source": "teacher", "layers": [0, 4]}},
        r"students.small.init.layers: got \[0, 4\]; .* 0 to 3",
    ),
    "no such student": (
        {"init": {"source": "pretrained", "model": "/no/where"}},
        "students.small.init.model: /no/where is not there",
    ),
    "a scratch student that cannot turn its positions": (
        {"init": {**SCRATCH, "hidden_size": 12}},
        r"students.small.init.* 3",
    ),
    "no such corpus": ({"corpus": {"paths": ["/no/where.txt"]}}, "corpus.paths: /no/where.txt is not there"),
}


@pytest.mark.parametrize(("sections", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(check: Any, sections: dict[str, Any], said: str, stillhouse_home: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check(**sections)
    assert "\n" not in str(caught.value)
    assert not stillhouse_home.exists()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A pretrained student of one layer with the teacher's tokenizer."""
    return write_tiny_model(tmp_path / "own", layers=1, seed=1)


def test_a_pretrained_student_with_the_teacher_s_tokenizer_is_accepted(check: Any, own: Path) -> None:
    assert check({"source": "pretrained", "model": str(own)}).student_dirs == {"small": own}


def test_a_pretrained_student_may_be_padded_otherwise(check: Any, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", layers=1, padded_to=VOCABULARY)
    assert check({"source": "pretrained", "model": str(other)})


@pytest.mark.parametrize("change", ["another token", "a smaller model"])
def test_a_pretrained_student_with_another_vocabulary_is_refused(check: Any, own: Path, change: str) -> None:
    file = own / ("tokenizer.json" if change == "another token" else "config.json")
    tree = json.loads(file.read_text())
    if change == "another token":
        vocabulary = tree["model"]["vocab"]
        vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    else:
        tree["vocab_size"] = VOCABULARY - 1
    file.write_text(json.dumps(tree))
    reason = "both must be the same" if change == "another token" else r"299 rows \(vocab_size\) for 300 tokens"
    with pytest.raises(UserError, match=rf"students.small.init.model: .* {reason}"):
        check({"source": "pretrained", "model": str(own)})


def test_a_pretrained_student_that_reads_less_than_a_sequence_is_refused(check: Any, own: Path) -> None:
    tree = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**tree, "max_position_embeddings": 16}))
    with pytest.raises(UserError, match=r"corpus.sequence_length: got 32; .* 16"):
        check({"source": "pretrained", "model": str(own)})


def test_a_teacher_without_a_tokenizer_is_refused(check: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_teacher, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match=f"teacher.model: {bare} has no usable tokenizer"):
        check(teacher={"model": str(bare)})


def typed_teacher(folder: Path, kind: str, **fields: Any) -> dict[str, Any]:
    """The teacher section of a tiny model of another type, with the tiny tokenizer."""
    write_tiny_tokenizer(folder)
    return {"model": str(write_tiny_type(folder, kind, vocab_size=320, max_position_embeddings=POSITIONS, **fields))}


def test_a_teacher_without_one_of_its_layers_is_refused(check: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "broken"))
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if "layers.3." not in n}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^teacher.model: .* missing: model.layers.3.* and 6 more$"):
        check(teacher={"model": str(folder)})


def test_a_pretrained_student_that_is_a_git_lfs_pointer_is_refused(check: Any, own: Path) -> None:
    (own / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(UserError, match=r"^students.small.init.model: .* Git LFS pointer"):
        check({"source": "pretrained", "model": str(own)})


def test_a_cut_and_a_scratch_student_of_another_type_are_checked_by_building_them(check: Any, tmp_path: Path) -> None:
    experts = typed_teacher(tmp_path / "experts", "qwen3_moe")
    assert check({"source": "teacher", "layers": [0, 3]}, teacher=experts)
    by_number = typed_teacher(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match=r"^students.small.init.layers: a gpt2 model cannot be cut to layers \[0, 3\]"):
        check({"source": "teacher", "layers": 2}, teacher=by_number)
    bloom = typed_teacher(tmp_path / "bloom", "bloom")
    with pytest.raises(UserError, match=r"^students.small.init.intermediate_size: got 64; a bloom model"):
        check({**SCRATCH, "kv_heads": 4}, teacher=bloom)


@pytest.mark.parametrize(("ranks", "layerdrop"), [(1, 0.1), (2, 0.0), (2, 0.1)], ids=str)
def test_ranks_that_would_leave_out_different_layers_are_refused(
    check: Any, tmp_path: Path, ranks: int, layerdrop: float
) -> None:
    teacher = typed_teacher(tmp_path / "opt", "opt", layerdrop=layerdrop)
    students = {"small": {"init": {"source": "teacher", "layers": 2}, "ranks": ranks}}
    if ranks == 1 or not layerdrop:
        assert check(teacher=teacher, students=students)
        return
    with pytest.raises(UserError, match=r"^students.small.ranks: got 2; opt with layerdrop 0.1 .* use ranks: 1"):
        check(teacher=teacher, students=students)


def with_token(folder: Path, **special: str) -> Path:
    """A model without padding whose tokenizer has one more token than its embedding has rows."""
    write_tiny_model(folder, padded_to=VOCABULARY)
    tokenizer = load_tokenizer(folder, "x")
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == VOCABULARY + 1
    return folder


def test_a_padding_token_behind_the_embedding_does_no_harm(check: Any, tmp_path: Path) -> None:
    folder = with_token(tmp_path / "pad", pad_token="<|pad|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": VOCABULARY}))
    checked = check({"source": "pretrained", "model": str(folder)}, teacher={"model": str(folder)})
    assert checked.teacher.vocabulary == VOCABULARY


def test_an_end_token_behind_the_embedding_is_refused(check: Any, tmp_path: Path) -> None:
    folder = with_token(tmp_path / "end", eos_token="<|the end|>")
    with pytest.raises(UserError, match=r"^teacher.model: .* gives '<\|the end\|>' the id 300; ids must be below 300"):
        check(teacher={"model": str(folder)})


def test_a_model_without_a_longest_text_reads_any() -> None:
    """XLNet's configuration gives -1."""
    spec = FamilySpec.model_validate(tiny_family())
    preflight_module._check_length(spec, SimpleNamespace(max_position_embeddings=-1), "the teacher")
