"""Every random generator that a model may draw from, as one state."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch's, numpy's and Python's generators (Whisper's masking uses numpy's)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Where the generators stand, as tensors and plain values, which a checkpoint can hold."""
    drawn: Any = np.random.get_state()
    version, keys, place, has_gauss, gauss = drawn
    kind, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [version, keys.tolist(), place, has_gauss, gauss],
        "python": [kind, list(internal), next_gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators where they stood; a GPU's only where there is one."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((version, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    kind, internal, next_gauss = state["python"]
    random.setstate((kind, tuple(internal), next_gauss))
