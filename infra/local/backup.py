"""`make backup` and `make restore`: what of the stack is worth keeping, as files in one folder.

::

    mlflow.dump        MLflow's database
    labels/, models/   the buckets' objects, a file each
    schedules.db       the schedules and their history, where there is any
    endpoints/<name>/  the weights and experiments of each endpoint, where there is any

The database comes first and the buckets after it, so that it names no model that the copy lacks: models are written
before they are registered.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from cluster.labels.store.objects import LEASES
from infra.local.database import Beside, dump, look_at
from infra.local.home import check_home, keep_home, put_back_home
from infra.local.parts import BUCKETS, Stack, StackError
from infra.local.watch import resting

_DUMP = "mlflow.dump"


def backup(stack: Stack, folder: Path) -> str:
    """Copy all into a folder that is not there yet, or is empty; it appears whole or not at all.

    Raises:
        StackError: the folder holds something, or a part does not answer.
    """
    folder = folder.resolve()
    _check_stack(stack)
    with _in_one_line():
        if folder.exists() and any(folder.iterdir()):
            raise StackError(f"{folder} holds something already; give a folder that is not there")
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            dump(stack, aside / _DUMP)
            count = sum(_download(stack, bucket, aside / bucket) for bucket in BUCKETS)
            keep_home(stack, aside)
            folder.mkdir(exist_ok=True)
            aside.replace(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return f"the database, {count} objects, the schedules and the endpoints' state are in {folder}"


def restore(stack: Stack, folder: Path) -> str:
    """Make all what it was; what came since is lost, but for schedules and endpoints' state, which are put aside.

    Nothing is taken away before all of the backup is there: the database is restored beside the one in use, and the
    objects that are not of the backup go last. A restore that breaks off is to be done again.

    Raises:
        StackError: the backup is not whole, or a part does not answer.
    """
    folder = folder.resolve()
    _check_stack(stack)
    with _in_one_line():
        _check(folder)
        with Beside(stack) as database:
            database.fill(folder / _DUMP)
            count = sum(_upload(stack, bucket, folder / bucket) for bucket in BUCKETS)
            # MLflow looks at the database's schema only when it starts, and the scheduler holds nights by number.
            with resting(stack, "mlflow", "scheduler"):
                database.take_the_place()
                put_aside = put_back_home(stack, folder)
        for bucket in BUCKETS:
            _remove_surplus(stack, bucket, folder / bucket)
    said = f"the database and {count} objects are as they were"
    return said + (f"; the schedules and endpoints' state of before are in {put_aside}" if put_aside else "")


def _check_stack(stack: Stack) -> None:
    # Nothing is to be made for one that is not there, such as secrets.
    if not (stack.folder / "postgres").exists():
        raise StackError(f"there is no stack in {stack.folder}; `make up` makes one")


def _check(folder: Path) -> None:
    if not (folder / _DUMP).is_file():
        raise StackError(f"{folder} holds no backup; `make backup FOLDER={folder}` makes one")
    for bucket in BUCKETS:
        if not (folder / bucket).is_dir():
            raise StackError(
                f"{folder} is not whole: {bucket}/ is missing, and nothing was changed; where the bucket was empty, "
                "make an empty folder"
            )
    look_at(folder / _DUMP)
    check_home(folder)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """What a disk, a server or a database has to say against it, for the person who types."""
    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise StackError(f"the S3 server: {_first_line(error)}; see `make status`") from error
    except psycopg2.Error as error:
        raise StackError(f"PostgreSQL: {_first_line(error)}; see `make status`") from error
    except OSError as error:
        raise StackError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- the buckets ----


def _download(stack: Stack, bucket: str, folder: Path) -> int:
    """Copy a bucket; how many objects."""
    folder.mkdir()
    client, count = stack.s3_client(), 0
    for key in _keys(client, bucket):
        path = folder / key
        if not path.resolve().is_relative_to(folder):
            raise StackError(f"s3://{bucket}: {key!r} would lie outside of the backup; remove it from the bucket")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            client.download_file(bucket, key, str(path))
        except ClientError as error:
            # Removed since it was listed, such as by `labels gc`.
            if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
                raise
            continue
        count += 1
    return count


def _upload(stack: Stack, bucket: str, folder: Path) -> int:
    client = stack.s3_client()
    if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    kept = _kept(bucket, folder)
    for key, path in kept.items():
        client.upload_file(str(path), bucket, key)
    return len(kept)


def _remove_surplus(stack: Stack, bucket: str, folder: Path) -> None:
    client = stack.s3_client()
    for key in set(_keys(client, bucket)) - set(_kept(bucket, folder)):
        client.delete_object(Bucket=bucket, Key=key)


def _keys(client: Any, bucket: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
    # A folder in SeaweedFS may show as an empty object.
    return [key for key in keys if not key.endswith("/") and not _is_lease(bucket, key)]


def _kept(bucket: str, folder: Path) -> dict[str, Path]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {key: path for key, path in files.items() if not _is_lease(bucket, key)}


def _is_lease(bucket: str, key: str) -> bool:
    """A lease is of those who run now: they come and go, and one of yesterday means nothing."""
    return bucket == "labels" and f"/{LEASES}" in f"/{key}"
