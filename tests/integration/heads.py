"""A Ray cluster of another process with token authentication, as `infra/local/ray_head.sh` starts it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.integration.seaweed import free_port

ROOT = Path(__file__).resolve().parents[2]
# What start() has left running; a test that fails must not leave it to the next ones.
STARTED: list[subprocess.Popen[str]] = []


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a client or a head, with a home of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "HOME": str(home), "STILLHOUSE_HOME": str(home / "stillhouse"), "COLUMNS": "160", **more}


def stillhouse(*arguments: str, env: dict[str, str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command, as a person types it, to its end."""
    command = [sys.executable, "-m", "jobs", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def start(*arguments: str, env: dict[str, str], on: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The command, left running; ``on`` goes in front of it."""
    command = [*on, sys.executable, "-u", "-m", "jobs", *arguments]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    STARTED.append(process)
    return process


def end_started() -> None:
    """End the commands that still run, with all that they have started."""
    for process in STARTED:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            for each in [process, *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()
    STARTED.clear()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """The output up to the first line that matches."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"ended without {pattern!r}:\n{seen}")


class Head:
    """A head, where it answers, and the environment of a client that has its token.

    Args:
        home: of the head and of the client; what a head keeps there is there for the next one.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = environment(home, RAY_AUTH_TOKEN=secrets.token_hex(32), PATH=binaries)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [str(ROOT / "infra/local/ray_head.sh"), str(self.port)]
        self.process = subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while stillhouse("doctor", "--address", self.address, env=self.env).returncode:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(1)

    def family(self) -> list[psutil.Process]:
        """Its processes."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        """End it; nothing of it is left."""
        assert self.process is not None
        family = self.family()
        self.process.terminate()
        self.process.wait(timeout=180)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []


@contextlib.contextmanager
def running_head(home: Path) -> Iterator[Head]:
    """A head that has started, and is ended at the end."""
    head = Head(home)
    head.start()
    try:
        yield head
    finally:
        head.stop()
