"""What identifies a teacher and a tokenizer in the address of their labels.

A label block is stored under ``(teacher, tokenizer, labels, batch)``, see :class:`cluster.labels.wire.Stamp`. Whoever
finds a block under that address trains on it without asking the teacher, so the address covers everything that decides
the labels' values:

========== ======================================================= ==============================================
part       covers                                                  computed by
========== ======================================================= ==============================================
teacher    every byte of the configuration and of the weights, its :func:`teacher_fingerprint`
           own Python code where the spec runs it, the precision,
           the number of vocabulary columns that are kept, a
           block mask over packed documents
tokenizer  which token an id stands for                            :func:`tokenizer_fingerprint`
labels     the kind and those of its settings that differ from     :func:`cluster.labels.wire.labels_hash`
           its defaults: ``k``, ``draws``, ``temperature``
batch      tokens, loss mask, positions in packed documents; also  :func:`cluster.corpus.batches.content_address`
           the seed of the draws of ``sampled``
========== ======================================================= ==============================================

The teacher's head is stored under the teacher's part alone, which is why that part includes the precision and the
number of columns.

Not covered is what only changes the order of floating point sums: the number of shards and replicas, the device, the
attention kernel, ``tokens_per_chunk``, and the versions of torch and transformers. Replicas of one pool may differ in
these too, and the pool requires that they agree on a probe (``PROBE_TOLERANCE`` in :mod:`cluster.teacher.pool`). If
the address covered them, no store would survive a change of machine. A change of Stillhouse that alters values for an
unchanged address must increase :data:`REVISION`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.loading import indexed_files
from cluster.spec import TeacherSpec
from cluster.specfile import home

log = logging.getLogger(__name__)

REVISION = 1
"""Of how Stillhouse computes labels. Increase it when the same model, settings and batch give other values."""

CACHE_FOLDER = "fingerprints"
# A file that was written this recently may be written again without a change of its time stamps, which the kernel
# advances in ticks. It is hashed again next time.
SETTLED_S = 2.0
# SHA-256 runs without the GIL at 1 to 2 GB/s per core; more threads than this only wait for the disk.
_THREADS = 8
_DIGITS = 16


def teacher_fingerprint(folder: Path, teacher: TeacherSpec, vocabulary: int, packing: str = "unpacked") -> str:
    """16 hex digits that differ for two teachers whose labels may differ by more than rounding.

    This is the place to add a fact that changes how a teacher computes. Give it None where it has the value that it
    had before it was added: None is left out of the hash, so existing label stores stay valid.

    Args:
        folder: local directory of the model.
        vocabulary: columns of the logits, and rows of the head, that are kept.
        packing: how the teacher keeps packed documents apart, see :mod:`cluster.packing`; one without a mask is told
            from one that needs none by the batches' positions.

    Raises:
        UserError: see :func:`model_fingerprint`.
        ValueError: the precision is not a concrete one.
    """
    if teacher.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"teacher.dtype {teacher.dtype!r} must be resolved to float32 or bfloat16 before it is hashed")
    facts = {
        "revision": REVISION,
        "model": model_fingerprint(folder, code=teacher.trust_remote_code),
        "dtype": teacher.dtype,
        "vocabulary": vocabulary,
        "packing": "masked" if packing == "masked" else None,
    }
    return _hashed({name: value for name, value in facts.items() if value is not None})


def model_fingerprint(folder: Path, *, code: bool = False) -> str:
    """16 hex digits over every byte that decides what a model computes: configuration, weights and its own code.

    A ``.safetensors`` file that no index names counts too. Hashing too much costs at worst a second scoring; hashing
    too little gives one teacher's labels to another.

    Args:
        code: include the ``.py`` files, for a model that is loaded with ``trust_remote_code``.

    Raises:
        UserError: a file changed while it was read, or an index of weight files cannot be read.
    """
    files = _files_of(folder, code)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(file_digest, files.values())
        return _hashed(dict(zip(files, digests, strict=True)))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits over the mapping of tokens to ids and the way text is split into them."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    # Padding and truncation are settings of a call, not of the vocabulary; chat templates never touch ids.
    for setting in ("padding", "truncation"):
        rules.pop(setting, None)
    return _hashed([sorted(tokenizer.get_vocab().items()), rules])


def _hashed(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _files_of(folder: Path, code: bool) -> dict[str, Path]:
    """The files that a model is loaded from, by their names relative to its folder."""
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json", *(["**/*.py"] if code else []))
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    config = json.loads((folder / "config.json").read_bytes())
    # Two fields by which a configuration names other files for transformers to read.
    names |= {*(config.get("configuration_files") or ()), config.get("transformers_weights") or "config.json"}
    for index in [name for name in names if name.endswith(".safetensors.index.json")]:
        names |= set(indexed_files(folder / index, "teacher.model"))
    # The loader reports a file that is named and missing, if it needs it: beside model.safetensors an index is unused.
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()}


# -- digests of single files, cached ---------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of all bytes of a file, in hexadecimal, from the cache under the Stillhouse home if it is there.

    A cached digest counts for the same path with the same size, modification and change times, and inode. The change
    time reveals a file that was edited in place and given its old modification time back.

    Raises:
        UserError: the file changed while it was read.
    """
    path = path.resolve()
    place = home() / CACHE_FOLDER / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if (known := _cached(place, _identity(path, path.stat()))) is not None:
        return known
    started = time.time()
    with path.open("rb") as file:
        identity = _identity(path, os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        same = _identity(path, os.fstat(file.fileno())) == identity == _identity(path, path.stat())
    if not same:
        raise UserError(f"teacher.model: {path} changed while it was read; start again once it is complete")
    if started - identity["mtime_ns"] / 1e9 > SETTLED_S:
        _cache(place, {**identity, "sha256": digest})
    return digest


def _identity(path: Path, status: os.stat_result) -> dict[str, Any]:
    return {
        "path": os.fsdecode(path),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _cached(place: Path, identity: dict[str, Any]) -> str | None:
    """The digest in a cache file; None where there is none, it is damaged, or it belongs to another state."""
    try:
        entry = json.loads(place.read_bytes())
        digest = entry.pop("sha256")
        bytes.fromhex(digest)
        if len(digest) != 64:
            raise ValueError(f"a digest of {len(digest)} digits")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used, so %s is hashed again: %r", place, identity["path"], error)
        return None
    return digest if entry == identity else None


def _cache(place: Path, entry: dict[str, Any]) -> None:
    """Write a cache file whole or not at all; one that cannot be written costs time only."""
    aside = place.with_name(f".{secrets.token_hex(8)}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(entry))
        aside.replace(place)
    except OSError as error:
        log.warning("cannot keep the digest of %s in %s: %s", entry["path"], place.parent, error)
        if aside.exists():
            aside.unlink()
