"""Gradient accumulation that is exact, also for losses which compare the samples of a batch with each other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from edge_glass.data.batch import Batch
from edge_glass.distributed import all_mean
from edge_glass.tasks.alignment import AlignmentTask, LossGradient
from edge_glass.tasks.task import Losses, Task, TrainingBatch
from edge_glass.training.random_state import random_state, restore_random_state


def accumulate_exact(
    task: Task | DistributedDataParallel,
    micro_batches: Sequence[TrainingBatch],
    *,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Losses:
    """Adds to `.grad` the gradient of the loss over all micro-batches together, as if they were one batch.

    A loss that is a mean over terms, such as answer tokens, is the sum of its parts in each micro-batch, each
    divided by the terms of the whole step (over all ranks), not by its own.

    A contrastive loss compares every sample with every other, so the mean of the losses of micro-batches is
    another, easier loss. Here all micro-batches are embedded without gradient, the loss over all embeddings
    gives its gradient in each, and every micro-batch is embedded again to pass its gradient on (GradCache:
    Gao et al. 2021, https://arxiv.org/abs/2101.06983). Memory is that of one micro-batch, time one more
    forward pass. The second pass repeats the first one's random numbers, so dropout drops the same;
    afterwards the generators stand where embedding each micro-batch once would have left them. A single
    micro-batch takes the plain way.

    Under DistributedDataParallel the gradients are averaged once, with the last micro-batch. Those of the
    loss's own parameters (temperatures) travel with it.

    Batch normalisation sees micro-batches, not the whole batch: statistics are those of each micro-batch, and
    running statistics are updated once by each.

    Args:
        task: bare or in DistributedDataParallel.
        micro_batches: on the task's device; for a loss that compares with the same modalities in each. On every rank
            the same number.
        scale: applied to the loss before it is differentiated, such as `GradScaler.scale`.
        autocast: makes the context of each forward pass, such as
            `functools.partial(torch.autocast, "cuda", torch.bfloat16)`; the backward passes run outside it.

    Returns:
        The loss, unscaled and without gradient, and the figures for the log.

    Raises:
        ValueError: no micro-batch, or, where they are compared, micro-batches of different modalities.
    """
    if not micro_batches:
        raise ValueError("no micro-batch to accumulate over; give at least one")
    bare = cast(Task, task.module if isinstance(task, DistributedDataParallel) else task)
    terms = all_mean(float(sum(bare.terms(batch) for batch in micro_batches)))
    if len(micro_batches) > 1 and bare.compares:
        return _compared(task, cast(AlignmentTask, bare), cast(list[Batch], micro_batches), terms, scale, autocast)
    parts = []
    for i, batch in enumerate(micro_batches):
        with _gradients_later(task, i < len(micro_batches) - 1):
            with autocast():
                loss, figures = task(batch, terms)
            scale(loss).backward()
        parts.append((loss.detach(), figures))
    return torch.stack([loss for loss, _ in parts]).sum(), _together([figures for _, figures in parts])


def _compared(
    task: Task | DistributedDataParallel,
    bare: AlignmentTask,
    micro_batches: list[Batch],
    terms: float,
    scale: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager],
) -> Losses:
    """Several micro-batches of a task whose loss compares their samples."""
    parts, random_states = _embed_without_gradient(bare, micro_batches, autocast)
    ids = [batch.ids() for batch in micro_batches]
    embeddings = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    concept_ids = {name: torch.cat([of_part[name] for of_part in ids]) for name in parts[0]}
    with autocast():
        loss, figures = bare.loss_of(embeddings, concept_ids)
    sources = [*embeddings.values(), *bare.loss_parameters()]
    gradients = torch.autograd.grad(scale(loss), sources, materialize_grads=True)

    by_modality = {
        name: known.split([len(part[name]) for part in parts])
        for name, known in zip(embeddings, gradients, strict=False)
    }
    further, unit = [], scale(torch.ones((), device=loss.device))
    for i, (batch, began_with) in enumerate(zip(micro_batches, random_states, strict=True)):
        gradient = LossGradient({name: known[i] for name, known in by_modality.items()}, scale=scale)
        last = i == len(micro_batches) - 1
        if last:
            gradient.parameters = list(gradients[len(embeddings) :])
        restore_random_state(began_with)
        with _gradients_later(task, not last):
            with autocast():
                stand_in, rest = task(batch, terms, gradient)
            stand_in.backward()
        loss = loss + stand_in.detach() / unit
        further.append(rest)
    return loss.detach(), figures | _together(further)


def _gradients_later(task: Task | DistributedDataParallel, later: bool) -> AbstractContextManager:
    """Where DistributedDataParallel is not to average yet."""
    return task.no_sync() if later and isinstance(task, DistributedDataParallel) else nullcontext()


def _together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The figures of all micro-batches: losses add up, of all others the mean."""
    names = dict.fromkeys(name for figures in parts for name in figures)
    values = {name: torch.stack([figures[name] for figures in parts if name in figures]) for name in names}
    return {name: v.sum() if name.startswith("loss/") else v.float().mean() for name, v in values.items()}


@torch.no_grad()
def _embed_without_gradient(
    task: AlignmentTask, micro_batches: list[Batch], autocast: Callable[[], AbstractContextManager]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """The embeddings of each micro-batch and the random state it began with; buffers stay as they were."""
    buffers = {name: buffer.clone() for name, buffer in task.named_buffers()}
    parts, random_states = [], []
    for batch in micro_batches:
        random_states.append(random_state())
        with autocast():
            parts.append(task.encode(batch))
    for name, buffer in task.named_buffers():
        buffer.copy_(buffers[name])
    modalities = [sorted(part) for part in parts]
    if any(names != modalities[0] for names in modalities):
        raise ValueError(f"micro-batches must hold the same modalities, these hold {modalities}")
    return parts, random_states
