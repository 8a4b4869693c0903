"""A student's training state for another number of ranks, by way of DeepSpeed's universal checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ZERO_FOLDER = "zero"


def make_universal(folder: Path, into: Path) -> None:
    """Write a ZeRO checkpoint in the form that any number of ranks can load; one process is enough.

    DeepSpeed unpickles what it reads. It reads what this student's own ranks have written into the run's own folder,
    and nothing that came from elsewhere.

    Args:
        folder: holds :data:`ZERO_FOLDER`, as all ranks have saved it.
        into: gets :data:`ZERO_FOLDER`. While it works it needs twice the room of ``folder``.
    """
    from deepspeed.checkpoint import ds_to_universal

    into.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(folder / ZERO_FOLDER),
        output_folder=str(into / ZERO_FOLDER),
        # In this process: a pool would be forked from one that has Ray's and torch's threads.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What it holds is for tensor parallelism, which a student has none of; but it must be there.
        inject_missing_state=True,
    )
    ds_to_universal.main(options)


def load_universal(engine: Any, folder: Path) -> None:
    """Load what :func:`make_universal` has written: weights, moments, schedule. All ranks call it.

    Args:
        engine: DeepSpeed's, configured with ``checkpoint.load_universal``.
    """
    optimizer = engine.optimizer.optimizer
    decay = [group["weight_decay"] for group in optimizer.param_groups]
    engine.load_checkpoint(str(folder), tag=ZERO_FOLDER)
    # ZeRO-3 gives all groups the options of the first, so that vectors would be decayed too.
    for group, own in zip(optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = own
    # It also gives all of them one and the same counter, which each would then count up; and it lies on the CPU.
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device, copy=True)
