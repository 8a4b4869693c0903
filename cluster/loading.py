"""Loads causal language models, and refuses a checkpoint that does not give every weight of the model.

``from_pretrained`` fills what a checkpoint lacks with random numbers and drops what it does not know, with no more
than a log line. Everything in this project that needs weights calls :func:`load_model`, which raises instead.
:func:`check_weights` finds the same faults from the headers of the files alone, without reading any weight.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import UserError

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
# Constants that older versions of transformers saved with the weights: causal masks and rotary tables. Each model
# class lists some of them in _keys_to_ignore_on_load_unexpected, but not, for example, GPT-J and CodeGen.
_CONSTANT = re.compile(
    r"\.(attn|attention)\.(masked_bias|bias|causal_mask)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
)
_NAMED = 3


def read_config(folder: str | Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """The transformers configuration of a model directory.

    A ``pad_token_id`` outside the embedding is dropped: ``nn.Embedding`` cannot be built with it, and neither the
    teacher nor a student is ever given a padded batch.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
            part.pad_token_id = None
    return config


def load_model(folder: str | Path, *, dtype: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """The causal language model of a local directory, in evaluation mode.

    Args:
        dtype: precision of the weights, as a torch dtype or its name.
        trust_remote_code: run Python that comes with the model.
        options: further arguments of ``from_pretrained``, such as ``device_map``, ``distributed_config`` or
            ``gguf_file``.

    Raises:
        UserError: the checkpoint lacks weights, holds others or has some in another shape; the message names them.
        OSError: the directory holds no safetensors (or GGUF) file.
    """
    from transformers import AutoModelForCausalLM

    source = {"gguf_file": options["gguf_file"]} if "gguf_file" in options else {}
    config = read_config(folder, trust_remote_code, **source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=not source,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            **options,
        )
    except RuntimeError:
        # Weights that are stacked at loading, such as those of experts, do not fit together. The check names them.
        if not source:
            check_weights(folder, config, "model", trust_remote_code)
        raise
    if problem := _problem(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]):
        raise UserError(f"{folder}: the weights do not fit config.json: {problem}")
    if model.config.tie_word_embeddings and not _is_tied(model):
        # The checkpoint holds a head of its own. transformers keeps it; a student's configuration must say so too.
        model.config.tie_word_embeddings = False
    return model


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def weight_files(folder: str | Path, config: Any, field: str) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads from a directory.

    Raises:
        UserError: there are none, the index cannot be read, or it names a file that is not there.
    """
    folder = Path(folder)
    named = getattr(config, "transformers_weights", None)
    names = [str(named)] if named else [SAFETENSORS, INDEX]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{field}: {folder} holds no {' or '.join(names)}; save the model with save_pretrained")
    if found.suffix == ".safetensors":
        return [found]
    files = indexed_files(found, field)
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{field}: {found.name} in {folder} names files that are not there: {_listed(absent)}")
    return [folder / file for file in files]


def indexed_files(index: Path, field: str) -> list[str]:
    """Names of the weight files in an index of safetensors files.

    Raises:
        UserError: it cannot be read, or is no such index.
    """
    refuse_pointer(index, field)
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(isinstance(file, str) for file in files):
            raise TypeError
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{field}: {index} is not an index of safetensors files ({type(error).__name__}); copy or save the model "
            f"again"
        ) from None
    return files


def refuse_pointer(path: Path, field: str) -> None:
    """Raise a UserError where a file cannot be read, or is what Git LFS leaves in its place until it is pulled."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"{field}: cannot read {path}: {error.strerror}") from None
    if start == _LFS_POINTER:
        raise UserError(
            f"{field}: {path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
        )


