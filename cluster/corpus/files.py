"""Selects the files that a corpus names: files, folders and globs, on a local disk or in a bucket.

Needs no more than the base installation for local paths, so `submit` packs on a laptop what a run would read there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import UserError

S3 = "s3://"
# Suffixes of text files, which may be compressed; parquet compresses its own columns.
TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
PARQUET = ".parquet"
# Suffix of a compressed file, and the name of its codec.
CODECS = {".gz": "gzip", ".zst": "zstd"}
ALLOWED = ".jsonl, .json, .txt (each also with .gz or .zst) or .parquet"
# Reasons for which a file of a folder or a glob is not read, beside its suffix.
HIDDEN, EMPTY, BROKEN_LINK, REPEATED = "hidden", "empty", "broken link", "named twice"


def format_of(path: str) -> tuple[str, str | None] | None:
    """A file's format by its name: the suffix without that of the compression, and the codec; None if unknown."""
    name = PurePosixPath(path.lower())
    codec = CODECS.get(name.suffix)
    suffix = PurePosixPath(name.stem).suffix if codec else name.suffix
    return (suffix, codec) if suffix in TEXT_SUFFIXES or (suffix == PARQUET and codec is None) else None


@dataclass(frozen=True)
class CorpusFiles:
    """The files that a corpus consists of.

    Attributes:
        files: in the order of ``corpus.paths``, sorted within a folder or a glob; each file once.
        skipped: number of files that folders, globs and repeated paths name and that are not read, per reason: a
            suffix, or one of ``hidden``, ``empty``, ``broken link`` and ``named twice``.
    """

    files: list[str]
    skipped: dict[str, int] = field(default_factory=dict)


def skipped_line(skipped: dict[str, int]) -> str | None:
    """What was skipped in one line, such as ``skipped: 3 files (.csv: 2, hidden: 1)``; None when nothing was."""
    total = sum(skipped.values())
    return f"skipped: {total} file{'s' * (total != 1)} ({_counts(skipped)})" if total else None


def unusable_reasons(counts: dict[str, int], first: dict[str, str]) -> str:
    """The reasons with their numbers and places, such as ``not JSON: 2, first at a.jsonl:7``."""
    by_number = sorted(counts, key=lambda reason: -counts[reason])
    return "; ".join(f"{reason}: {counts[reason]:,}, first at {first[reason]}" for reason in by_number)


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))


def _bucket_filesystem() -> Any:
    """The standard AWS variables apply; ``AWS_ENDPOINT_URL`` names another S3-compatible server."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(endpoint_override=endpoint)


def filesystems_of(files: Sequence[str]) -> dict[bool, Any]:
    """The pyarrow filesystems that some files lie on: that of S3 under True, the local one under False."""
    from pyarrow import fs

    remote = {path.startswith(S3) for path in files}
    return {each: _bucket_filesystem() if each else fs.LocalFileSystem() for each in remote}


def _read_errors(path: str) -> tuple[type[BaseException], ...]:
    """What reading or listing a path may raise."""
    if not path.startswith(S3):
        return (OSError,)
    from pyarrow import ArrowException

    return (OSError, ArrowException)


def error_reason(error: BaseException) -> str:
    """An error of a file system in one line."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else (str(error).splitlines() or [type(error).__name__])[0]


class _Local:
    """The local disk, without pyarrow."""

    def kind(self, path: str) -> str | None:
        """``file``, ``folder``, or None for what is not there."""
        if Path(path).is_dir():
            return "folder"
        return "file" if Path(path).exists() else None

    def walk(self, folder: str, recursive: bool) -> Iterator[tuple[str, int | None]]:
        """Every file below a folder with its size; None for a link to nowhere. Follows links, each folder once."""
        seen = {os.path.realpath(folder)}
        pending = [folder]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    # Not entry.is_dir(), which raises an error for a link to itself.
                    if not Path(entry.path).is_dir():
                        yield entry.path, entry.stat().st_size if Path(entry.path).exists() else None
                    elif recursive and (real := os.path.realpath(entry.path)) not in seen:
                        seen.add(real)
                        pending.append(entry.path)


class _Bucket:
    """Objects in S3; paths are ``s3://bucket/key``."""

    def __init__(self) -> None:
        self._fs = _bucket_filesystem()

    def kind(self, path: str) -> str | None:
        """``file``, ``folder``, or None for what is not there."""
        from pyarrow.fs import FileType

        found = self._fs.get_file_info(path.removeprefix(S3)).type
        return {FileType.File: "file", FileType.Directory: "folder"}.get(found)

    def walk(self, folder: str, recursive: bool) -> Iterator[tuple[str, int | None]]:
        """Every object below a prefix with its size."""
        from pyarrow.fs import FileSelector

        for info in self._fs.get_file_info(FileSelector(folder.removeprefix(S3), recursive=recursive)):
            if info.is_file:
                yield S3 + info.path, info.size


def is_glob(path: str) -> bool:
    """Whether a path has wildcards. An existing file or folder of that very name takes precedence."""
    return any(character in path for character in "*?[")


