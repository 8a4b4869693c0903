"""`make backup` and `make restore`: MLflow's database and the buckets, as files in one folder.

The database comes first and the buckets after it, so that it names no model that the copy lacks: models are written
before they are registered, and none is removed meanwhile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from infra.local.parts import BUCKETS, Stack, StackError, postgres_bin

_DUMP = "mlflow.dump"


def backup(stack: Stack, folder: Path) -> str:
    """Copy all into a folder that is not there yet, or is empty; it appears whole or not at all.

    Raises:
        StackError: the folder holds something, or a part does not answer.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise StackError(f"{folder} holds something already; give a folder that is not there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _postgres(stack, "pg_dump", "--format=custom", f"--file={aside / _DUMP}", stack.database)
        count = sum(_download(stack, bucket, aside / bucket) for bucket in BUCKETS)
        folder.mkdir(exist_ok=True)
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside)
        raise
    return f"the database and {count} objects are in {folder}"


def restore(stack: Stack, folder: Path) -> str:
    """Make database and buckets what they were; what came since is lost.

    Raises:
        StackError: there is no backup, or a part does not answer.
    """
    folder = folder.resolve()
    if not (folder / _DUMP).is_file():
        raise StackError(f"{folder} holds no backup; `make backup TO={folder}` makes one")
    client = stack.s3_client()
    count = 0
    # The buckets first: the database must name no model that is not there.
    for bucket in BUCKETS:
        kept = {path.relative_to(folder / bucket).as_posix(): path for path in _files(folder / bucket)}
        if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=bucket)
        for key, path in kept.items():
            client.upload_file(str(path), bucket, key)
        for key in set(_keys(client, bucket)) - set(kept):
            client.delete_object(Bucket=bucket, Key=key)
        count += len(kept)
    server = stack.database.replace("/mlflow", "/postgres")
    _postgres(stack, "psql", "--quiet", server, "--command=DROP DATABASE IF EXISTS mlflow WITH (FORCE)")
    _postgres(stack, "psql", "--quiet", server, "--command=CREATE DATABASE mlflow")
    _postgres(stack, "pg_restore", "--exit-on-error", f"--dbname={stack.database}", str(folder / _DUMP))
    return f"the database and {count} objects are as they were"


def _postgres(stack: Stack, program: str, *arguments: str) -> None:
    env = {**os.environ, **stack.environment}
    done = subprocess.run(
        [str(postgres_bin() / program), *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StackError(f"{program} failed: {done.stderr.strip().splitlines()[0]}")


def _download(stack: Stack, bucket: str, folder: Path) -> int:
    client = stack.s3_client()
    keys = _keys(client, bucket)
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, key, str(path))
    return len(keys)


def _keys(client: Any, bucket: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    # A folder in SeaweedFS may show as an empty object.
    return [each["Key"] for page in pages for each in page.get("Contents", []) if not each["Key"].endswith("/")]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
