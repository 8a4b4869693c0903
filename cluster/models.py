"""Finds the model that a spec names and makes it a local directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.heads import probe_config
from cluster.registry import fetch_model


@dataclass(frozen=True)
class TeacherModel:
    """The teacher as its shards and its students must know it.

    Attributes:
        folder: its local directory.
        vocabulary: the tokenizer's real size; padded model vocabularies are cut to it.
        fingerprint, tokenizer: 16 hex digits each, which every label block carries.
    """

    folder: str
    vocabulary: int
    fingerprint: str
    tokenizer: str


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
        UserError: not a causal language model that transformers knows, or one that :func:`probe_config` refuses.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever goes wrong here is wrong with the file that was given
        raise UserError(f"{field}: cannot use {folder}/config.json: {_one_line(error)}") from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    ):
        raise UserError(f"{field}: {folder} is a {config.model_type} model, not a causal language model")
    probe_config(config, f"{field}: {folder}", trust_remote_code)
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


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits over the mapping of tokens to ids and the way text is split into them."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    # Padding and truncation are settings of a call, not of the vocabulary; chat templates never touch ids.
    for setting in ("padding", "truncation"):
        rules.pop(setting, None)
    text = json.dumps([sorted(tokenizer.get_vocab().items()), rules], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_fingerprint(folder: Path) -> str:
    """16 hex digits over the weight files' sizes and headers and the configuration: which model this is.

    Reads the header and the first and last megabyte of each file, not every byte of a 140 GB teacher.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    edge = 1 << 20
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(edge))
            file.seek(max(0, size - edge))
            digest.update(file.read(edge))
    return digest.hexdigest()[:16]
