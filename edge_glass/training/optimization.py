"""Which parameters are trained, and how they decay."""

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: matrices, which decay, and the rest (biases, norms, temperatures).

    Args:
        module: the task.
        weight_decay: of the first group.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
