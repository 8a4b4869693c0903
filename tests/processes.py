"""The processes of a test's own Ray, found by the name that Ray gives them. Never those of another run."""

from __future__ import annotations

import os
import signal

import psutil


def own_processes(title: str) -> list[psutil.Process]:
    """Descendants of this process whose title begins with ``ray::`` and ``title``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:  # it has ended since
            continue
        if command and command[0].startswith(f"ray::{title}"):
            found.append(process)
    return found


def kill_one(title: str, which: int = 0) -> bool:
    """``SIGKILL`` one of them; whether there was one."""
    found = own_processes(title)
    if not found:
        return False
    os.kill(found[which % len(found)].pid, signal.SIGKILL)
    return True
