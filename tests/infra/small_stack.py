"""A few parts of the stack, for real, under its own supervisor; none of them needs Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.local.parts import Stack
from infra.local.stack import down
from infra.local.watch import illnesses


@dataclass(frozen=True)
class _Small(Stack):
    names: tuple[str, ...] = ()

    def programs(self) -> dict[str, tuple[list[str], dict[str, str]]]:
        return {name: part for name, part in super().programs().items() if name in self.names}


@contextlib.contextmanager
def small_stack(*names: str) -> Iterator[Stack]:
    """A stack of these parts, healthy; nothing is left of it."""
    # Not pytest's folder: it is closed to everybody else, and PostgreSQL will not run as root.
    home = Path(tempfile.mkdtemp(prefix="stack-", dir="/tmp"))
    home.chmod(0o755)
    stack = _Small(home / "stack", names)
    try:
        stack.folder.mkdir()
        stack.choose_ports(free=True)
        stack.prepare()
        command = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(stack.conf)]
        subprocess.run(command, env={**os.environ, **stack.environment}, check=True, cwd=stack.folder)
        deadline = time.monotonic() + 180
        while ill := illnesses(stack):
            assert time.monotonic() < deadline, ill
            time.sleep(0.5)
        yield stack
    finally:
        down(stack)
        shutil.rmtree(home)
        assert not stack.short.exists()
