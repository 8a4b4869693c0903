"""Two hosts on this machine: network namespaces with one virtual wire between them, which can be cut and mended."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Hosts:
    """Use in a ``with`` block; needs root.

    Attributes:
        names: of the two namespaces; ``addresses`` are theirs on the wire.
    """

    def __init__(self) -> None:
        if os.geteuid() or shutil.which("ip") is None:
            pytest.skip("network namespaces take root and `ip`")
        mark = secrets.token_hex(3)
        self.names = [f"still-{mark}-{side}" for side in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self._ends = [f"s{mark}{side}" for side in "ab"]

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
            for name, end, address in zip(self.names, self._ends, self.addresses, strict=True):
                _ip("link", "set", end, "netns", name)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                for device in ("lo", end):
                    _ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        # The wire goes with its ends.
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def on(self, host: int) -> list[str]:
        """What goes in front of a command that is to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def sent(self, host: int) -> int:
        """Bytes that a host has put on the wire."""
        statistics = f"/sys/class/net/{self._ends[host]}/statistics/tx_bytes"
        return int(subprocess.check_output([*self.on(host), "cat", statistics]))

    @contextmanager
    def cut(self) -> Iterator[None]:
        """No byte crosses the wire within the block."""
        _ip("-n", self.names[1], "link", "set", self._ends[1], "down")
        try:
            yield
        finally:
            _ip("-n", self.names[1], "link", "set", self._ends[1], "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
