"""Imported before the rest of torchtitan, whose modules copy the device type when imported."""
# pyright: reportMissingImports=false

from __future__ import annotations

import torch
import torchtitan.tools.utils as tools


def choose_cpu() -> torch.device:
    """Without a GPU torchtitan assumes CUDA."""
    tools.device_type, tools.device_module = "cpu", torch.cpu
    return torch.device(tools.device_type)


DEVICE = choose_cpu()