def _fixed_part(path: str) -> tuple[str, list[str]]:
    """The folder in front of a glob's first wildcard, and the components of the pattern behind it."""
    scheme, inner = (S3, path.removeprefix(S3)) if path.startswith(S3) else ("", path)
    # One that ends in a slash means folders, with all that is in them.
    parts = f"{inner}**".split("/") if inner.endswith("/") else inner.split("/")
    first = next(i for i, part in enumerate(parts) if is_glob(part))
    folder = "/".join(parts[:first])
    return scheme + (folder or ("/" if inner.startswith("/") else "" if scheme else ".")), parts[first:]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the components of a path match those of a glob; ``**`` stands for any number of them, also for none."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _why_skipped(parts: list[str], size: int | None, dots_wanted: bool) -> str | None:
    """Why a file of a folder or a glob is not read; None when it is."""
    if not dots_wanted and any(part.startswith(".") for part in parts):
        return HIDDEN
    if size is None:
        return BROKEN_LINK
    if format_of(parts[-1]) is None:
        return PurePosixPath(parts[-1]).suffix.lower() or "no suffix"
    return EMPTY if size == 0 else None


def _of_folder(tree: _Local | _Bucket, path: str, pattern: list[str] | None) -> CorpusFiles:
    """The files of a folder, or those of a glob's folder that match its pattern."""
    found: list[tuple[list[str], str]] = []
    skipped: Counter[str] = Counter()
    others: Counter[str] = Counter()
    # A component that begins with a dot in the pattern asks for hidden files.
    dots_wanted = pattern is not None and any(part.startswith(".") for part in pattern)
    base = path.rstrip("/") + "/" if path != S3 else S3
    for name, size in tree.walk(path, recursive=pattern is None or len(pattern) > 1 or "**" in pattern):
        parts = name.removeprefix(base).split("/")
        why = _why_skipped(parts, size, dots_wanted)
        if pattern is not None and not _matches(parts, pattern):
            others[why or PurePosixPath(name).suffix.lower()] += 1
        elif why is None:
            found.append((parts, name))
        else:
            skipped[why] += 1
    if not found:
        there = _counts(skipped + others) or "no files"
        raise UserError(
            f"corpus.paths: {path} holds no file that ends in {ALLOWED}; there are {there}"
            if pattern is None
            else f"corpus.paths: {base}{'/'.join(pattern)} matches no file that ends in {ALLOWED}; "
            f"{path} holds {there}; a glob of folders ends in a slash"
        )
    return CorpusFiles([name for _, name in sorted(found)], dict(skipped))


def _select(path: str, trees: dict[bool, _Local | _Bucket]) -> CorpusFiles:
    """The files behind one of ``corpus.paths``."""
    remote = path.startswith(S3)
    tree = trees.setdefault(remote, _Bucket() if remote else _Local())
    kind = tree.kind(path)
    if kind == "folder":
        return _of_folder(tree, path.rstrip("/") or "/", None)
    if kind == "file":
        if format_of(path) is None:
            raise UserError(f"corpus.paths: {path} is of an unknown kind; give files that end in {ALLOWED}")
        return CorpusFiles([path])
    if is_glob(path):
        folder, pattern = _fixed_part(path)
        if folder == S3 or is_glob(folder):
            raise UserError(f"corpus.paths: {path} has a wildcard in its bucket's name; name the bucket")
        if tree.kind(folder) == "folder":
            return _of_folder(tree, folder, pattern)
        raise UserError(f"corpus.paths: {path} matches nothing: {folder} is no folder")
    raise UserError(f"corpus.paths: {path} is not there; give files, folders or globs of {ALLOWED}, local or {S3}...")


def select_each(paths: Iterable[str]) -> Iterator[tuple[str, CorpusFiles]]:
    """Each of ``corpus.paths`` with its files. A file that an earlier path has named counts as skipped.

    Raises:
        UserError: a path that is not there, cannot be listed, is of an unknown kind, or gives no file.
    """
    trees: dict[bool, _Local | _Bucket] = {}
    seen: set[str] = set()
    for path in paths:
        try:
            found = _select(path, trees)
        except _read_errors(path) as error:
            raise UserError(f"corpus.paths: cannot read {path}: {error_reason(error)}") from None
        for name in found.files:
            if name.encode(errors="replace") != name.encode(errors="surrogateescape"):
                shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
                raise UserError(f"corpus.paths: the name of {shown} is not UTF-8; rename it, or leave it out by a glob")
        fresh = [name for name in found.files if name not in seen]
        seen.update(fresh)
        repeated = len(found.files) - len(fresh)
        yield path, CorpusFiles(fresh, found.skipped | ({REPEATED: repeated} if repeated else {}))


def select_files(paths: Sequence[str]) -> CorpusFiles:
    """The files behind all of ``corpus.paths``; reads none of them.

    Raises:
        UserError: see :func:`select_each`.
    """
    files: list[str] = []
    skipped: Counter[str] = Counter()
    for _, found in select_each(paths):
        files += found.files
        skipped.update(found.skipped)
    return CorpusFiles(files, dict(skipped))