def _header(path: Path, field: str) -> dict[str, Any]:
    """Name and shape of every tensor in a safetensors file, as tensors on the meta device.

    Raises:
        UserError: the file is a Git LFS pointer, or is damaged or cut off.
    """
    from safetensors import SafetensorError
    from transformers.modeling_utils import load_state_dict

    refuse_pointer(path, field)
    try:
        return load_state_dict(path, map_location="meta")
    except (SafetensorError, ValueError) as error:  # the latter: no bytes at all, or an unknown dtype
        raise UserError(
            f"{field}: {path} ({path.stat().st_size} bytes) is damaged or was not copied whole: "
            f"{' '.join(str(error).split())}"
        ) from None


def check_weights(folder: str | Path, config: Any, field: str, trust_remote_code: bool = False) -> None:
    """Compare the names and shapes in a directory's weight files with its model; no weight is read.

    The model is built on the meta device and goes through transformers' own loading, so weights that are renamed,
    stacked or split at loading are known. Of a quantised model only the files themselves are checked: its quantiser
    decides the names at loading, where :func:`load_model` compares them.

    Args:
        config: as :func:`read_config` returns it.
        field: the spec's field that named the model, for the error.

    Raises:
        UserError: names what is missing, unexpected, there twice, quantized or of another shape, or the file that is
            absent or damaged.
    """
    state: dict[str, Any] = {}
    for path in weight_files(folder, config, field):
        tensors = _header(path, field)
        if twice := state.keys() & tensors.keys():
            raise UserError(
                f"{field}: {path} holds weights that another file of its index holds too: {_listed(twice)}; which of "
                f"them counts cannot be told, so copy or save the model again"
            )
        state.update(tensors)
    if getattr(config, "quantization_config", None) is not None:
        return
    skeleton = meta_model(config, field, trust_remote_code)
    floats = {name for name, tensor in skeleton.state_dict().items() if tensor.is_floating_point()}
    # from_pretrained would take the integers for the weights themselves, without their scales.
    if integers := [name for name in floats & state.keys() if not state[name].is_floating_point()]:
        raise UserError(
            f"{field}: the weights in {folder} are integers, as quantized ones are, but its config.json has no "
            f"quantization_config: {_listed(integers)}; give the model without quantization, or its config.json"
        )
    with quiet():
        try:
            _, info = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                device_map={"": "meta"},
                dtype=skeleton.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            problem = _problem(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        except RuntimeError as error:  # weights that are stacked at loading do not fit together
            problem = _unlike_saved(skeleton, state) or " ".join(str(error).split())
    if problem:
        raise UserError(f"{field}: the weights in {folder} do not fit its config.json: {problem}")


def meta_model(config: Any, field: str, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device: names and shapes without memory.

    Raises:
        UserError: the model cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # model classes raise whatever their layers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{field}: cannot build a {config.model_type} model from this configuration: {reason}"
        ) from None


def _unlike_saved(skeleton: Any, state: Mapping[str, Any]) -> str | None:
    """How a checkpoint differs from what ``save_pretrained`` would write of the model."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = skeleton.all_tied_weights_keys
    own = {name: tensor for name, tensor in skeleton.state_dict().items() if name not in tied}
    saved = revert_weight_conversion(skeleton, own)
    mismatched = [
        (name, tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in saved.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return _problem(saved.keys() - state.keys(), state.keys() - saved.keys() - tied.keys(), mismatched)


def _problem(
    missing: Collection[str], unexpected: Collection[str], mismatched: Iterable[tuple[str, Any, Any]]
) -> str | None:
    """What is wrong with a checkpoint in one line; None where nothing is."""
    unknown = [name for name in unexpected if not _CONSTANT.search(name)]
    shapes = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in mismatched]
    parts = (("missing", missing), ("not part of the model", unknown), ("of another shape", shapes))
    return "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names) or None


def _listed(names: Collection[str]) -> str:
    """The first few names in natural order, and how many more there are."""
    order = sorted(names, key=lambda name: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)])
    more = f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
    return ", ".join(order[:_NAMED]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing its own table and progress bar of a load whose result is reported here."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level, bar = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()
