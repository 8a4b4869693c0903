"""A bucket on an S3 server: conditional writes, checksums from end to end, and patience with a server that is away."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

import boto3
import tenacity
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError

from cluster.errors import RunError, StillhouseError, UserError
from cluster.labels.store.buckets import Entry

log = logging.getLogger(__name__)

T = TypeVar("T")

MULTIPART_BYTES = 64 * 2**20
"""Objects above this size are sent in parts of half of it."""

_CONNECT_TIMEOUT_S = 10.0
# Requests at a time: threads of a family's runs and of upkeep, each waiting for a free connection otherwise.
_CONNECTIONS = 32
# What a server says of a request that may well pass the next time.
_PASSING_STATUS = (408, 409, 429)
_PASSING_CODES = (
    *("BadDigest", "IncompleteBody", "RequestTimeout"),
    *("MalformedXML", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
)
_NOT_THERE = ("NoSuchKey", "404")
_TAKEN = ("PreconditionFailed", "412")
# Answers that callers ask for, which are no failures.
_ANSWERS = (*_NOT_THERE, *_TAKEN, "NoSuchUpload")
_REFUSED_CODES = ("ExpiredToken", "InvalidToken")


class _WrongBytesError(Exception):
    """A body that is not what its writer sent."""


def _code(error: BaseException) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network, an overloaded server, bytes that were lost or turned."""
    if isinstance(error, ClientError):
        if _code(error) in _ANSWERS:
            return False
        return _status(error) >= 500 or _status(error) in _PASSING_STATUS or _code(error) in _PASSING_CODES
    # A server that is down refuses the connection: botocore's ConnectionError, which is no HTTPClientError.
    passing = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, _WrongBytesError)
    return isinstance(error, passing)


def _reason(error: BaseException | None) -> str:
    return _code(error) if isinstance(error, ClientError) else " ".join(str(error).split())


