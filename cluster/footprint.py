"""What a family takes of a machine's memory: told by ``check``, and held against what there is before a start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.capacity import Need, check_capacity, first_without_room, gib, needs_of, serving_needs_of, totals
from cluster.errors import UserError
from cluster.memory import GIB, MIB, OBJECT_STORE_BYTES, Estimate
from cluster.spec import FamilySpec

# Resident sets after their imports, measured by benchmarks/memory.py --base: the driver, the stream, the board and the
# MLflow registry, the process that waits for Ray Train; Ray's own; a Ray Train controller for each student. Of an
# endpoint: Serve's controller, our control and a door.
OWN_BYTES, CONTROLLER_BYTES, SERVE_BYTES = 1400 * MIB, 365 * MIB, 750 * MIB
# Memory of one device by what Ray calls its type (ray.util.accelerators); the larger where a name has several.
GPU_GIB = {
    "T4": 16,
    "P100": 16,
    "V100": 32,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
    "A100": 80,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 94,
    "H200": 141,
    "B200": 192,
}
LESS_GPU = "lower micro_batch or corpus.sequence_length, use gradient_checkpointing, or more ranks or shards"


def stages_of(spec: FamilySpec) -> list[list[Need]]:
    """What a family needs at a time, stage by stage: the training, then the comparison of the endpoints.

    Args:
        spec: with its memory filled in, see :func:`cluster.memory.with_memory`; the family's own processes count where
            it is.
    """
    stages = [needs_of(spec), serving_needs_of(spec)]
    if spec.teacher.memory_per_shard is not None:
        own = float(OWN_BYTES + CONTROLLER_BYTES * len(spec.students))
        for stage, size in zip(stages, (own, own + SERVE_BYTES), strict=True):
            if stage:
                stage.append(Need("the family's own processes", 1, 0.0, 0.0, size))
    return [stage for stage in stages if stage]


def check_devices(spec: FamilySpec, estimates: Mapping[str, Estimate], nodes: Iterable[Mapping[str, float]]) -> None:
    """Hold what lies on GPUs against their memory: each process against the largest, and each stage against all.

    Args:
        nodes: resources as Ray names them, with ``gpu_memory`` or a resource ``accelerator_type:NAME``.

    Raises:
        UserError: it cannot fit. Where the size of a GPU is not known, nothing is refused.
    """
    found = [(node["GPU"], _gpu_memory(node)) for node in nodes if node.get("GPU")]
    if not found or not all(size for _, size in found):
        return
    largest, together = max(size for _, size in found), sum(count * size for count, size in found)
    for stage in (needs_of(spec), serving_needs_of(spec)):
        sizes = {need: estimates[need.who].device for need in stage if need.gpus and need.who in estimates}
        for need, size in sizes.items():
            if size > largest:
                raise UserError(
                    f"{need.who} needs {gib(size)} of GPU memory in each process ({_parts(estimates[need.who])}), and "
                    f"the largest GPU has {gib(largest)}; {LESS_GPU}"
                )
        if (needed := sum(need.count * size for need, size in sizes.items())) > together:
            each = "; ".join(f"{need.who} {need.count} x {gib(size)}" for need, size in sizes.items())
            raise UserError(
                f"{gib(needed)} of GPU memory are needed ({each}), and there are {gib(together)}; {LESS_GPU}"
            )


def _gpu_memory(node: Mapping[str, float]) -> float:
    named = (GPU_GIB.get(name.removeprefix("accelerator_type:"), 0) * float(GIB) for name in node)
    return node.get("gpu_memory", 0.0) or max(named, default=0.0)


def machine() -> dict[str, float]:
    """This machine as Ray would describe a node of it: CPUs, GPUs, and host memory without Ray's object store."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group of version 2, or one without a limit ("max")
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return {
        "CPU": float(os.cpu_count() or 1),
        "GPU": float(gpus),
        "memory": float(max(0, memory - OBJECT_STORE_BYTES)),
        "gpu_memory": float(device),
    }


def memory_report(
    spec: FamilySpec, estimates: Mapping[str, Estimate], here: Mapping[str, float], elsewhere: bool
) -> list[str]:
    """The estimated peak of every role and of all together, a line each.

    Args:
        spec: with its memory filled in.
        here: this machine, from :func:`machine`.
        elsewhere: the family is to run on a cluster, so this machine's memory does not matter.

    Raises:
        UserError: it is to run on this machine, whose memory it cannot fit into.
    """
    stages = stages_of(spec)
    lines = ["memory at the peak, estimated:"]
    for need in dict.fromkeys(need for stage in stages for need in stage):
        estimate = estimates.get(need.who)
        line = f"  {need.who}: {need.count} x {gib(need.memory)}"
        if estimate is not None and estimate.gpu:
            line += f" of host memory and {gib(estimate.device)} of a GPU"
        lines.append(line + (f" ({_parts(estimate)})" if estimate is not None else ""))
    most = max(totals(stage)[2] for stage in stages)
    lines.append(f"  in all {gib(most)}")
    if elsewhere:
        return lines
    lines[-1] += f"; this machine has {gib(here['memory'])} beside Ray's object store"
    lacking = [name for name in ("CPU", "GPU") if _lacks(stages, here, name)]
    if "GPU" not in lacking and _lacks(stages, here, "memory"):
        for stage in stages:
            check_capacity(stage, [here], "this machine is too small (to check for a cluster, set RAY_ADDRESS)")
    if lacking:
        cpus, gpus, _ = (max(totals(stage)[i] for stage in stages) for i in range(3))
        needed = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        lines.append(
            f"warning: `run` would refuse this family on this machine: it needs {needed} at a time, and there are "
            f"{here['CPU']:g} CPU and {here['GPU']:g} GPU; to check for a cluster, set RAY_ADDRESS or use a context"
        )
        return lines
    check_devices(spec, estimates, [here])
    return lines


def _lacks(stages: Iterable[Iterable[Need]], node: Mapping[str, float], name: str) -> bool:
    """Whether a machine has too little of one resource, whatever it has of the others."""
    alone = {each: node[each] if each == name else float("inf") for each in ("CPU", "GPU", "memory")}
    return any(first_without_room(stage, [alone]) is not None for stage in stages)


def _parts(estimate: Estimate) -> str:
    large = {name: size for name, size in estimate.parts.items() if size >= 0.05 * GIB}
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in large.items())
