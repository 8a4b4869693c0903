"""Text to token ids. What the text spells out as a special token stays text unless the spec wants it otherwise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cluster.errors import UserError

# A character for private use, which no vocabulary has.
UNKNOWN = "\U0010fffd"


class Encoder:
    """Encodes documents with a tokenizer of transformers, without the tokens that open or close a sequence.

    ``split_special_tokens`` keeps the tokenizer from looking for special tokens in a text, but not its model from
    making them: merges of a BPE model may end in ``</s>``, and a Unigram model has it as a piece. So the result is
    checked, and a special token in it is replaced by the tokens of its two parts.

    Args:
        control: text that spells out a special token becomes that token.
    """

    def __init__(self, tokenizer: Any, control: bool) -> None:
        self._tokenizer, self._control = tokenizer, control
        special = special_tokens(tokenizer)
        self._special = frozenset(special.values())
        # The longest first: an alternation takes the first that fits.
        names = sorted(map(re.escape, special), key=len, reverse=True)
        self._spelled = re.compile("|".join(names)) if names else None

    def spells_special(self, text: str) -> bool:
        """Whether a text spells out a special token."""
        return self._spelled is not None and self._spelled.search(text) is not None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids per text.

        Raises:
            UserError: special tokens cannot be kept out of a text.
        """
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=not self._control, verbose=False
        )["input_ids"]
        if self._control:
            return encoded
        return [ids if self._special.isdisjoint(ids) else self._as_text(ids) for ids in encoded]

    def _as_text(self, ids: list[int]) -> list[int]:
        plain = [part for token in ids for part in (self._parts(token) if token in self._special else (token,))]
        if left := self._special.intersection(plain):
            names = ", ".join(map(str, self._tokenizer.convert_ids_to_tokens(sorted(left))))
            raise UserError(
                f"corpus.special_tokens: the teacher's tokenizer cannot encode {names} as plain text; set it to "
                f"control, or take these out of the text"
            )
        return plain

    def _parts(self, token: int) -> list[int]:
        """The tokens of a special token's first character and of the rest, as its model makes them."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [token]
        name = self._tokenizer.convert_ids_to_tokens(token)
        return [part.id for text in (name[:1], name[1:]) if text for part in backend.model.tokenize(text)]


def begin_token(setting: str | None, tokenizer: Any) -> tuple[str, int | None]:
    """Where the token that begins a text (BOS) goes, and its id; ``never`` and None where there is none.

    Args:
        setting: ``corpus.bos``; none follows the tokenizer, which declares it by what it puts in front of a plain text.

    Raises:
        UserError: a begin token is asked for that the tokenizer does not have.
    """
    begin = tokenizer.bos_token_id
    if setting is None:
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        declared = begin is not None and tokenizer("a")["input_ids"][:1] == [begin] != plain[:1]
        setting = "document" if declared else "never"
    if setting == "never":
        return setting, None
    if begin is None:
        raise UserError(f"corpus.bos: got {setting}; the teacher's tokenizer has no begin token (BOS); use never")
    return setting, int(begin)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer with their ids, without one that it makes of what it does not know."""
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    found |= {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Tokenizers with bytes often name the end token as the unknown one, and never make it.
    unknown = tokenizer.unk_token
    if tokenizer.unk_token_id in tokenizer(UNKNOWN, add_special_tokens=False)["input_ids"]:
        found.pop(unknown, None)
    return found
