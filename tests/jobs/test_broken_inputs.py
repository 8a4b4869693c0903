"""Inputs that people really had: `check` refuses each in one line with exit code 2, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.jobs.broken_models import (
    POINTER,
    SCRATCH,
    Make,
    adapter,
    added_word,
    classifier,
    cut_off,
    dangling,
    encoder,
    gguf_file,
    gguf_folder,
    mamba,
    mixed_shards,
    moved_special,
    of_type,
    other_merges,
    own_code,
    quantized,
    rewritten,
    student,
    teacher,
    two_files,
    with_fields,
    with_file,
    written,
)
from tests.tiny import SPECIAL, VOCABULARY

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
    "an index that Git LFS has not fetched": (
        with_file("model.safetensors.index.json", POINTER, lost="model.safetensors"),
        ["model.safetensors.index.json is a Git LFS pointer"],
    ),
    "an index of numbers": (
        with_file("model.safetensors.index.json", '{"weight_map": {"a": 1}}', lost="model.safetensors"),
        ["model.safetensors.index.json is not an index of safetensors files (TypeError)"],
    ),
    "an unused index of numbers": (
        with_file("model.safetensors.index.json", '{"weight_map": {"a": 1, "b": "c"}}'),
        ["model.safetensors.index.json is not an index of safetensors files (TypeError)"],
    ),
    "shards of two saves": (mixed_shards, ["model-2.safetensors holds weights that another", ": model.norm.weight; "]),
    "weights whose blob is gone": (
        dangling("model.safetensors"),
        ["model.safetensors links to ../../blobs/4d7a21, which is not there; fetch the model again"],
    ),
    "a configuration whose blob is gone": (dangling("config.json"), ["config.json links to ../../blobs/4d7a21"]),
    "a tokenizer whose blob is gone": (dangling("tokenizer.json"), ["tokenizer.json links to ../../blobs/4d7a21"]),
    "a settings file of a tokenizer that was cut off": (
        with_file("tokenizer_config.json", '{"eos_token":'),
        ["cannot read", "tokenizer_config.json as JSON"],
    ),
    # -- quantized weights
    "integers without a quantization_config": (
        rewritten(lambda tensor: tensor.char()),
        ["are integers, as quantized ones are, but its config.json has no quantization_config: lm_head.weight, "],
    ),
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
    "a NaN": (with_fields("config.json", rms_norm_eps=float("nan")), ["config.json as JSON: a value is NaN"]),
    "nested without end": (with_file("config.json", "[" * 100_000), ["config.json as JSON: maximum recursion depth"]),
    "an auto_map that is none": (
        with_fields("config.json", auto_map="AutoConfig"),
        ["auto_map in", "is not a JSON object; correct it, or take it out"],
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
    "no token for unknown words": (
        with_fields(
            "tokenizer.json",
            model={
                "type": "WordLevel",
                "vocab": {**dict(zip(SPECIAL, range(4), strict=True)), "a": 4},
                "unk_token": "?",
            },
            decoder=None,
        ),
        ["has no usable tokenizer: WordLevel error: Missing [UNK] token from the vocabulary"],
    ),
    "a length that is no number": (
        with_fields("tokenizer_config.json", model_max_length="long"),
        ["has no usable tokenizer: '>' not supported between"],
    ),
    "a vocabulary for a library that is not installed": (
        with_file("tokenizer.model", b"\n\5hello", lost="tokenizer.json"),
        ["has no usable tokenizer: ", "save_pretrained of AutoTokenizer writes a tokenizer.json"],
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
    "a name that no file can have": (lambda _: [f"teacher.model=/{'a' * 300}"], ["cannot read /aaa", "too long; give"]),
    "a registered model before there is any": (
        lambda _: ["teacher.model=models:/demo-small@champion"],
        ["models:/demo-small@champion: not in the registry sqlite:///", ", which holds nothing yet"],
    ),
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
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    processes = {process.pid for process in psutil.Process().children(recursive=True)}
    code, out, err = run("check", str(spec), *(part for each in overrides for part in ("--set", each)))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [part for part in wanted if part not in err] == [], err
    assert not stillhouse_home.exists()
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= processes
