"""Finds the model that a spec names and makes it a local directory."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from cluster.loading import INDEX, quiet, read_config, refuse_pointer
from cluster.registry import fetch_model

# How a model keeps documents apart that are packed into one sequence: by their positions alone, by an explicit mask, or
# not at all, so that each sequence has to be one document. See cluster/packing.py.
Packing = Literal["exact", "masked", "unpacked"]


@dataclass(frozen=True)
class TeacherModel:
    """The teacher as its shards and its students must know it.

    Attributes:
        folder: its local directory.
        vocabulary: the tokenizer's real size; padded model vocabularies are cut to it.
        fingerprint, tokenizer: 16 hex digits each, which every label block carries; see :mod:`cluster.fingerprint`.
        packing: how it scores packed documents.
    """

    folder: str
    vocabulary: int
    fingerprint: str
    tokenizer: str
    packing: Packing = "unpacked"


def local_model(name: str, *, revision: str | None, tracking_uri: str, field: str, code: bool = False) -> Path:
    """The local directory behind a path, a ``models:/`` URI or an ``hf://`` id.

    Only an ``hf://`` id reaches for the network's model hub, and only safetensors are fetched from there.

    Args:
        field: the spec's field that named the model, for the error.
        code: fetch the ``.py`` files of an ``hf://`` model too, which ``trust_remote_code`` runs.

    Raises:
        UserError: there is no such model, or it is in another format; says what was found and what to do.
    """
    if name.startswith("models:/"):
        return fetch_model(name, tracking_uri)
    path = _from_hub(name.removeprefix("hf://"), revision, field, code) if name.startswith("hf://") else Path(name)
    try:
        _check_files(path, name, field)
    except OSError as error:
        raise UserError(f"{field}: cannot read {name}: {error.strerror}; give another path, or its rights") from None
    return path


def _check_files(path: Path, name: str, field: str) -> None:
    """Whether a local path is a directory with a model in a format that is loaded.

    Raises:
        UserError: it is not; names what it is and what to do.
        OSError: it cannot be looked at, such as for want of permissions.
    """
    if name.endswith(_GGUF) and path.is_file():
        raise UserError(f"{field}: {name} is a GGUF file; {_CONVERT_GGUF.format(folder=path.parent, file=path.name)}")
    weights = _weights_in(path)
    if not weights["safetensors"] and (gguf := weights["GGUF"]):
        raise UserError(f"{field}: {name} holds GGUF files; {_CONVERT_GGUF.format(folder=path, file=gguf[0])}")
    if (path / _ADAPTER).is_file():
        _refuse_adapter(path, field)
    needed = ("config.json", "*.safetensors", INDEX, *_VOCABULARIES)
    for file in sorted(path.glob("*")):
        # What is left in a cache of a hub whose blobs have been removed.
        if not file.exists() and any(map(file.match, needed)):
            raise UserError(f"{field}: {file} links to {file.readlink()}, which is not there; fetch the model again")
    if not (path / "config.json").is_file():
        what = "is not there" if not path.exists() else "holds no config.json"
        raise UserError(
            f"{field}: {name} {what}; give a directory with a Hugging Face model, models:/name@alias, or hf://org/name"
        )
    # An index without its files is reported with their names, by check_weights.
    if not weights["safetensors"] and not (path / INDEX).is_file():
        found = f" but {weights['other'][0]}" if weights["other"] else ""
        raise UserError(
            f"{field}: {name} holds no .safetensors{found}; other weight formats can run code when loaded. Load it "
            f"where you trust it and save it with save_pretrained"
        )


_GGUF, _ADAPTER = ".gguf", "adapter_config.json"
# Files that hold a vocabulary, by the names that tokenizers of transformers give them.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONVERT_GGUF = (
    "convert it to safetensors: load it with AutoModelForCausalLM and AutoTokenizer.from_pretrained('{folder}', "
    "gguf_file='{file}'), set model.hf_quantizer = None, delete model.config.quantization_config, and save_pretrained"
)


def _weights_in(folder: Path) -> dict[str, list[str]]:
    """Names of a folder's weight files by format."""
    formats = {"safetensors": ("*.safetensors",), "GGUF": (f"*{_GGUF}",), "other": ("*.bin", "*.pt", "*.pth", "*.h5")}
    return {
        name: sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        for name, patterns in formats.items()
    }


def _refuse_adapter(folder: Path, field: str) -> None:
    base = _read_object(folder / _ADAPTER, field).get("base_model_name_or_path") or "its base model"
    # transformers would load a base model from elsewhere where peft is installed, and drop the adapter elsewhere.
    raise UserError(
        f"{field}: {folder} holds an adapter ({_ADAPTER}); merge it into {base} with peft's merge_and_unload and give "
        f"the directory that save_pretrained writes"
    )


def _from_hub(repo: str, revision: str | None, field: str, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}: cannot fetch hf://{repo} ({revision or 'default revision'}): {reason}") from None


