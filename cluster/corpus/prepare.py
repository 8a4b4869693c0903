"""Text to sequences of tokens: Ray Data reads and tokenises, this file splits documents and lays them out."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import ray.data.exceptions
import ray.exceptions

from cluster.corpus.batches import (
    FACTS_FILE,
    LENGTHS_FILE,
    STARTS_FILE,
    TOKENS_FILE,
    CorpusFacts,
    content_address,
)
from cluster.corpus.files import EMPTY, S3, CorpusFiles, filesystems_of, select_files
from cluster.corpus.layout import Layout
from cluster.corpus.overlap import overlap
from cluster.corpus.read import PLACE, SCHEMA, TEXT, UNUSABLE, TextReader
from cluster.corpus.split import Split, repeats, split_documents
from cluster.corpus.tokens import Encoder, begin_token
from cluster.corpus.unusable import Unusable
from cluster.errors import UserError
from cluster.spec import CorpusSpec

log = logging.getLogger(__name__)

# A refusal travels as data: of an exception in one of its functions Ray Data keeps the text and loses the cause.
_REFUSED = "refused"
_TEXTS = SCHEMA.append(pa.field(_REFUSED, pa.string()))
_SCHEMA = pa.schema(
    [("ids", pa.large_list(pa.int32())), ("hash", pa.uint64()), ("spelled", pa.bool_()), *list(_TEXTS)[1:]]
)
# That one file's task asks for, where the family has as much.
FILE_CPUS = 0.5
# How far before the wanted place a long document's cut looks for a blank line, in tokens.
LINE_SEARCH = 512


@dataclass
class _Documents:
    """All tokenised documents, in the order of files and rows; rows that cannot be used or have no text are counted."""

    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    blank: int = 0
    spelled: int = 0
    unusable: Unusable = field(default_factory=Unusable)
    # Where the begin token goes, and its id where it is not in the documents yet.
    bos: str = "never"
    begin: int | None = None

    def add(self, table: pa.Table) -> None:
        """Take documents over from a table of ``_SCHEMA``."""
        column = table.column("ids").combine_chunks()
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        used_N = np.diff(offsets) > 0
        self.ids += [values[a:b] for (a, b), used in zip(itertools.pairwise(offsets), used_N, strict=True) if used]
        self.hashes.append(table.column("hash").to_numpy()[used_N])
        self.blank += int((~used_N).sum()) - (len(table) - table.column(UNUSABLE).null_count)
        self.unusable.add(table)
        self.spelled += int(table.column("spelled").to_numpy().sum())


@functools.cache
def _tokenizer(folder: str) -> Any:
    """One tokenizer per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@functools.cache
def _encoder(folder: str, control: bool) -> Encoder:
    return Encoder(_tokenizer(folder), control)


def _read(table: pa.Table, filesystems: dict[bool, Any], text_field: str) -> Iterator[pa.Table]:
    """Texts of the files that a table names."""
    for path in table.column("path").to_pylist():
        try:
            for texts in TextReader(path, filesystems[path.startswith(S3)], text_field):
                yield texts.append_column(_TEXTS.field(_REFUSED), pa.nulls(len(texts), pa.string()))
        except UserError as error:
            yield pa.Table.from_pylist([{_REFUSED: str(error)}], schema=_TEXTS)
            return


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _tokenize(table: pa.Table, tokenizer_dir: str, control: bool, begin: int | None) -> pa.Table:
    """Token ids of each text, with the begin and the end token around; none for one without text."""
    if reasons := table.column(_REFUSED).drop_null().to_pylist():
        return _refuse(reasons[0])
    texts = [text for text in table.column(TEXT).to_pylist() if text and text.strip()]
    encoder, eos = _encoder(tokenizer_dir, control), _tokenizer(tokenizer_dir).eos_token_id
    try:
        encoded = encoder(texts)
    except UserError as error:
        return _refuse(str(error))
    end = [] if eos is None else [eos]
    # With corpus.special_tokens: control a text may begin with it by itself.
    front: list[list[int]] = [[] if begin is None or ids[:1] == [begin] else [begin] for ids in encoded]
    rest = len(table) - len(texts)
    # Unusable rows are among the rest; their places tell which rows they were.
    unusable = [table.column(name).drop_null().to_pylist() for name in (UNUSABLE, PLACE)]
    usable: list[None] = [None] * (len(table) - len(unusable[0]))
    columns = {
        "ids": [first + ids + end for first, ids in zip(front, encoded, strict=True)] + [[]] * rest,
        "hash": [*map(_text_hash, texts), *[0] * rest],
        "spelled": [*map(encoder.spells_special, texts), *[False] * rest],
        UNUSABLE: usable + unusable[0],
        PLACE: usable + unusable[1],
        _REFUSED: [None] * len(table),
    }
    return pa.Table.from_pydict(columns, schema=_SCHEMA)


