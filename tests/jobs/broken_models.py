"""Makes models that people really had and that `check` refuses; see test_broken_inputs.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import SPECIAL, VOCABULARY, write_tiny_model, write_tiny_tokenizer
from tests.tiny_types import tiny_model, write_own_code, write_tiny_type

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 60772936\n"
SCRATCH = "{source: scratch, layers: 2, hidden_size: 32, heads: 4, intermediate_size: 64}"
# Makes the input in a folder, where `model` is a copy of the tiny teacher; returns what --set is given.
Make = Callable[[Path], list[str]]


def teacher(folder: Path) -> list[str]:
    return [f"teacher.model={folder / 'model'}"]


def student(folder: Path) -> list[str]:
    return [f"students.small.init={{source: pretrained, model: {folder / 'model'}}}"]


def with_file(name: str, content: str | bytes, given: Make = teacher, *, lost: str = "") -> Make:
    """The model with another file in it, and perhaps without one."""

    def make(folder: Path) -> list[str]:
        if lost:
            (folder / "model" / lost).unlink()
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "model" / name).write_bytes(data)
        return given(folder)

    return make


def with_fields(file: str, given: Make = teacher, *more: str, **fields: Any) -> Make:
    """The model with other fields in one of its JSON files; None takes one out."""

    def make(folder: Path) -> list[str]:
        path = folder / "model" / file
        tree = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))
        return [*given(folder), *more]

    return make


def quantized(given: Make = teacher, *more: str, **settings: Any) -> Make:
    return with_fields("config.json", given, *more, quantization_config=settings)


def of_type(kind: str, *more: str, **fields: Any) -> Make:
    """A model of which only the configuration's kind is looked at."""
    return with_file("config.json", json.dumps({"model_type": kind, **fields}), lambda at: [*teacher(at), *more])


def written(write: Callable[[Path], Any], *more: str, given: Make = teacher) -> Make:
    """A model that is written instead of the copy."""

    def make(folder: Path) -> list[str]:
        shutil.rmtree(folder / "model")
        (folder / "model").mkdir()
        write(folder / "model")
        return [*given(folder), *more]

    return make


def mamba(folder: Path) -> None:
    from transformers import AutoConfig

    write_tiny_tokenizer(folder)
    tiny_model(
        AutoConfig.for_model("mamba", vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).save_pretrained(folder)


def encoder(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    write_tiny_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=320, **sizes)).save_pretrained(folder)


def classifier(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    write_tiny_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=320, pad_token_id=0, **sizes)).save_pretrained(folder)


def two_files(folder: Path) -> None:
    """A model of whose shards one was not copied."""
    write_tiny_tokenizer(folder)
    write_tiny_type(folder, "llama", vocab_size=320, max_position_embeddings=512)
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    parts = {name: f"model-0000{1 + ('norm' in name)}-of-00002.safetensors" for name in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def own_code(*lost: str, **auto_map: str) -> Callable[[Path], None]:
    """A model with Python of its own, perhaps without some of it or from elsewhere."""

    def write(folder: Path) -> None:
        write_tiny_tokenizer(folder)
        write_own_code(folder, vocab_size=320, max_position_embeddings=512)
        for name in lost:
            (folder / name).unlink()
        tree = json.loads((folder / "config.json").read_text())
        tree["auto_map"] |= auto_map
        (folder / "config.json").write_text(json.dumps(tree))

    return write


def cut_off(folder: Path) -> list[str]:
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return teacher(folder)


def dangling(name: str) -> Make:
    """A file as a cache of the hub has it whose blobs have been removed."""

    def make(folder: Path) -> list[str]:
        (folder / "model" / name).unlink()
        (folder / "model" / name).symlink_to("../../blobs/4d7a21")
        return teacher(folder)

    return make


def rewritten(change: Callable[[Any], Any]) -> Make:
    """The model with its weights changed."""

    def make(folder: Path) -> list[str]:
        from safetensors.torch import load_file, save_file

        file = folder / "model" / "model.safetensors"
        save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        return teacher(folder)

    return make


def mixed_shards(folder: Path) -> list[str]:
    """Files of two saves in one index: both hold a norm."""
    import torch
    from safetensors.torch import save_file

    model = folder / "model"
    save_file({"model.norm.weight": torch.ones(64)}, model / "model-2.safetensors", {"format": "pt"})
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-1.safetensors", "model.norm.weight": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return teacher(folder)


def gguf_file(folder: Path) -> list[str]:
    (folder / "q4.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return [f"teacher.model={folder / 'q4.gguf'}"]


def gguf_folder(folder: Path) -> None:
    (folder / "q4.gguf").write_bytes(b"GGUF\x03\0\0\0")
    write_tiny_tokenizer(folder)


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def added_word(folder: Path) -> list[str]:
    """A token for the tokenizer, and none for the embedding."""
    from transformers import AutoTokenizer

    write_tiny_model(folder / "model", padded_to=VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens(["distillery"])
    tokenizer.save_pretrained(folder / "model")
    return teacher(folder)


def other_merges(folder: Path) -> list[str]:
    file = folder / "model" / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["merges"].pop()
    file.write_text(json.dumps(tree))
    return student(folder)


def moved_special(folder: Path) -> list[str]:
    file = folder / "model" / "tokenizer.json"
    file.write_text(file.read_text().replace(SPECIAL[1], "<|human|>"))
    return student(folder)
