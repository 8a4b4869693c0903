"""Reads the beginning of every file of a corpus, so that one that cannot be used is refused before anything starts."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.corpus.files import (
    EMPTY,
    S3,
    CorpusFiles,
    filesystems_of,
    select_files,
    skipped_line,
    unusable_reasons,
)
from cluster.corpus.read import LONGEST, TEXT, TextReader
from cluster.corpus.tokens import begin_token
from cluster.corpus.unusable import Unusable
from cluster.errors import UserError
from cluster.spec import CorpusSpec

# Bytes to read from all files together, and at least from each. A smaller file is read whole.
SAMPLE, LEAST = 32 * 1024**2, 64 * 1024
# Bytes to read from all files together before one is left in doubt.
SEARCH = 256 * 1024**2
# Files that are read at a time: in a bucket each takes a round trip.
READS = 16


def check_corpus(spec: CorpusSpec, tokenizer: Any, vocabulary: int) -> list[str]:
    """Check the files of a corpus and its begin token; returns what a person should know of them, a line each.

    Args:
        vocabulary: tokens that the models have.

    Raises:
        UserError: see :func:`check_files`; or a begin token that the tokenizer or the models do not have.
    """
    where, begin = begin_token(spec.bos, tokenizer)
    if begin is not None and begin >= vocabulary:
        raise UserError(
            f"corpus.bos: the begin token (BOS) of the teacher's tokenizer has the id {begin}; ids must be below "
            f"{vocabulary}, the teacher's vocabulary; use never"
        )
    declared = ", as the tokenizer declares" if spec.bos is None else ""
    begins = [] if begin is None else [f"a begin token (BOS) in front of each {where}{declared}"]
    return check_files(spec)[1] + begins


def check_files(spec: CorpusSpec) -> tuple[CorpusFiles, list[str]]:
    """Select the files behind ``corpus.paths`` and read a sample of rows from each.

    Returns:
        The files, and what a person should know of them, a line each.

    Raises:
        UserError: see :func:`~cluster.corpus.files.select_files`; a file that
            :class:`~cluster.corpus.read.TextReader` refuses; no text at all; or too many rows that cannot be used, see
            :meth:`~cluster.corpus.unusable.Unusable.refuse`.
    """
    try:
        found = select_files(spec.paths)
    except UserError as error:
        if spec.upload:
            raise
        raise UserError(
            f"{error}; with corpus.upload: false these are paths on the cluster, so check them there"
        ) from None
    filesystems = filesystems_of(found.files)
    limits = [max(LEAST, size // len(found.files)) for size in (SAMPLE, SEARCH)]

    def read(path: str) -> tuple[TextReader, Unusable, int]:
        for limit in limits:
            reader = TextReader(path, filesystems[path.startswith(S3)], spec.text_field, limit)
            counted, texts = Unusable(), 0
            for table in reader:
                counted.add(table)
                texts += sum(bool(text and not text.isspace()) for text in table.column(TEXT).to_pylist())
            if not reader.doubt:
                break
        return reader, counted, texts

    total, whole, texts = Unusable(), True, 0
    parts: list[tuple[Unusable, float]] = []
    doubts: list[str] = []
    with ThreadPoolExecutor(READS) as threads:
        # In order, so that the first file that cannot be used is the one that is named.
        for path, (reader, counted, of_file) in zip(found.files, threads.map(read, found.files), strict=True):
            total.merge(counted)
            whole, texts = whole and reader.whole, texts + of_file
            if counted.rows and reader.share < 1:
                parts.append((counted, reader.share))
            if reader.doubt:
                doubts.append(
                    f"{path}: a run will refuse it unless a row after the first {counted.rows:,}, which were read, "
                    f"is different: {reader.doubt}"
                )
            elif not (reader.whole or counted.rows):
                doubts.append(f"{path}: not checked, its first row is longer than {LONGEST / 1024**2:g} MiB")
    total.refuse(spec.max_bad_share, spec.text_field, parts)
    if whole and not texts:
        what = f"has no text in any of {total.rows:,} rows" if total.rows else "is empty"
        raise UserError(f"corpus.paths: {', '.join(spec.paths)} {what}; give files with text")
    skipped = Counter(found.skipped) + Counter({EMPTY: total.empty_files})
    lines = [line for line in [skipped_line(skipped)] if line]
    bad, rows = total.counts.total(), f"{total.rows:,}{'' if whole else ' sampled'} rows"
    if blank := total.rows - bad - texts:
        lines.append(f"{blank:,} of {rows} without text")
    if bad:
        reasons = unusable_reasons(total.counts, total.first)
        lines.append(f"{bad:,} of {rows} cannot be used, left out ({reasons})")
    return CorpusFiles(found.files, dict(skipped)), lines + doubts
