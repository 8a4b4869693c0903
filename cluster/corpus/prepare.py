"""Text to packed tokens: Ray Data reads and tokenises, this file shuffles documents and packs them."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.data.exceptions
import ray.exceptions

from cluster.corpus.batches import FACTS_FILE, STARTS_FILE, TOKENS_FILE, CorpusFacts, content_address
from cluster.corpus.files import SUFFIXES, filesystem_of, find_files
from cluster.errors import UserError
from cluster.spec import CorpusSpec

log = logging.getLogger(__name__)

# A refusal travels as data: of an exception in one of its functions Ray Data keeps the text and loses the cause.
_SCHEMA = pa.schema([("ids", pa.large_list(pa.int32())), ("refused", pa.string())])


@functools.cache
def _tokenizer(folder: str) -> Any:
    """One tokenizer per worker process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _tokenize(table: pa.Table, tokenizer_dir: str, field: str) -> pa.Table:
    """Text column to token ids, one row per document, with the end-of-text token behind each."""
    if "refused" in table.column_names and (reasons := table.column("refused").drop_null().to_pylist()):
        return _refuse(reasons[0])
    if field not in table.column_names:
        return _refuse(f"corpus.text_field: {field!r} is not there; the rows have {', '.join(table.column_names)}")
    values = table.column(field).to_pylist()
    if any(not isinstance(value, str | None) for value in values):
        return _refuse(f"corpus.text_field: {field!r} holds {table.column(field).type}, not text")
    tokenizer = _tokenizer(tokenizer_dir)
    texts = [text for text in values if text and text.strip()]
    # Special tokens off: a sequence start in the middle of a packed row would be noise.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return pa.Table.from_pydict({"ids": [row + end for row in ids], "refused": [None] * len(ids)}, schema=_SCHEMA)


def _refuse(reason: str) -> pa.Table:
    return pa.Table.from_pydict({"ids": [[]], "refused": [reason]}, schema=_SCHEMA)


def _text_of_file(row: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": row["bytes"].decode("utf-8"), "refused": None}
    except UnicodeDecodeError as error:
        where = f"{row['path']} is not UTF-8 text: byte {error.start} cannot be decoded"
        return {"text": None, "refused": f"corpus.paths: {where}"}


def _read(suffix: str, files: list[str]) -> ray.data.Dataset:
    """One dataset over files of one kind in one place."""
    filesystem, _ = filesystem_of(files[0])
    inner = [filesystem_of(path)[1] for path in files]
    if suffix == ".txt":
        return ray.data.read_binary_files(inner, include_paths=True, filesystem=filesystem).map(_text_of_file)
    reader = ray.data.read_parquet if suffix == ".parquet" else ray.data.read_json
    return reader(inner, filesystem=filesystem)


def _documents(spec: CorpusSpec, tokenizer_dir: str) -> Iterator[np.ndarray]:
    """Token ids of every document, in the order of files and rows."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for suffix, files in find_files(spec.paths).items():
        for path in files:
            groups.setdefault((suffix, path.startswith("s3://")), []).append(path)
    for (suffix, _), files in groups.items():
        tokenized = _read(suffix, files).map_batches(
            _tokenize,
            fn_args=(tokenizer_dir, "text" if suffix == ".txt" else spec.text_field),
            batch_format="pyarrow",
            batch_size=256,
            num_cpus=0.5,
        )
        for table in tokenized.iter_batches(batch_format="pyarrow", batch_size=None):
            for reason in table.column("refused").drop_null().to_pylist():
                raise UserError(reason)
            column = table.column("ids").combine_chunks()
            values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
            for start, stop in itertools.pairwise(offsets):
                yield values[start:stop]


def prepare_corpus(spec: CorpusSpec, tokenizer_dir: str, folder: Path, cpus: float = math.inf) -> CorpusFacts:
    """Read, tokenise, shuffle by the seed and pack a corpus into ``folder``.

    Documents are laid end to end in an order that the seed decides and cut into sequences; the last partial one is
    dropped. Where each document starts is kept beside the tokens.

    Args:
        folder: of a run; that of a resumed one holds what it has begun with.
        cpus: that reading may take at a time; less than one is taken as one, which is what one file needs.

    Raises:
        UserError: the corpus cannot be read, has no text, too little for one sequence, or is not what it was.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=max(1.0, cpus))
    context.enable_progress_bars = False
    folder.mkdir(parents=True, exist_ok=True)
    try:
        documents = list(_documents(spec, tokenizer_dir))
    except (ray.exceptions.RayTaskError, ray.data.exceptions.UserCodeException, ValueError) as error:
        log.exception("the corpus cannot be read")
        cause = getattr(error, "cause", None) or error
        raise UserError(
            f"corpus.paths: cannot be read as {', '.join(SUFFIXES)}: {str(cause).splitlines()[0]}"
        ) from None
    tokens = sum(len(d) for d in documents)
    sequences = tokens // spec.sequence_length
    if sequences == 0:
        raise UserError(
            f"corpus: {len(documents)} documents in {', '.join(spec.paths)} give {tokens} tokens, too few for one "
            f"sequence of {spec.sequence_length}"
        )
    order = np.random.default_rng(spec.seed).permutation(len(documents))
    flat = np.concatenate([documents[i] for i in order])[: sequences * spec.sequence_length]
    packed_NS = flat.reshape(sequences, spec.sequence_length).astype(np.int32, copy=False)
    starts = np.zeros(tokens + 1, dtype=np.bool_)
    starts[np.cumsum([0, *(len(documents[i]) for i in order)])] = True
    starts_NS = starts[: flat.size].reshape(packed_NS.shape)
    facts = CorpusFacts(len(documents), flat.size, sequences, content_address(packed_NS, starts_NS))
    if (folder / FACTS_FILE).exists() and (before := CorpusFacts.read(folder)) != facts:
        raise UserError(
            f"corpus.paths: the text is not what the run was started with: {before.documents} documents and "
            f"{before.tokens} tokens then, {facts.documents} and {facts.tokens} now, address {before.address[:8]} and "
            f"{facts.address[:8]}; put it back, or start a new run without --resume"
        )
    for name, column in ((TOKENS_FILE, packed_NS), (STARTS_FILE, starts_NS)):
        aside = folder / f".{name}.part.npy"
        np.save(aside, column)
        aside.replace(folder / name)
    facts.write(folder)
    return facts
