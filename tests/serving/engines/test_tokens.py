"""Which bytes a token is, for the kinds of vocabulary that there are."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from serving.engines.tokens import Tokenizer, end_tokens


def test_a_byte_level_vocabulary_is_its_bytes(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    text = "naïve 東京 \n\t\x00\x7f😀"
    assert b"".join(tokenizer.raw(token) for token in tokenizer.encode(text)) == text.encode()
    assert sorted(tokenizer.raw(token) for token in range(4, 260)) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.raw(0) == b"<|end|>"


def test_a_sentencepiece_vocabulary_has_spaces_and_bytes(tmp_path: Path) -> None:
    words = {"<unk>": 0, "\u2581the": 1, "re": 2, "<0xE6>": 3, "<0x0A>": 4, "\u6771": 5}
    backend = Backend(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path, vocabulary=8)
    assert [tokenizer.raw(token) for token in range(1, 6)] == [b" the", b"re", b"\xe6", b"\n", "\u6771".encode()]
    assert tokenizer.raw(7) == b""  # the vocabulary of the model is padded
    tokenizer.check([7])


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "ends"),
    [(None, None, set()), (None, 3, {3}), (1, 3, {1}), ([1, 2], 3, {1, 2}), (0, 3, {0})],
)
def test_the_model_says_what_ends_it(of_model: int | list[int] | None, of_tokenizer: int | None, ends: set) -> None:
    assert end_tokens(of_model, of_tokenizer) == ends
