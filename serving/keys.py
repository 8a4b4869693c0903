"""API keys: made here, shown once, kept only as a hash, and held against every request.

The file is YAML, one entry per key. A key has 256 random bits, so a plain SHA-256 of it cannot be guessed back, and
checking one costs a microsecond (a slow password hash is for secrets that people choose).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import PositiveInt

from cluster.errors import UserError
from cluster.spec.base import Section

_PREFIX = "sk-still-"
# What damaged files bring beside YAML's own errors: no UTF-8 and no fields of ours (both are ValueErrors), and what its
# constructors raise for a date, a number or a tag that is none, or for a thousand brackets.
_NO_KEYS = (ValueError, LookupError, AttributeError, TypeError, RecursionError)


class Key(Section):
    """What is kept of an API key."""

    name: str
    """Whose it is; logs and metrics say this and never the key."""
    sha256: str
    """Hash of the key, in hexadecimal."""
    requests_per_minute: PositiveInt | None = None
    """How many requests it may make in any minute; none means as many as it likes."""
    arms: tuple[str, ...] | None = None
    """Arms it may ask for by name; none means all. The split is open to every key."""
    admin: bool = False
    """Whether it may change the traffic and run experiments."""

    def may_ask(self, arm: str) -> bool:
        """Whether this arm may be asked for by name."""
        return self.arms is None or arm in self.arms


class KeyFile(Section):
    """The file of keys."""

    keys: tuple[Key, ...] = ()
    """All of them; no two of one name."""


def hashed(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file.

    Raises:
        UserError: it cannot be read, or it holds something else.
    """
    try:
        return KeyFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {}).keys
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); `stillhouse keys add` makes such a file."
        ) from error
    except (yaml.YAMLError, *_NO_KEYS) as error:
        # Not the error's own text: it may quote what stands in the file.
        raise UserError(f"{path} is no file of API keys; `stillhouse keys add` makes one.") from error


def add_key(
    path: Path,
    name: str,
    requests_per_minute: int | None = None,
    arms: Sequence[str] | None = None,
    admin: bool = False,
) -> str:
    """Make a key and keep its hash.

    Returns:
        The key; it cannot be had again.

    Raises:
        UserError: the file has a key of that name, or is something else.
    """
    keys = read_keys(path) if path.exists() else ()
    if any(key.name == name for key in keys):
        raise UserError(f"{path} has a key named {name!r}; remove it first, or give another name.")
    secret = _PREFIX + secrets.token_urlsafe(32)
    own = Key(
        name=name,
        sha256=hashed(secret),
        requests_per_minute=requests_per_minute,
        arms=tuple(arms) if arms else None,
        admin=admin,
    )
    _write(path, (*keys, own))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Forget a key; running endpoints refuse it within seconds.

    Raises:
        UserError: there is no such key.
    """
    keys = read_keys(path)
    left = tuple(key for key in keys if key.name != name)
    if len(left) == len(keys):
        raise UserError(
            f"{path} has no key named {name!r}; there are: {', '.join(key.name for key in keys) or 'none'}."
        )
    _write(path, left)


def _write(path: Path, keys: Sequence[Key]) -> None:
    aside = path.with_name(f".{path.name}.part")
    entries = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
    # Made for its owner alone from the start, not after.
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        yaml.safe_dump({"keys": entries}, file, sort_keys=False)
    aside.replace(path)


class KeyRing:
    """The keys in force at one door, and how much each has used.

    Args:
        path: the file; None lets everybody in.
        doors: how many doors share the load; each allows its part of a key's rate.
    """

    def __init__(self, path: Path | None, doors: int = 1) -> None:
        self._path, self._doors = path, doors
        self._changed: tuple[int, ...] | None = None
        self._by_hash: dict[str, Key] = {}
        self._rates: dict[str, RateLimitItem] = {}
        self._used = MovingWindowRateLimiter(MemoryStorage())
        self.refresh()

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._path is None

    def refresh(self) -> None:
        """Read the file again where it has changed. A file that cannot be read any more lets nobody in.

        Raises:
            UserError: it cannot be read.
        """
        if self._path is None:
            return
        try:
            there = self._path.stat()
            # A revoked key's line is as long as its successor's, and an editor may keep the modification time.
            changed = (there.st_ino, there.st_ctime_ns, there.st_mtime_ns, there.st_size)
            if changed == self._changed:
                return
            keys = read_keys(self._path)
        except (OSError, UserError) as error:
            self._by_hash, self._changed = {}, None
            raise UserError(f"the API keys in {self._path} cannot be read, so none is valid: {error}") from error
        self._by_hash = {key.sha256: key for key in keys}
        self._rates = {
            key.sha256: RateLimitItemPerMinute(max(1, key.requests_per_minute // self._doors))
            for key in keys
            if key.requests_per_minute
        }
        self._changed = changed

    def find(self, secret: str) -> Key | None:
        """The key, if it is one. Looked up by its hash, so the time it takes says nothing about those that exist."""
        return self._by_hash.get(hashed(secret))

    def wait_s(self, key: Key) -> float:
        """Count one request of a key.

        Returns:
            0 where it may go on, else in how many seconds the next one may.
        """
        rate = self._rates.get(key.sha256)
        if rate is None or self._used.hit(rate, key.sha256):
            return 0.0
        return max(1.0, self._used.get_window_stats(rate, key.sha256).reset_time - time.time())