def _refuse(reason: str) -> pa.Table:
    return pa.Table.from_pylist([{"ids": [], "hash": 0, "spelled": False, _REFUSED: reason}], schema=_SCHEMA)


def _documents(spec: CorpusSpec, files: CorpusFiles, tokenizer_dir: str, file_cpus: float) -> _Documents:
    """Read and tokenise all files.

    Args:
        file_cpus: what the task of one file asks for.

    Raises:
        UserError: a file is refused, more rows than ``corpus.max_bad_share`` are, or there is no token to begin with.
    """
    bos, begin = begin_token(spec.bos, _tokenizer(tokenizer_dir))
    # A block per file, so that files are read in parallel. Ray runs both steps in one task, so a file's text is never
    # whole in memory; the tokenizer has threads of its own for the documents of a batch.
    paths = ray.data.from_items([{"path": path} for path in files.files], override_num_blocks=len(files.files))
    texts = paths.map_batches(
        _read,
        fn_args=(filesystems_of(files.files), spec.text_field),
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=file_cpus,
    )
    tokenized = texts.map_batches(
        _tokenize,
        fn_args=(tokenizer_dir, spec.special_tokens == "control", begin if bos == "document" else None),
        batch_format="pyarrow",
        batch_size=256,
        num_cpus=file_cpus,
    )
    found = _Documents(bos=bos, begin=begin if bos == "sequence" else None)
    for table in tokenized.iter_batches(batch_format="pyarrow", batch_size=None):
        for reason in table.column(_REFUSED).drop_null().to_pylist():
            raise UserError(reason)
        found.add(table)
    found.unusable.refuse(spec.max_bad_share, spec.text_field)
    return found