def load_config(
    folder: Path, field: str, trust_remote_code: bool = False, setting: str = "teacher.trust_remote_code"
) -> Any:
    """The model's transformers configuration.

    Args:
        setting: the spec's field that allows the model's own Python, for the error.

    Raises:
        UserError: not a causal language model that transformers knows, an adapter, one that needs Python of its own
            which is not allowed or not there, or one whose trusted code lies in another repository.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if (folder / _ADAPTER).is_file():
        _refuse_adapter(folder, field)
    tree = _read_object(folder / "config.json", field)
    if not isinstance(tree.get("auto_map") or {}, Mapping):
        raise UserError(f"{field}: auto_map in {folder}/config.json is not a JSON object; correct it, or take it out")
    kind, code = str(tree.get("model_type")), _own_code(tree)
    if trust_remote_code:
        _check_code(code, folder, field)
    elif needs_own_code(kind, tree):
        raise UserError(
            f"{field}: {folder} needs Python of its own ({', '.join(sorted(set(code.values())))} in auto_map of "
            f"config.json), which is not run by default; read it, then set {setting}: true"
        )
    if "AutoConfig" not in code and kind not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{field}: config.json in {folder} gives the model_type {kind}, which transformers {__version__} does "
            f"not know; upgrade transformers if the model is newer, or give another model"
        )
    try:
        with quiet():
            config = read_config(folder, trust_remote_code)
    except Exception as error:  # whatever goes wrong here is wrong with the file that was given
        raise UserError(f"{field}: cannot use {folder}/config.json: {_one_line(error)}") from None
    kind = config.model_type
    if kind not in CAUSAL and not (trust_remote_code and "AutoModelForCausalLM" in code):
        raise UserError(f"{field}: {folder} is a {kind} model, not a causal language model")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{field}: {folder} is a {kind} model with an encoder, not a causal language model")
    return config


def _read_object(path: Path, field: str) -> dict[str, Any]:
    """The JSON object in a file."""
    refuse_pointer(path, field)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{field}: cannot read {path} as JSON: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{field}: {path} is not a JSON object but a {type(tree).__name__}")
    return tree


def _constant(text: str) -> float:
    """What Python adds to JSON. An Infinity is meant, such as in Mamba 2's time_step_limit."""
    if text == "NaN":
        raise ValueError("a value is NaN")
    return float(text)


def _own_code(tree: Mapping[str, Any]) -> dict[str, str]:
    """The classes that a configuration file wants loaded from Python beside it, by transformers' own name of each."""
    classes = tree.get("auto_map") or {}
    return {part: str(classes[part]) for part in ("AutoConfig", "AutoModelForCausalLM") if part in classes}


def _check_code(code: Mapping[str, str], folder: Path, field: str) -> None:
    """Whether a model's own Python lies beside it, where its fingerprint covers it."""
    for name in code.values():
        if "--" in name:
            raise UserError(
                f"{field}: {folder} runs code of another repository ({name}), which may change at any time; put "
                f"its .py files into the model's directory and drop the repository from auto_map in config.json"
            )
        if not (folder / (file := f"{name.partition('.')[0]}.py")).is_file():
            raise UserError(
                f"{field}: auto_map in config.json of {folder} names {name}, but {file} is not there; copy the model's "
                f".py files beside its weights"
            )


def needs_own_code(kind: str, tree: Mapping[str, Any]) -> bool:
    """Whether a model cannot be built without Python that came with it: transformers has no class for its type.

    Args:
        kind: its model type.
        tree: its configuration.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    code = _own_code(tree)
    return bool(code) and (kind not in CONFIG_MAPPING_NAMES or ("AutoModelForCausalLM" in code and kind not in CAUSAL))


def quantization_of(config: Any) -> dict[str, Any] | None:
    """How a model's weights are quantized, as its configuration file gives it; None where they are not."""
    for part in (config, config.get_text_config(decoder=True)):
        if (given := getattr(part, "quantization_config", None)) is not None:
            return dict(given) if isinstance(given, Mapping) else dict(given.to_dict())
    return None


def check_quantization(config: Any, folder: Path, field: str, on_gpu: bool) -> None:
    """Ask a quantized model's quantizer whether it can load the weights with what is installed here.

    Args:
        on_gpu: the model will run on a GPU. This machine may have none, so what a quantizer requires of the hardware
            is left to the loading then.

    Raises:
        UserError: transformers does not know the method, its library is not installed, or it needs a GPU.
    """
    given = quantization_of(config)
    if given is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    method, advice = given.get("quant_method"), "or give the model without quantization"
    try:
        with quiet():
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(given), pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise UserError(
            f"{field}: {folder} is quantized with {method}, whose library is not installed here ({_one_line(error)}); "
            f"install it, {advice}"
        ) from None
    except RuntimeError as error:
        if not on_gpu:
            raise UserError(
                f"{field}: {folder} is quantized with {method}, which does not run on this CPU ({_one_line(error)}); "
                f"set gpus_per_shard, {advice}"
            ) from None
    except Exception as error:  # a quantizer raises anything for settings that it does not take
        raise UserError(
            f"{field}: cannot use the quantization_config in {folder}/config.json "
            f"({_one_line(error).partition(' - supported')[0]}); correct it, {advice}"
        ) from None


def load_tokenizer(folder: Path, field: str) -> Any:
    """The model's tokenizer. Python that comes with it is never run.

    Raises:
        UserError: the directory holds none that transformers can load.
    """
    from transformers import AutoTokenizer

    from cluster.corpus.tokens import UNKNOWN

    files = [path for pattern in _VOCABULARIES for path in sorted(folder.glob(pattern))]
    for path in files:
        refuse_pointer(path, field)
    if not files:  # transformers would make a tokenizer of nothing but special tokens
        raise UserError(f"{field}: {folder} has no usable tokenizer: it holds no tokenizer.json or other vocabulary")
    try:
        with quiet():
            # None would ask the terminal whether to run the tokenizer's own Python.
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer(UNKNOWN)  # some fail at the first text that they do not know
            return tokenizer
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                _read_object(folder / name, field)  # one that is no JSON is named
        reason = _one_line(error)
        if not (folder / "tokenizer.json").is_file():
            reason += "; where it loads, save_pretrained of AutoTokenizer writes a tokenizer.json, which always does"
        if "trust_remote_code" in str(error):
            reason = "it needs Python of its own, which is not run; give a model with a tokenizer.json"
        raise UserError(f"{field}: {folder} has no usable tokenizer: {reason}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
