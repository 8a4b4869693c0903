"""Whether a teacher's tokenizer, its embedding and its students' tokenizers belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import UserError


def vocabulary_of(tokenizer: Any, config: Any, field: str) -> int:
    """Columns of a teacher's logits that stand for tokens: padded model vocabularies are cut to the tokenizer's size.

    Raises:
        UserError: the model nests its language model, as multimodal ones do.
    """
    return min(len(tokenizer), embedding_rows(config, field))


def embedding_rows(config: Any, field: str) -> int:
    """Rows of a model's token embedding, as its configuration gives them.

    Raises:
        UserError: the model nests its language model, as multimodal ones do.
    """
    rows = getattr(config, "vocab_size", None)
    if not isinstance(rows, int):
        raise UserError(
            f"{field}: a {config.model_type} model has no vocab_size of its own: it is multimodal and nests its "
            f"language model; give a text-only model"
        )
    return rows


def check_tokens(tokenizer: Any, vocabulary: int, folder: Path) -> None:
    """Whether a teacher's embedding has a row for every token that text becomes.

    Special tokens behind its end, such as an added padding token, do no harm: no batch is padded with them.
    """
    special = _special(tokenizer) - {tokenizer.eos_token_id}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocabulary and i not in special}
    if beyond:
        number = min(beyond)
        raise UserError(
            f"teacher.model: the tokenizer of {folder} gives {beyond[number]!r} the id {number}; ids must be below "
            f"{vocabulary}, the smaller of the tokenizer's size and the model's embedding"
        )


def check_student_vocabulary(own: Any, rows: int, tokenizer: Any, vocabulary: int, *, model: str, field: str) -> None:
    """Whether a student can learn labels over the teacher's vocabulary.

    Args:
        own, tokenizer: the student's and the teacher's tokenizer.
        rows: of the student's embedding.
        model: the student's model, for the error.

    Raises:
        UserError: its tokenizer is another one, or its embedding is too small; says which.
    """
    if difference := token_difference(own, tokenizer):
        raise UserError(
            f"{field}: {model} has another tokenizer than the teacher: {difference}; labels are distributions over the "
            f"teacher's tokens, so both must be the same"
        )
    if rows < vocabulary:
        raise UserError(
            f"{field}: {model} has the teacher's tokenizer, but its embedding has {rows} rows (vocab_size) for "
            f"{vocabulary} tokens; give it the missing ones with resize_token_embeddings({vocabulary}) and save it"
        )


def token_difference(own: Any, teachers: Any) -> str | None:
    """What makes a tokenizer give a text other ids than the teacher's does; None where nothing does.

    Special tokens that only one of the two has do not count where the other has no token with their id. Nor do chat
    templates and the steps behind the model, which add special tokens or make text of ids: Stillhouse encodes without
    the ones, with the teacher's tokenizer, and a student is saved with the teacher's.
    """
    mine, theirs = _tokens(own), _tokens(teachers)
    for number in sorted(mine.keys() | theirs.keys()):
        token, other = mine.get(number), theirs.get(number)
        alone = own if other is None else teachers
        if token != other and not (None in (token, other) and number in _special(alone)):
            here, there = ("no token" if each is None else repr(each) for each in (token, other))
            return f"id {number} is {here} in it and {there} in the teacher's ({len(own)} and {len(teachers)} tokens)"
    rules, teachers_rules = _rules(own), _rules(teachers)
    if rules is None or teachers_rules is None:
        return None
    changed = [name for name in teachers_rules.keys() | rules.keys() if rules.get(name) != teachers_rules.get(name)]
    if not changed:
        return None
    return f"both have the same tokens, but split text in other ways ({', '.join(sorted(changed))} in tokenizer.json)"


def _tokens(tokenizer: Any) -> dict[int, str]:
    # In order, for the backend lists tokens at random, and two may share an id.
    return {number: token for token, number in sorted(tokenizer.get_vocab().items())}


def _special(tokenizer: Any) -> set[int]:
    """Ids of a tokenizer's special tokens."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _rules(tokenizer: Any) -> dict[str, Any] | None:
    """How a tokenizer makes ids of text, by part; None of one without a backend that could tell."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    # trim_offsets moves the places of tokens in the text, which are not used.
    tree = json.loads(
        tokenizer.backend_tokenizer.to_str(),
        object_hook=lambda each: {name: value for name, value in each.items() if name != "trim_offsets"},
    )
    model = {name: value for name, value in tree["model"].items() if not (name == "vocab" and isinstance(value, dict))}
    return {"normalizer": tree["normalizer"], "pre_tokenizer": tree["pre_tokenizer"], **model}
