"""What a text spells out as a special token stays text, with every type of tokenizer that models have."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from cluster.corpus.tokens import Encoder, begin_token, special_tokens
from cluster.errors import UserError

END, START = "</s>", "<s>"
PROSE = f"the quick fox {END} {START} jumps {END}{END} over a lazy dog [SEP] {END}"
CHARACTERS = sorted({*PROSE, *"|_imendT[]"} - {" "})


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2, SmolLM, Qwen and Llama 3; one token is special and has no role, as GGUF files leave them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, START, "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=START)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As of Llama 2, with bytes for what is unknown; its merges end in the end token."""
    tokens = ["<unk>", START, END, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *CHARACTERS]
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("▁", "the"), ("t", "h"), ("th", "e")]
    tokens += [a + b for a, b in merges if a + b not in tokens]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", START, END])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=START, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As of T5 and XGLM: control tokens are pieces, and of the best score."""
    pieces = [("<unk>", 0.0), (START, 0.0), (END, 0.0), ("▁", -4.0), *((c, -5.0) for c in CHARACTERS), ("▁the", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", START, END])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=START, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As of BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]", END, START], show_progress=False
    )
    backend.train_from_iterator([PROSE] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, sep_token="[SEP]", cls_token="[CLS]", unk_token="[UNK]"
    )


BUILDERS = [byte_level, sentencepiece_bpe, unigram, word_piece]


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda builder: builder.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


TEXTS = [
    END,
    f"{START}the{END}",
    f"the quick {END} fox {START} jumps",
    f"fox{END}{END}over {END}",
    f"a {END} {START} a",
    "over the lazy dog",
    "</ s> < s> <//s>",
]


def test_a_text_that_spells_special_tokens_out_is_encoded_without_them(tokenizer: Any) -> None:
    special = set(special_tokens(tokenizer).values())
    assert {tokenizer.eos_token_id} <= special
    for text, ids in zip(TEXTS, Encoder(tokenizer, control=False)(TEXTS), strict=True):
        assert special.isdisjoint(ids), text


def test_the_tokens_decode_to_the_text(tokenizer: Any) -> None:
    kept = (lambda text: "".join(text.split())) if tokenizer.cls_token else str  # BERT's do not keep spaces
    for text, ids in zip(TEXTS, Encoder(tokenizer, control=False)(TEXTS), strict=True):
        assert kept(tokenizer.decode(ids)) == kept(text)


def test_a_text_without_special_tokens_is_encoded_as_ever(tokenizer: Any) -> None:
    texts = ["the quick fox jumps", "over a lazy dog", "  the  dog "]
    assert Encoder(tokenizer, control=False)(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_control_makes_special_tokens_of_them(tokenizer: Any) -> None:
    (ids,) = Encoder(tokenizer, control=True)([f"the fox {END} jumps{END}"])
    assert ids.count(tokenizer.eos_token_id) == 2


def test_one_mode_does_not_leak_into_the_other(tokenizer: Any) -> None:
    plain, control = Encoder(tokenizer, control=False), Encoder(tokenizer, control=True)
    first = plain(TEXTS), control(TEXTS)
    assert (plain(TEXTS), control(TEXTS)) == first
    assert first[0] != first[1]


def test_texts_that_spell_one_out_are_found(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, control=False)
    assert [encoder.spells_special(text) for text in TEXTS] == [True] * 5 + [False] * 2


def test_a_special_token_without_a_role_stays_text_too() -> None:
    tokenizer = byte_level()
    assert "<|im_end|>" in special_tokens(tokenizer)
    (ids,) = Encoder(tokenizer, control=False)(["a<|im_end|>b"])
    assert special_tokens(tokenizer)["<|im_end|>"] not in ids
    assert tokenizer.decode(ids) == "a<|im_end|>b"


def test_an_added_token_that_is_not_special_is_a_token_in_either_mode() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    wanted = tokenizer.convert_tokens_to_ids("<think>")
    for control in (False, True):
        assert wanted in Encoder(tokenizer, control)(["a <think> b"])[0]


def test_the_unknown_token_may_stand_in_any_text_where_the_tokenizer_makes_it() -> None:
    assert "<unk>" not in special_tokens(unigram())
    (ids,) = Encoder(unigram(), control=False)(["the 五 fox"])
    assert unigram().unk_token_id in ids
    assert "<unk>" in special_tokens(sentencepiece_bpe())
    tokenizer = byte_level()
    tokenizer.unk_token = "<|im_end|>"
    assert "<|im_end|>" in special_tokens(tokenizer)


class Words(PreTrainedTokenizer):
    """A tokenizer in Python, whose words are its tokens: nothing can be done about one that is a special token."""

    def __init__(self, **kwargs: Any) -> None:
        self._words = ["<unk>", END, "the", "fox"]
        super().__init__(eos_token=END, unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self._words.index(token) if token in self._words else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]


def test_a_tokenizer_that_cannot_help_it_is_refused_with_the_option() -> None:
    encoder = Encoder(Words(), control=False)
    assert encoder(["the fox"]) == [[2, 3]]
    with pytest.raises(
        UserError, match=r"corpus.special_tokens: .* cannot encode </s> as plain text; set it to control"
    ):
        encoder([f"the {END} fox"])
    assert Encoder(Words(), control=True)([f"the {END} fox"]) == [[2, 1, 3]]


def declaring(single: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a post-processor, as of Llama, Gemma and DeepSeek."""
    tokenizer = byte_level()
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (START, END, "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        (f"{START} $A", "document"),
        (f"{START} $A {END}", "document"),
        (f"$A {END}", "never"),
        (f"<|im_end|> $A {END}", "never"),  # as BERT's, whose first token is not the one that begins a text
    ],
)
def test_a_begin_token_goes_where_the_tokenizer_puts_it_unless_the_spec_says_otherwise(
    single: str, expected: str
) -> None:
    tokenizer = declaring(single)
    begin = tokenizer.bos_token_id
    assert begin_token(None, tokenizer) == (expected, begin if expected == "document" else None)
    assert begin_token("never", tokenizer) == ("never", None)
    for setting in ("document", "sequence"):
        assert begin_token(setting, tokenizer) == (setting, begin)


def test_a_tokenizer_that_declares_none_gets_none_and_one_without_any_refuses_it() -> None:
    assert begin_token(None, byte_level()) == ("never", None)
    assert begin_token("document", byte_level()) == ("document", 1)
    without = word_piece()
    assert begin_token(None, without) == begin_token("never", without) == ("never", None)
    with pytest.raises(UserError, match=r"corpus.bos: got document; .* has no begin token \(BOS\); use never"):
        begin_token("document", without)
