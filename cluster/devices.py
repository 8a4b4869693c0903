"""Which GPUs a process may see."""

from __future__ import annotations

import os


def see_no_gpu() -> None:
    """Hide every GPU from this process, which has asked Ray for none. Call before CUDA is used.

    Ray hides GPUs only from processes that ask for some. What takes a GPU wherever there is one (an engine, the device
    mesh of a tensor-parallel model) would otherwise take one that belongs to somebody else.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
