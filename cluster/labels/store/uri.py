"""From what a spec calls a label store to the bucket that it lies in."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError
from cluster.labels.store.buckets import PATIENCE_S, Bucket, FolderBucket


def open_bucket(uri: str, patience_s: float = PATIENCE_S) -> Bucket:
    """The bucket behind a local path or ``s3://bucket/prefix``.

    Args:
        patience_s: how long an S3 server that is away is asked again, in seconds.

    Raises:
        UserError: neither of the two, or it cannot be used.
        RunError: the S3 server did not answer within ``patience_s``.
    """
    scheme, sign, rest = uri.partition("://")
    if not sign and uri:
        return FolderBucket(Path(uri).expanduser().resolve())
    name, _, prefix = rest.partition("/")
    if scheme != "s3" or not name:
        raise UserError(f"label store {uri!r}: give a folder or s3://bucket/prefix")
    # boto3 takes a while to load, and a store in a folder needs none of it.
    from cluster.labels.store.s3 import S3Bucket

    bucket = S3Bucket(name, prefix, patience_s)
    bucket.now()  # a wrong name or wrong credentials show here, before anything is started
    return bucket
