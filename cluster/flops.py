"""MFU: the share of a device's dense bfloat16 peak that goes into a model's own arithmetic while it is at work."""

from __future__ import annotations

import os
from typing import Any

from cluster.errors import UserError

# FLOPs per parameter and token: a forward pass, and one with its backward pass.
FORWARD, TRAINING = 2, 6
# FLOP/s of one device where it is not in the table, such as a CPU.
PEAK = "STILLHOUSE_PEAK_FLOPS"
# Dense bfloat16 TFLOP/s by the name that CUDA gives, from NVIDIA's data sheets, which print twice that where they count
# with sparsity. What is not here has no MFU.
_TERAFLOPS = {
    "NVIDIA A30": 165.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
}


def peak_flops(device: Any) -> float | None:
    """FLOP/s that a torch device can do at best, in bfloat16; None where that is not known.

    Raises:
        UserError: the environment gives something that is not a rate.
    """
    import torch

    if given := os.environ.get(PEAK):
        try:
            peak = float(given)
        except ValueError:
            peak = 0.0
        if not 0 < peak < float("inf"):
            raise UserError(f"{PEAK}: got {given!r}; give the FLOP/s of one device, such as 9.89e14")
        return peak
    if device.type != "cuda":
        return None
    teraflops = _TERAFLOPS.get(torch.cuda.get_device_name(device))
    return None if teraflops is None else teraflops * 1e12


def parameters_of(model: Any) -> int | None:
    """Parameters that each token goes through; None where a token goes through some of them only.

    To be asked before DeepSpeed's ZeRO-3 cuts them into pieces.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    return sum(parameter.numel() for parameter in model.parameters())


class Work:
    """What a role does for each token on its devices.

    Args:
        parameters: from :func:`parameters_of`; ``per_parameter`` is ``FORWARD`` or ``TRAINING``.
        peak: of one device, from :func:`peak_flops`.
        devices: that share the work.
    """

    def __init__(self, parameters: int | None, per_parameter: int, peak: float | None, devices: int) -> None:
        self._per_token = None if parameters is None else parameters * per_parameter
        self._peak = None if peak is None else peak * devices

    def mfu(self, tokens: int, seconds: float) -> float | None:
        """The share of the peak that these tokens took; None where it is not known."""
        if self._per_token is None or self._peak is None:
            return None
        return self._per_token * tokens / seconds / self._peak