def _line_end_before(ids: npt.NDArray[np.int32], at: int, tokenizer_dir: str) -> int:
    """The last token at or before ``at`` that follows a blank line; else the end of a line; else ``at``."""
    tokenizer, line_end = _tokenizer(tokenizer_dir), at
    # Not so far that much more than was asked for lies behind it.
    reach = min(LINE_SEARCH, (len(ids) - at) // 4)
    for place in range(at, max(1, at - reach), -1):
        last, both = (tokenizer.decode(ids[first:place].tolist()) for first in (place - 1, place - 2))
        if "\n" in last and "\n\n" in both:
            return place
        if "\n" in last and line_end == at:
            line_end = place
    return line_end


def _spans(spec: CorpusSpec, documents: _Documents, pack: bool, tokenizer_dir: str) -> tuple[Split, int]:
    """The spans on either side of the cut, each in an order that the seed decides; and how many texts are repeats."""
    hashes_N = np.concatenate(documents.hashes)
    repeated_N = repeats(hashes_N, documents.ids)
    if spec.deduplicate == "exact":
        documents.ids = [ids for ids, repeated in zip(documents.ids, repeated_N, strict=True) if not repeated]
        hashes_N = hashes_N[~repeated_N]
    lengths_N = np.array([len(ids) for ids in documents.ids], dtype=np.int64)
    tokens, length = int(lengths_N.sum()), spec.sequence_length - (documents.begin is not None)
    # Packed, as many whole sequences as the share says, and at least one.
    wanted = max(1, round(tokens // length * spec.held_out)) * length if pack else max(1, round(tokens * spec.held_out))
    split = split_documents(
        hashes_N,
        lengths_N,
        wanted,
        lambda document, at: _line_end_before(documents.ids[document], at, tokenizer_dir),
        least=length,
    )
    dice = np.random.default_rng(spec.seed)
    sides = [side[dice.permutation(len(side))] for side in (split.train_P3, split.held_out_P3)]
    return Split(sides[0], sides[1], split.cut), int(repeated_N.sum())


def prepare_corpus(
    spec: CorpusSpec,
    tokenizer_dir: str,
    folder: Path,
    cpus: float = math.inf,
    pack: bool = True,
    place: float = FILE_CPUS,
) -> CorpusFacts:
    """Read, tokenise, split and lay out a corpus in ``folder``.

    Documents are held out as :func:`~cluster.corpus.split.split_documents` says. Those of either side are laid out on
    their own, in an order that the seed decides, the held-out sequences last.

    Args:
        folder: of a run; that of a resumed one holds what it has begun with.
        cpus: that reading may take at a time; Ray Data does not begin with less than one.
        place: CPUs that the family has for certain. A task that asks for more would wait without end on a cluster whose
            other CPUs are held, such as by an endpoint.
        pack: lay documents end to end; otherwise each sequence has one document or a piece of one, and padding.

    Raises:
        UserError: the corpus cannot be read, has no text, too little for one sequence, or is not what it was.
    """
    before = CorpusFacts.read(folder) if (folder / FACTS_FILE).exists() else None
    if before is not None and before.held_out is None:
        log.warning("the run was begun with text that was split by sequence; it keeps that text, unread")
        return before
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=max(1.0, cpus))
    context.enable_progress_bars = False
    folder.mkdir(parents=True, exist_ok=True)
    files = select_files(spec.paths)
    try:
        documents = _documents(spec, files, tokenizer_dir, min(FILE_CPUS, place or FILE_CPUS))
    except (ray.exceptions.RayTaskError, ray.data.exceptions.UserCodeException) as error:
        log.exception("the corpus cannot be read")
        cause = getattr(error, "cause", None) or error
        raise UserError(f"corpus.paths: cannot be read: {str(cause).splitlines()[0]}") from None
    skipped = dict(Counter(files.skipped) + Counter({EMPTY: documents.unusable.empty_files}))
    return _lay_out(spec, documents, skipped, tokenizer_dir, folder, pack, before)


def _lay_out(
    spec: CorpusSpec,
    documents: _Documents,
    skipped: dict[str, int],
    tokenizer_dir: str,
    folder: Path,
    pack: bool,
    before: CorpusFacts | None,
) -> CorpusFacts:
    """Split documents and write the sequences, what lies beside them, and the facts."""
    length, tokens = spec.sequence_length, sum(map(len, documents.ids))
    if tokens < (length if pack else 2):
        raise UserError(
            f"corpus: {len(documents.ids)} documents in {', '.join(spec.paths)} give {tokens} tokens, too few for one "
            f"sequence of {length}"
        )
    split, repeated = _spans(spec, documents, pack, tokenizer_dir)
    sides = (split.train_P3, split.held_out_P3)
    layout = Layout(documents.ids, length, pack, documents.begin)
    train, held_out = map(layout.sequences, sides)
    aside = folder / f".{TOKENS_FILE}.part.npy"
    with aside.open("wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": (train + held_out, length)}
        np.lib.format.write_array_header_1_0(file, header)
        beside = np.concatenate([layout.write(file, side) for side in sides])
    tokens_NS = np.load(aside, mmap_mode="r")
    kept = tokens_NS.size if pack else int(beside.sum())
    begins = 0 if documents.begin is None else len(tokens_NS)
    seen = overlap(tokens_NS[:train], tokens_NS[train:], layout.continued(beside[train:]))
    facts = CorpusFacts(
        documents=len(documents.ids),
        tokens=kept,
        sequences=len(tokens_NS),
        address=content_address(tokens_NS, beside, np.array([held_out])),
        held_out=held_out,
        held_out_documents=len(split.held_out_P3),
        cut_documents=split.cut,
        repeats=repeated,
        repeats_dropped=spec.deduplicate == "exact",
        blank=documents.blank,
        spelled=documents.spelled,
        dropped_tokens=int(sum((side[:, 2] - side[:, 1]).sum() for side in sides)) - kept + begins,
        packed=pack,
        pad_tokens=tokens_NS.size - kept,
        ngrams=seen.ngrams,
        ngrams_known=seen.known,
        held_out_seen=seen.seen,
        skipped=skipped,
        unusable=dict(documents.unusable.counts),
        first_unusable=documents.unusable.first,
        bos=documents.bos,
    )
    if before is not None and before.address != facts.address:
        aside.unlink()
        raise UserError(
            f"corpus.paths: the text is not what the run was started with: {_identity(before)} then, "
            f"{_identity(facts)} now; put it back, or start a new run without --resume"
        )
    aside_beside = folder / ".beside.part.npy"
    np.save(aside_beside, beside)
    aside_beside.replace(folder / (STARTS_FILE if pack else LENGTHS_FILE))
    aside.replace(folder / TOKENS_FILE)
    facts.write(folder)
    return facts


def _identity(facts: CorpusFacts) -> str:
    layout = "packed" if facts.packed else "padded"
    return f"{facts.documents} documents and {facts.tokens} tokens, {layout}, address {facts.address[:8]}"
