"""Which tokenizers belong together: those that give a text the same ids, whatever else their files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.models import load_tokenizer
from cluster.vocabulary import token_difference

Tree = dict[str, Any]


@pytest.fixture
def compared(tiny_teacher: Path, tmp_path: Path) -> Callable[[Callable[[Tree], Any]], str | None]:
    """How the tiny tokenizer with a change in its file differs from the unchanged one."""

    def run(change: Callable[[Tree], Any]) -> str | None:
        folder = Path(shutil.copytree(tiny_teacher, tmp_path / "changed"))
        tree = json.loads((folder / "tokenizer.json").read_text())
        before = json.dumps(tree)
        change(tree)
        assert json.dumps(tree) != before
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        return token_difference(load_tokenizer(folder, "own"), load_tokenizer(tiny_teacher, "teacher"))

    return run


def added(number: int, content: str, special: bool) -> Tree:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SAME: dict[str, Callable[[Tree], Any]] = {
    "a post-processor": lambda tree: tree.update(post_processor=BYTES),
    "another decoder": lambda tree: tree.update(decoder={"type": "Fuse"}),
    "padding": lambda tree: tree.update(
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|end|>",
        }
    ),
    "truncation": lambda tree: tree.update(
        truncation={"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    ),
    "offsets": lambda tree: tree["pre_tokenizer"].update(trim_offsets=not tree["pre_tokenizer"]["trim_offsets"]),
    "a special token behind the others": lambda tree: tree["added_tokens"].append(added(300, "<|pad|>", True)),
}
OTHER: dict[str, tuple[Callable[[Tree], Any], str]] = {
    "a word behind the others": (
        lambda tree: tree["added_tokens"].append(added(300, "distillery", False)),
        "id 300 is 'distillery' in it and no token in the teacher's (301 and 300 tokens)",
    ),
    "a special token by another name": (
        lambda tree: (
            tree["added_tokens"][2].update(content="<|bot|>"),
            tree["model"]["vocab"].update({"<|bot|>": tree["model"]["vocab"].pop("<|assistant|>")}),
        ),
        "id 2 is '<|bot|>' in it and '<|assistant|>' in the teacher's",
    ),
    "a merge less": (lambda tree: tree["model"]["merges"].pop(), "(merges in tokenizer.json)"),
    "lower case": (lambda tree: tree.update(normalizer={"type": "Lowercase"}), "(normalizer in tokenizer.json)"),
    "a space in front": (
        lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
        "(pre_tokenizer in tokenizer.json)",
    ),
}


@pytest.mark.parametrize("change", SAME)
def test_what_gives_a_text_the_same_ids_is_accepted(change: str, compared: Any) -> None:
    assert compared(SAME[change]) is None


@pytest.mark.parametrize("change", OTHER)
def test_what_gives_a_text_other_ids_is_named(change: str, compared: Any) -> None:
    make, said = OTHER[change]
    difference = compared(make)
    assert difference is not None and said in difference


def test_a_special_token_that_the_teacher_alone_has_does_no_harm(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    tokenizer = load_tokenizer(folder, "teacher")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert token_difference(load_tokenizer(tiny_teacher, "own"), tokenizer) is None
