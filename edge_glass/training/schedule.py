"""The learning rate over a run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, max_steps: int, warmup: float = 0.05, floor: float = 0.01) -> LambdaLR:
    """Linear warm-up, then half a cosine down to a floor (Loshchilov & Hutter 2017).

    Args:
        optimizer: whose learning rates are scaled.
        max_steps: steps of the whole run.
        warmup: share of the run that warms up, in 0..1.
        floor: share of the peak that is left at the end.
    """
    rise = max(1, round(warmup * max_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, max_steps - rise))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
