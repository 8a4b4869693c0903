"""How a process that computes on a CPU keeps its memory."""

from __future__ import annotations

import ctypes

# glibc's names for what is set, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 1024**2
KEPT_BYTES = 1024**3


def keep_memory() -> None:
    """Let this process keep up to a gigabyte that it has freed, for its next tensors.

    By default glibc gives large blocks back at once, and the system clears every page again when it hands them out: a
    tenth of a forward pass on a CPU. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
