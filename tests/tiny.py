"""Tiny real parts that a test can afford: a model, a corpus, a family. Plain functions that any test can call."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from cluster.evaluate.result import FamilyResult
    from cluster.preflight import Checked
    from cluster.watch import Status

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCABULARY = 300
BYTES = len(SPECIAL) + 256  # a vocabulary without merges: text has as many tokens as bytes
POSITIONS = 512
ENDLESS_POSITIONS = 65536
TEXT = (
    "the still house runs all night and one pass of spirit fills every cask on the hill while a slow fire under "
    "copper turns water into steam so that what is light goes over first and what is heavy stays behind"
)
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_tokenizer(path: Path, *, vocabulary: int = VOCABULARY, ends: bool = True) -> Path:
    """A byte-level BPE tokenizer with a chat template.

    Args:
        vocabulary: its tokens, ``BYTES`` or more; the special ones come first, the end token has id 0.
        ends: whether the end token is one that a model of this vocabulary can write. If not, its texts are as long as
            they are asked to be.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 2, trainer)
    end = SPECIAL[0] if ends else "<|never|>"  # gets the first id beyond the vocabulary
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=SPECIAL[0])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def write_tiny_model(
    path: Path,
    *,
    layers: int = 4,
    hidden: int = 64,
    vocabulary: int = VOCABULARY,
    padded_to: int = 320,
    positions: int = POSITIONS,
    spread: float = 0.2,
    tied: bool = False,
    ends: bool = True,
    seed: int = 0,
) -> Path:
    """A random Llama in float32 safetensors with its tokenizer: 4 heads, 2 key-value heads.

    Args:
        vocabulary: tokens of its tokenizer, ``BYTES`` or more.
        padded_to: rows of the embedding and the head, as many as the tokenizer has tokens or more.
        positions: the longest text it reads.
        spread: standard deviation of its weights; the larger, the more peaked what it predicts.
        tied: the head is the input embedding.
        ends: as :func:`write_tiny_tokenizer`'s.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_tokenizer(path, vocabulary=vocabulary, ends=ends)
    config = LlamaConfig(
        vocab_size=padded_to,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0 if ends else None,
        pad_token_id=0,
        initializer_range=spread,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def write_serving_model(path: Path, **options: Any) -> Path:
    """A model for an engine: 2 layers, a token per byte, and peaked enough that greedy text is not one token for ever.

    Args:
        options: of :func:`write_tiny_model`.
    """
    return write_tiny_model(path, layers=2, vocabulary=BYTES, padded_to=BYTES, spread=0.5, **options)


def write_endless_model(path: Path, seed: int = 0) -> Path:
    """A serving model that reads and writes 65,536 tokens and never ends a text by itself.

    A generation nobody stops is still running when a test has looked.
    """
    return write_serving_model(path, positions=ENDLESS_POSITIONS, ends=False, seed=seed)


def write_tiny_corpus(path: Path, documents: int = 64, words: int = 60, seed: int = 0) -> Path:
    """A jsonl file of short texts under ``text``; roughly two tokens of the tiny tokenizer a word."""
    dice = random.Random(seed)
    rows = [{"text": " ".join(dice.choices(WORDS, k=words)) + "."} for _ in range(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_family(
    teacher_dir: Path | str = "teacher", corpus_file: Path | str = "corpus.jsonl", /, **sections: Any
) -> dict[str, Any]:
    """A family spec as it is read from YAML: one student ``small`` of two of the teacher's layers.

    Args:
        sections: fields that are added to a section, or a section or a single field that is added.
    """
    tree: dict[str, Any] = {
        "name": "tiny",
        "teacher": {"model": str(teacher_dir), "dtype": "float32"},
        "corpus": {"paths": [str(corpus_file)], "sequence_length": 32, "batch_sequences": 4},
        "labels": {"k": 8},
        "students": {"small": {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "lr": 1e-3}},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, Mapping) else fields
    return tree


def write_family(folder: Path, tiny: Path, students: dict[str, dict[str, Any]] | None = None, **sections: Any) -> Path:
    """A family over the tiny teacher as a YAML file; tenths of a CPU, so that several fit on a small machine.

    Args:
        students: instead of the tiny family's one.
        sections: fields that are added to the other sections.
    """
    labels = sections.pop("labels", None)
    # A store of its own, or one test would find what another has scored.
    sections.setdefault("store", {"uri": str(folder / "labels")})
    tree = tiny_family(tiny / "teacher", tiny / "corpus.jsonl", **sections)
    tree["labels"] = labels or tree["labels"]
    tree["students"] = students or tree["students"]
    tree["teacher"] = {"cpus_per_shard": 0.2, **tree["teacher"]}
    tree["students"] = {name: {"cpus_per_rank": 0.2, **student} for name, student in tree["students"].items()}
    path = folder / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_here(path: Path, resume: bool = False) -> tuple[Checked, FamilyResult, list[Status]]:
    """Run a family on the cluster that is up, and keep every status that it reported."""
    from cluster.family import run_family
    from cluster.preflight import preflight
    from cluster.runs import open_run
    from cluster.specfile import load_spec

    checked = preflight(load_spec(path))
    seen: list[Status] = []
    return checked, run_family(checked, open_run(checked.spec, resume), seen.append), seen
