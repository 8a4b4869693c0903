"""Whether a process that has freed a tensor asks the system for the next one's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings; on Linux only")
ROOT = Path(__file__).parents[2]
MEBIBYTES = 20
PAGES = MEBIBYTES * 2**20 // 4096
# Two tensors at a time, as in a forward pass, so that memory lies free between those in use.
PROGRAM = f"""
import resource, sys
import numpy as np
from cluster.memory import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def passes(count):
    for _ in range(count):
        a = np.ones({MEBIBYTES} * 2**20, dtype=np.uint8)
        b = np.ones({MEBIBYTES} * 2**20, dtype=np.uint8)
        del a, b
passes(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to hand out for ten passes."""
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    assert faults("kept") < PAGES
    # Otherwise this shows nothing.
    assert faults("given back") > PAGES