class S3Bucket:
    """A bucket at ``s3://bucket/prefix``, where the standard AWS environment says that the server is.

    Not to be sent to another process: open it there.

    Args:
        patience_s: how long a request that fails for a passing reason is tried again, in seconds. One attempt more
            may be under way when it ends.
        read_timeout_s: how long an answer may stand still.
    """

    def __init__(self, name: str, prefix: str = "", patience_s: float = 300.0, read_timeout_s: float = 30.0) -> None:
        self._name, self._patience_s = name, patience_s
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": 3},
            max_pool_connections=_CONNECTIONS,
            # Bodies are checked here, against the writer's own digest: the server's would follow bytes that it damaged,
            # and hide them, where the store is to find the damage and name it.
            response_checksum_validation="when_required",
        )
        try:
            # A session of its own: the default one may not be used from several threads.
            self._client: Any = boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"label store {self.uri}: {_reason(error)}; see to the AWS environment") from None

    @property
    def uri(self) -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{self._name}/{self._prefix}".rstrip("/")

    def get(self, key: str) -> bytes | None:
        """See :meth:`Bucket.get`.

        Bytes that differ from what was written are read again. When they differ in the same way twice, the server
        holds them so, and they are returned for the caller to find the damage.
        """
        return self._patiently(f"get {key}", partial(self._read, key, set()))

    def put_new(self, key: str, data: bytes | memoryview) -> bool:
        """See :meth:`Bucket.put_new`."""
        return self._write(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes) -> None:
        """See :meth:`Bucket.replace`."""
        self._write(key, data)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`Bucket.list`."""
        more: dict[str, str] = {}
        while True:
            page = self._ask("list_objects_v2", Prefix=self._prefix + prefix, **more)
            for each in page.get("Contents", ()):
                key = each["Key"].removeprefix(self._prefix)
                yield Entry(key, each["Size"], each["LastModified"].timestamp())
            if not page["IsTruncated"]:
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """See :meth:`Bucket.delete`."""
        self._ask("delete_object", key)

    def now(self) -> float:
        """The server's clock, to the second."""
        answer = self._ask("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def sweep(self, before: float, dry_run: bool) -> tuple[Entry, ...]:
        """See :meth:`Bucket.sweep`; what writers leave here are uploads in parts, whose size S3 does not say."""
        left: list[tuple[Entry, str]] = []
        more: dict[str, str] = {}
        while True:
            page = self._ask("list_multipart_uploads", Prefix=self._prefix, **more)
            for each in page.get("Uploads", ()):
                entry = Entry(each["Key"].removeprefix(self._prefix), 0, each["Initiated"].timestamp())
                left += [(entry, each["UploadId"])] if entry.modified < before else []
            if not page["IsTruncated"]:
                break
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for entry, upload in () if dry_run else left:
            self._abort(entry.key, upload)
        return tuple(entry for entry, _ in left)

    def _read(self, key: str, wrong: set[str]) -> bytes | None:
        """One attempt at a whole body; ``wrong`` keeps the digests of those that were not what their writer sent."""
        try:
            answer = self._client.get_object(Bucket=self._name, Key=self._prefix + key)
        except ClientError as error:
            if _code(error) in _NOT_THERE:
                return None
            raise
        # Not `with body`, which gives the connection's own stream: only the body says whether it was cut short.
        with contextlib.closing(answer["Body"]) as body:
            data: bytes = body.read()
        digest = hashlib.sha256(data).hexdigest()
        if digest in wrong or answer["Metadata"].get("sha256", digest) == digest:
            return data
        wrong.add(digest)
        raise _WrongBytesError("the bytes are not those that were written")

    def _write(self, key: str, data: bytes | memoryview, **condition: str) -> bool:
        """Write a whole object; False when the condition does not hold."""
        writer, digest = secrets.token_hex(16), hashlib.sha256(data).digest()
        metadata = {"sha256": digest.hex(), "writer": writer}
        try:
            if len(data) > MULTIPART_BYTES:
                if condition and self._writer_of(key) is not None:
                    return False  # before all of its parts are sent for nothing
                self._send_parts(key, memoryview(data), metadata, condition)
            else:
                checksum = _base64(digest)
                self._ask("put_object", key, Body=bytes(data), Metadata=metadata, ChecksumSHA256=checksum, **condition)
        except ClientError as error:
            if _code(error) in _TAKEN:
                # Also the answer to a write of ours that succeeded and was repeated because its own answer got lost.
                return self._writer_of(key) == writer
            raise
        return True

    def _send_parts(self, key: str, data: memoryview, metadata: dict[str, str], condition: dict[str, str]) -> None:
        begun = self._ask("create_multipart_upload", key, Metadata=metadata, ChecksumAlgorithm="SHA256")
        upload, size = begun["UploadId"], MULTIPART_BYTES // 2
        try:
            parts = []
            for number, start in enumerate(range(0, len(data), size), start=1):
                body = bytes(data[start : start + size])
                named = {"PartNumber": number, "ChecksumSHA256": _base64(hashlib.sha256(body).digest())}
                tag = self._ask("upload_part", key, UploadId=upload, Body=body, **named)["ETag"]
                parts.append({"ETag": tag, **named})
            self._complete(key, upload, parts, metadata["writer"], condition)
        except BaseException:
            self._abort(key, upload)
            raise

    def _complete(self, key: str, upload: str, parts: Sequence[Any], writer: str, condition: dict[str, str]) -> None:
        try:
            whole = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
            self._ask("complete_multipart_upload", key, **whole, **condition)
        except ClientError as error:
            # The answer to the second of two, the first of which succeeded and was lost.
            if _code(error) != "NoSuchUpload" or self._writer_of(key) != writer:
                raise

    def _abort(self, key: str, upload: str) -> None:
        """End an upload; when not even that succeeds, the next sweep does it."""
        try:
            self._client.abort_multipart_upload(Bucket=self._name, Key=self._prefix + key, UploadId=upload)
        except (BotoCoreError, ClientError) as error:
            if _code(error) != "NoSuchUpload":
                log.warning("label store %s: an upload of %s is left behind: %s", self.uri, key, _reason(error))

    def _writer_of(self, key: str) -> str | None:
        """Who wrote an object, empty when somebody else than a store did; None when there is none."""
        try:
            return str(self._ask("head_object", key)["Metadata"].get("writer", ""))
        except ClientError as error:
            if _code(error) in _NOT_THERE:
                return None
            raise

    def _ask(self, operation: str, key: str | None = None, **arguments: Any) -> Any:
        """One request to the server, with patience. What callers ask for, such as that a key is taken, is raised as
        botocore's ``ClientError``."""
        if key is not None:
            arguments["Key"] = self._prefix + key
        request = partial(getattr(self._client, operation), Bucket=self._name, **arguments)
        return self._patiently(f"{operation.replace('_', ' ')} {key or ''}".strip(), request)

    def _patiently(self, what: str, request: Callable[[], T]) -> T:
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=10.0),
            stop=tenacity.stop_after_delay(self._patience_s),
            before_sleep=partial(self._log_retry, what),
        )
        started = time.monotonic()
        try:
            return attempts(request)
        except tenacity.RetryError as error:
            last = error.last_attempt
            raise RunError(
                f"label store {self.uri}: gave up to {what} after {last.attempt_number} attempts in "
                f"{time.monotonic() - started:.0f} s: {_reason(last.exception())}; see to the server that "
                f"AWS_ENDPOINT_URL names, then start again"
            ) from last.exception()
        except (BotoCoreError, ClientError) as error:
            if _code(error) in _ANSWERS:
                raise
            raise self._refusal(what, error) from None

    def _log_retry(self, what: str, state: tenacity.RetryCallState) -> None:
        reason = _reason(state.outcome.exception()) if state.outcome is not None else ""
        log.warning("label store %s: cannot %s, tries again: %s", self.uri, what, reason)

    def _refusal(self, what: str, error: BotoCoreError | ClientError) -> StillhouseError:
        """What a person is told when trying again would not help."""
        store, reason = f"label store {self.uri}", _reason(error)
        if reason == "NoSuchBucket":
            return UserError(f"{store}: there is no bucket {self._name!r}; make it, or give another store")
        if isinstance(error, BotoCoreError):
            # It was not even sent: no credentials, or a name that no bucket can have.
            return UserError(f"{store}: {reason}; see to its name and to the AWS environment")
        if _status(error) in (401, 403) or reason in _REFUSED_CODES:
            keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they allow"
            return UserError(f"{store}: the server lets us not {what}: {reason}; see to {keys}")
        return RunError(f"{store}: cannot {what}: {reason}; see to the server that AWS_ENDPOINT_URL names")


def _base64(digest: bytes) -> str:
    """A SHA-256 as S3 wants it, to check what arrives."""
    return base64.b64encode(digest).decode()
