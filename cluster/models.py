"""Finds the model that a spec names and makes it a local directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError
from cluster.loading import read_config
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


def local_model(name: str, *, revision: str | None, tracking_uri: str, field: str) -> Path:
    """The local directory behind a path, a ``models:/`` URI or an ``hf://`` id.

    Only an ``hf://`` id reaches for the network's model hub, and only safetensors are fetched from there.

    Args:
        field: the spec's field that named the model, for the error.

    Raises:
        UserError: there is no such model; says what was looked for and what else is allowed.
    """
    if name.startswith("models:/"):
        return fetch_model(name, tracking_uri)
    if name.startswith("hf://"):
        return _from_hub(name.removeprefix("hf://"), revision, field)
    path = Path(name)
    if not (path / "config.json").is_file():
        what = "is not there" if not path.exists() else "holds no config.json"
        raise UserError(
            f"{field}: {name} {what}; give a directory with a Hugging Face model, models:/name@alias, or hf://org/name"
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{field}: {name} holds no .safetensors; other weight formats can run code when loaded")
    return path


def _from_hub(repo: str, revision: str | None, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{field}: cannot fetch hf://{repo} ({revision or 'default revision'}): {reason}") from None


def load_config(folder: Path, field: str, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration.

    Raises:
        UserError: not a causal language model that transformers knows, an adapter, or one whose trusted code lies in
            another repository.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (folder / "adapter_config.json").is_file():
        # transformers would load a base model from elsewhere where peft is installed, and drop the adapter elsewhere.
        raise UserError(
            f"{field}: {folder} holds an adapter (adapter_config.json); merge it into its base model and save that"
        )
    try:
        config = read_config(folder, trust_remote_code)
    except Exception as error:  # whatever goes wrong here is wrong with the file that was given
        raise UserError(f"{field}: cannot use {folder}/config.json: {_one_line(error)}") from None
    own_code = getattr(config, "auto_map", None) or {}
    elsewhere = [own_code[part] for part in ("AutoConfig", "AutoModelForCausalLM") if "--" in own_code.get(part, "")]
    if trust_remote_code and elsewhere:
        raise UserError(
            f"{field}: {folder} runs code of another repository ({elsewhere[0]}), which may change at any time; put "
            f"its .py files into the model's directory and drop the repository from auto_map in config.json"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    ):
        raise UserError(f"{field}: {folder} is a {config.model_type} model, not a causal language model")
    return config


def load_tokenizer(folder: Path, field: str) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: the directory holds none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise UserError(f"{field}: {folder} has no usable tokenizer: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
