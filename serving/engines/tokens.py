"""A model's tokenizer, as the engines use it: prompts to ids, ids to text, ids to bytes. Needs no torch."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from serving.engines.base import Refused


class Tokenizer:
    """The tokenizer of a Hugging Face directory; no code from the directory is run."""

    def __init__(self, model_dir: Path | str, vocabulary: int | None = None) -> None:
        """``vocabulary`` is the model's number of token ids where it differs from the tokenizer's."""
        self._inner = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        self.vocabulary = vocabulary or len(self._inner)

    @property
    def end(self) -> int | None:
        """The token that ends a text."""
        end: int | None = self._inner.eos_token_id
        return end

    def encode(self, prompt: str) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode`."""
        ids: list[int] = self._inner(prompt)["input_ids"]
        if ids:
            return ids
        if self._inner.bos_token_id is None:
            raise Refused("The prompt is empty and this model has no token to begin a text with.", param="prompt")
        return [self._inner.bos_token_id]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See :meth:`serving.engines.base.Engine.encode_chat`."""
        if not self._inner.chat_template:
            raise Refused("This model has no chat template; use /v1/completions.", param="messages")
        try:
            text = self._inner.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise Refused(f"This model's chat template does not take the messages: {error}.", "messages") from error
        # The template writes its own special tokens.
        ids: list[int] = self._inner(text, add_special_tokens=False)["input_ids"]
        return ids

    def check(self, token_ids: Sequence[int]) -> None:
        """See :meth:`serving.engines.base.Engine.check_tokens`."""
        outside = [token for token in token_ids if not 0 <= token < self.vocabulary]
        if outside:
            raise Refused(f"Token id {outside[0]} is outside this model's 0 to {self.vocabulary - 1}.", "prompt")

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self._inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def raw(self, token: int) -> bytes:
        """The bytes that one token stands for, also where they are only a part of a character."""
        if token in self._special:
            return self._special[token].encode()
        piece = self._inner.convert_ids_to_tokens(token)
        if piece is None:  # a padded vocabulary has ids that no token has
            return b""
        if "ByteLevel" in self._decoders:
            known = [self._byte_of.get(character) for character in piece]
            return piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if "ByteFallback" in self._decoders and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if "Replace" in self._decoders or "Metaspace" in self._decoders:
            return bytes(piece.replace("\u2581", " ").encode())
        return self.decode([token]).encode()

    @cached_property
    def _special(self) -> dict[int, str]:
        return {token: added.content for token, added in self._inner.added_tokens_decoder.items()}

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Kinds of the steps by which the tokenizer's backend makes text of tokens."""
        backend = getattr(self._inner, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        return frozenset(_kinds(decoder))

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Byte-level vocabularies write each byte as a printable character: its own, or one from 256 upwards."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _kinds(decoder: Any) -> list[str]:
    if not decoder:
        return []
    return [decoder["type"], *(kind for step in decoder.get("decoders", ()) for kind in _kinds(step))]


def end_tokens(of_model: int | list[int] | None, of_tokenizer: int | None) -> frozenset[int]:
    """A chat model's generation config lists several ends; a bare one has only its tokenizer's."""
    tokens = of_model if of_model is not None else of_tokenizer
    return frozenset(tokens if isinstance(tokens, list) else [] if tokens is None else [tokens])
