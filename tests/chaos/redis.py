"""A real Redis, where a head keeps what its successor has to know."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.integration.seaweed import free_port


class Redis:
    """Use in a ``with`` block. It listens on loopback, asks for a password, and keeps nothing on the disk.

    Attributes:
        env: of a head that uses it; ``option`` is that of its ``ray start``.
    """

    def __init__(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed")
        self._program, self._port, self._password = program, free_port(), secrets.token_hex(16)
        self.env = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{self._port}"}
        self.option = f"--redis-password={self._password}"

    def __enter__(self) -> Redis:
        self._folder = Path(tempfile.mkdtemp(prefix="redis-", dir="/tmp"))
        # By its standard input, for a command line is everybody's to read.
        settings = f"bind 127.0.0.1\nport {self._port}\nrequirepass {self._password}\ndir {self._folder}\nsave ''\n"
        with (self._folder / "redis.log").open("wb") as log:
            self._process = subprocess.Popen([self._program, "-"], stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert self._process.stdin is not None
        self._process.stdin.write(settings.encode())
        self._process.stdin.close()
        deadline = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "redis.log").read_text()
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self._port)) == 0

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)
