"""Where label objects lie: a folder or an S3 bucket, as opaque keys that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import RunError, UserError

PATIENCE_S = 300.0
"""How long a remote bucket that is away is asked again before a run gives up on it."""

# Not a name that a key can begin with, and on the same filesystem as the keys, so that a link is one step.
_ASIDE = ".aside"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Entry:
    """One object of a bucket.

    Attributes:
        size: bytes.
        modified: when it was written, in seconds since 1970 by the bucket's own clock.
    """

    key: str
    size: int
    modified: float


class Bucket(Protocol):
    """Keys and bytes. Every write is atomic, every method may be called from several threads.

    Keys are ``/``-separated names. All methods raise :class:`~cluster.errors.RunError` when the bucket fails for good
    and :class:`~cluster.errors.UserError` when it refuses what the user gave: its name, its keys, its rights.
    """

    @property
    def uri(self) -> str:
        """What the user calls it."""

    def get(self, key: str) -> bytes | None:
        """The bytes under a key, None when there are none."""

    def put_new(self, key: str, data: bytes | memoryview) -> bool:
        """Write a key that is not there yet. False when it is: of several writers exactly one gets True."""

    def replace(self, key: str, data: bytes) -> None:
        """Write a key, whether or not it is there."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose key begins with ``prefix``, in no particular order."""

    def delete(self, key: str) -> None:
        """Remove a key; one that is not there is no error."""

    def now(self) -> float:
        """The bucket's own clock, seconds since 1970: what ``Entry.modified`` is to be held against."""

    def sweep(self, before: float, dry_run: bool) -> tuple[Entry, ...]:
        """Remove what writers that died left half written before a time; returns what is, or would be, removed."""


class FolderBucket:
    """A bucket in a folder: on one machine, or on a filesystem that several share.

    An object is written aside, synced and then linked to its name. What a writer that dies leaves lies aside, where
    nobody reads.

    Args:
        root: made by the first write.

    Raises:
        UserError: ``root`` is something else than a folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        with self._named("open it"):
            if root.exists() and not root.is_dir():
                raise UserError(f"label store {root}: is not a folder; give a folder or s3://bucket/prefix")

    @property
    def uri(self) -> str:
        """The folder."""
        return str(self._root)

    def get(self, key: str) -> bytes | None:
        """See :meth:`Bucket.get`."""
        with self._named(f"read {key}"):
            try:
                return (self._root / key).read_bytes()
            except FileNotFoundError:
                return None

    def put_new(self, key: str, data: bytes | memoryview) -> bool:
        """See :meth:`Bucket.put_new`."""
        target = self._root / key
        with self._named(f"write {key}"):
            if target.exists():
                return False
            with self._written_aside(data) as aside:
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(aside, target)
                except FileExistsError:
                    # NFS repeats a link whose answer got lost, and then finds its own.
                    return aside.stat().st_nlink > 1
        return True

    def replace(self, key: str, data: bytes) -> None:
        """See :meth:`Bucket.replace`."""
        target = self._root / key
        with self._named(f"write {key}"), self._written_aside(data) as aside:
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.replace(target)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`Bucket.list`."""
        with self._named(f"list {prefix or 'it'}"):
            yield from (e for e in self._walk(prefix.rpartition("/")[0]) if e.key.startswith(prefix))

    def delete(self, key: str) -> None:
        """See :meth:`Bucket.delete`."""
        with self._named(f"remove {key}"):
            (self._root / key).unlink(missing_ok=True)

    def now(self) -> float:
        """The clock of the filesystem, which may be another machine's."""
        with self._named("write"), self._written_aside(b"") as aside:
            return aside.stat().st_mtime

    def sweep(self, before: float, dry_run: bool) -> tuple[Entry, ...]:
        """See :meth:`Bucket.sweep`."""
        with self._named("list what lies aside"):
            left = tuple(entry for entry in self._walk(_ASIDE) if entry.modified < before)
        for entry in () if dry_run else left:
            self.delete(entry.key)
        return left

    def _walk(self, folder: str) -> Iterator[Entry]:
        try:
            with os.scandir(self._root / folder) as scan:
                found = sorted(scan, key=lambda each: each.name)
        except FileNotFoundError:
            return
        for each in found:
            key = f"{folder}/{each.name}" if folder else each.name
            if each.is_dir():
                yield from self._walk(key) if key != _ASIDE else ()
                continue
            try:
                info = each.stat()
            except FileNotFoundError:
                continue  # removed since it was listed
            yield Entry(key, info.st_size, info.st_mtime)

    @contextlib.contextmanager
    def _written_aside(self, data: bytes | memoryview) -> Iterator[Path]:
        """A file of its own with the data on disk, which is gone again behind the block."""
        path = self._root / _ASIDE / secrets.token_hex(16)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """Say what the filesystem refuses in one line."""
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            said = f"label store {self.uri}: cannot {doing}: {reason}"
            if error.errno in _NO_LINKS and error.filename2 is not None:
                raise UserError(f"{said}; its filesystem has no hard links, give a folder on another") from error
            raise RunError(f"{said}; see to the folder's rights and its disk, then start again") from error
