"""Finds and opens the files that a corpus names, on a local disk or in a bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePath

import pyarrow as pa
from pyarrow import fs

from cluster.errors import UserError

SUFFIXES = (".jsonl", ".parquet", ".txt")


def filesystem_of(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem behind a path, and the path inside it.

    ``s3://`` uses the standard AWS variables; ``AWS_ENDPOINT_URL`` names another S3-compatible server.
    """
    if not path.startswith("s3://"):
        return fs.LocalFileSystem(), path
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(endpoint_override=endpoint), path.removeprefix("s3://")


def _check_readable(filesystem: fs.FileSystem, inner: str, path: str) -> None:
    try:
        with filesystem.open_input_stream(inner) as stream:
            if not stream.read(1):
                raise UserError(f"corpus.paths: {path} is empty")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"corpus.paths: cannot read {path}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error).splitlines()[0]


def find_files(paths: Sequence[str]) -> dict[str, list[str]]:
    """The files behind ``corpus.paths``, by suffix, each list in the paths' order and sorted within a folder.

    Raises:
        UserError: a path that is not there, cannot be read, or holds no file of a known kind.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        try:
            filesystem, inner = filesystem_of(path)
            info = filesystem.get_file_info(inner)
            if info.type == fs.FileType.NotFound:
                raise UserError(f"corpus.paths: {path} is not there; give files or folders of {', '.join(SUFFIXES)}")
            inners = [inner]
            if info.type == fs.FileType.Directory:
                listing = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
                inners = sorted(i.path for i in listing if i.is_file and i.path.endswith(SUFFIXES))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"corpus.paths: cannot read {path}: {_reason(error)}") from None
        inners = [i for i in inners if i.endswith(SUFFIXES)]
        if not inners:
            raise UserError(f"corpus.paths: {path} holds no file that ends in {', '.join(SUFFIXES)}")
        scheme = "s3://" if path.startswith("s3://") else ""
        for each in inners:
            _check_readable(filesystem, each, scheme + each)
            found.setdefault(PurePath(each).suffix, []).append(scheme + each)
    return found
