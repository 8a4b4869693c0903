"""Inputs that people really had: `check` refuses each in one line with exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

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


TRUSTED = "teacher.trust_remote_code=true"
BROKEN: dict[str, tuple[Make, list[str]]] = {
    # -- other formats
    # heshengtao/comfyui_LLM_party #75
    "a GGUF file": (gguf_file, ["teacher.model: ", "q4.gguf is a GGUF file; convert it", "gguf_file='q4.gguf'"]),
    "a folder of GGUF files": (written(gguf_folder), ["holds GGUF files; convert it", "gguf_file='q4.gguf'"]),
    "an adapter": (written(adapter), ["holds an adapter (adapter_config.json); merge it into org/base"]),
    "an adapter beside a whole model": (
        with_file("adapter_config.json", '{"base_model_name_or_path": null}'),
        ["holds an adapter (adapter_config.json); merge it into its base model"],
    ),
    "pickled weights": (
        with_file("pytorch_model.bin", b"\x80", lost="model.safetensors"),
        ["holds no .safetensors but pytorch_model.bin; other weight formats can run code", "save_pretrained"],
    ),
    "a diffusion pipeline": (
        with_file("model_index.json", "{}", lost="config.json"),
        ["holds no config.json; give a directory with a Hugging Face model"],
    ),
    # -- files that did not arrive
    "a shard that is absent": (
        written(two_files),
        ["names files that are not there: model-00002-of-00002.safetensors"],
    ),
    "an index alone": (
        with_file(
            "model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}', lost="model.safetensors"
        ),
        ["names files that are not there: model-1.safetensors"],
    ),
    "weights that were cut off": (cut_off, ["model.safetensors (", "is damaged or was not copied whole"]),
    # huggingface/transformers #27923
    "weights that Git LFS has not fetched": (
        with_file("model.safetensors", POINTER),
        ["model.safetensors is a Git LFS pointer", "run `git lfs pull`"],
    ),
    # turboderp/exllama #242
    "a tokenizer that Git LFS has not fetched": (
        with_file("tokenizer.json", POINTER),
        ["tokenizer.json is a Git LFS pointer", "run `git lfs pull`"],
    ),
    "a configuration that Git LFS has not fetched": (
        with_file("config.json", POINTER),
        ["config.json is a Git LFS pointer"],
    ),
    # -- quantized weights
    # huggingface/lighteval #200, AIAnytime/Fine-Tune-DeepSeek #1
    "bitsandbytes, not installed": (
        quantized(quant_method="bitsandbytes", load_in_8bit=True),
        ["is quantized with bitsandbytes, whose library is not installed here", "without quantization"],
    ),
    "GPTQ, not installed": (
        quantized(quant_method="gptq", bits=4, group_size=128),
        ["is quantized with gptq, whose library is not installed here (", "optimum", "without quantization"],
    ),
    "an unknown quantization": (
        quantized(quant_method="exl2", bits=4),
        ["cannot use the quantization_config in", "exl2"],
    ),
    "layers of a quantized teacher": (
        quantized(quant_method="fp8"),
        ["students.small.init: the teacher's weights are quantized (fp8)", "source: pretrained or scratch"],
    ),
    "a quantized student": (
        quantized(student, quant_method="fp8"),
        ["students.small.init.model: the weights of", "quantized (fp8) and cannot be trained"],
    ),
    # -- other kinds of models
    # huggingface/transformers #36683, vllm-project/vllm #14687
    "Gemma 3 with its images": (of_type("gemma3"), ["teacher.model: a gemma3 model has no vocab_size of its own"]),
    # unslothai/unsloth-zoo #148
    "Mistral 3 with its images": (of_type("mistral3"), ["is a mistral3 model, not a causal language model"]),
    # tenstorrent/tt-forge-models #175: no num_attention_heads
    "shards of a Mamba": (
        of_type("mamba", "teacher.shards=2", vocab_size=320),
        ["teacher.shards: got 2; a mamba model has no attention heads"],
    ),
    "a Mamba from scratch": (
        written(mamba, f"students.small.init={SCRATCH}"),
        ["students.small.init: a mamba model has no attention heads; init.source scratch cannot size it"],
    ),
    "T5": (of_type("t5"), ["is a t5 model, not a causal language model"]),
    "BART": (of_type("bart"), ["is a bart model with an encoder, not a causal language model"]),
    "BERT": (written(encoder), ["a bert model", "is not causal", "give a causal language model"]),
    "a classifier": (written(classifier), ["do not fit its config.json: missing: lm_head.weight", "score.weight"]),
    # -- configurations
    "half a configuration": (
        with_file("config.json", '{"model_type": "llama",'),
        ["cannot read", "config.json as JSON"],
    ),
    "a configuration in UTF-16": (
        with_file("config.json", '{"model_type": "llama"}'.encode("utf-16")),
        ["cannot read", "config.json as JSON"],
    ),
    # InternLM/lmdeploy #3292, AnswerDotAI/ModernBERT #145
    "a type that transformers does not know": (
        of_type("deepseek_vl_v3"),
        ["gives the model_type deepseek_vl_v3, which transformers", "upgrade transformers"],
    ),
    "no type": (with_fields("config.json", model_type=None), ["gives the model_type None, which transformers"]),
    # Found by giving every field of a Llama's configuration a value of another type.
    "a list of types": (with_fields("config.json", model_type=["llama"]), ["gives the model_type ['llama'], which"]),
    "a number as the weights' name": (
        with_fields("config.json", transformers_weights=3),
        ["holds no 3; save the model with save_pretrained"],
    ),
    # -- Python that comes with a model
    "own code that is not allowed": (
        written(own_code()),
        ["needs Python of its own (configuration_own.OwnConfig, ", "set teacher.trust_remote_code: true"],
    ),
    "a student's own code that is not allowed": (
        written(own_code(), given=student),
        ["students.small.init.model: ", "set students.small.init.trust_remote_code: true"],
    ),
    "own code that is not there": (
        written(own_code("modeling_own.py"), TRUSTED),
        ["names modeling_own.OwnForCausalLM, but modeling_own.py is not there"],
    ),
    "own code of another repository": (
        written(own_code(AutoModelForCausalLM="org/code--modeling.Model"), TRUSTED),
        ["runs code of another repository (org/code--modeling.Model)"],
    ),
    "own code behind an endpoint": (
        written(own_code(), TRUSTED, "serving={include_teacher: false}"),
        ["serving: student small needs Python of its own, which endpoints never run; leave out serving"],
    ),
    "a tokenizer with own code": (
        with_fields(
            "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        ),
        ["has no usable tokenizer: it needs Python of its own, which is not run"],
    ),
    # -- tokenizers and embeddings
    "no vocabulary": (
        with_fields("tokenizer_config.json", lambda at: [(at / "model" / "tokenizer.json").unlink() or teacher(at)[0]]),
        ["has no usable tokenizer: it holds no tokenizer.json"],
    ),
    # huggingface/tokenizers #1609, huggingface/transformers #12763
    "a word without an embedding": (added_word, ["gives 'distillery' the id 300; ids must be below 300"]),
    # fc2869/lo-fit #1: a tokenizer of 32001, an embedding of 32000
    "a student without the last embedding": (
        with_fields("config.json", student, vocab_size=VOCABULARY - 1),
        ["its embedding has 299 rows (vocab_size) for 300 tokens", "resize_token_embeddings(300)"],
    ),
    # huggingface/trl #4562
    "a student that splits text in other ways": (other_merges, ["another tokenizer", "(merges in tokenizer.json)"]),
    "a student with another special token": (
        moved_special,
        ["id 1 is '<|human|>' in it and '<|user|>' in the teacher's (300 and 300 tokens)"],
    ),
    # -- names
    "a hub that cannot be reached": (
        lambda _: ["teacher.model=hf://Qwen/Qwen2.5-0.5B"],
        ["teacher.model: cannot fetch hf://Qwen/Qwen2.5-0.5B (default revision)"],
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_model_is_refused_by_check(
    broken: str,
    run: Callable[..., tuple[int, str, str]],
    spec: Path,
    tiny_teacher: Path,
    stillhouse_home: Path,
    own_code_cache: Path,
) -> None:
    make, wanted = BROKEN[broken]
    folder = spec.parent
    shutil.copytree(tiny_teacher, folder / "model")
    overrides = make(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    processes = {process.pid for process in psutil.Process().children(recursive=True)}
    code, out, err = run("check", str(spec), *(part for each in overrides for part in ("--set", each)))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [part for part in wanted if part not in err] == [], err
    assert not stillhouse_home.exists()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= processes
