"""The number type that a forward pass is computed in."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of a forward pass in `fp32`, `bf16` or `fp16`."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()
