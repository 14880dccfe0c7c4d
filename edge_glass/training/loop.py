"""The loop: steps, with everything that happens between them."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from edge_glass.data.batch import SkippedRow
from edge_glass.distributed import all_objects, all_sum, barrier, current_ranks
from edge_glass.errors import UserError
from edge_glass.tasks.task import Task, TrainingBatch
from edge_glass.training.accumulation import accumulate_exact
from edge_glass.training.average import WeightAverage
from edge_glass.training.checkpoints import Checkpoints
from edge_glass.training.logs import Sink
from edge_glass.training.precision import autocast
from edge_glass.training.random_state import random_state, restore_random_state
from edge_glass.training.signals import StopSignals

log = logging.getLogger(__name__)


class TrainingError(UserError):
    """A run that cannot go on, for a reason in the data or the settings."""


class NotFinite(TrainingError):
    """Loss or gradient stay no finite number.

    Attributes:
        sample_ids: of the last batch, over all ranks.
    """

    def __init__(self, message: str, sample_ids: list[str]):
        super().__init__(message)
        self.sample_ids = sample_ids


@dataclass
class Limits:
    """How long a run lasts, how often it looks up, and what it bears.

    Attributes:
        max_steps: optimizer steps.
        max_seconds: from this process's first step on, evaluations included; None for no limit.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints.
        log_every: steps between rows in the log.
        max_bad_share: share of the samples met that may be undecodable.
        max_nonfinite: steps in a row that may be left out for a loss or gradient that is no number.
    """

    max_steps: int
    max_seconds: float | None
    eval_every: int
    save_every: int
    log_every: int
    max_bad_share: float
    max_nonfinite: int = 20


@dataclass
class Progress:
    """How far a run is; part of every checkpoint.

    Attributes:
        step: optimizer steps tried (those left out for a NaN counted too).
        seconds: training time, evaluations not counted, over all parts of a resumed run.
        samples: samples met, over all ranks.
        nonfinite_steps: steps that were left out.
        nonfinite_in_a_row: how many of them were the last ones.
        skipped: undecodable rows that were met and replaced on this rank, sample id -> reason.
        skips: how often that happened, over all ranks.
    """

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    skips: int = 0


@dataclass
class Vote:
    """What the ranks have to agree on in each step, summed over them.

    Attributes:
        skipped: rows of this batch that could not be decoded.
        nonfinite: ranks whose loss or gradient is no finite number.
        out_of_time: ranks whose time is up; their clocks differ a little.
        told_to_stop: ranks that got a signal; a cluster may tell the first one only.
    """

    skipped: float = 0.0
    nonfinite: float = 0.0
    out_of_time: float = 0.0
    told_to_stop: float = 0.0


class Trainer:
    """Trains a task until its limits.

    Args:
        task: on its device.
        optimizer: over the task's trained parameters.
        scheduler: stepped once a step.
        batches: makes the endless training batches of this rank, the given number of global batches left out.
        epoch_length: global batches an epoch.
        limits: when to stop, evaluate, save, log.
        accumulation: micro-batches a step; the loss is that of all of them as one batch.
        precision: `fp32`, `bf16` or `fp16` for the forward passes.
        clip_norm: largest norm of the gradient; None for no clipping.
        evaluate: gives the validation figures of a task; called on rank 0 only.
        monitor: the validation figure, higher is better, that names the best checkpoint.
        checkpoints: where to save; None saves nothing.
        sinks: where figures go; only rank 0 has any.
        average: averaged weights, which are evaluated in place of the trained ones.
        signals: tell the loop to stop; the ranks stop together, after a step and a checkpoint.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        batches: Callable[[int], Iterator[TrainingBatch]],
        epoch_length: int,
        limits: Limits,
        accumulation: int = 1,
        precision: str = "fp32",
        clip_norm: float | None = None,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
        monitor: str | None = None,
        checkpoints: Checkpoints | None = None,
        sinks: list[Sink] | None = None,
        average: WeightAverage | None = None,
        signals: StopSignals | None = None,
    ):
        self.ranks = current_ranks()
        self.task = task
        self.device = next(task.parameters()).device
        self.wrapped: nn.Module = task
        if self.ranks.world_size > 1:
            self.wrapped = DistributedDataParallel(
                task,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=task.leaves_out,
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.epoch_length = epoch_length
        self.limits = limits
        self.accumulation = accumulation
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.evaluate = evaluate
        self.monitor = monitor
        self.checkpoints = checkpoints
        self.sinks = sinks or []
        self.average = average
        self.signals = signals or StopSignals()
        self.progress = Progress()
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self._recent: list[dict[str, Tensor]] = []
        self._began = time.monotonic()

    def run(self) -> str:
        """Train; returns what ended the run: `max_steps`, `max_seconds` or `signal`.

        Raises:
            TrainingError: too many undecodable rows, or a loss that stays no number.
        """
        limits, progress = self.limits, self.progress
        bar = tqdm(
            total=limits.max_steps, initial=progress.step, unit="step", disable=self.ranks.rank != 0, desc="train"
        )
        batches = self.batches(progress.step)
        if progress.step and self._evaluates(progress.step):
            self._validate(bar)  # the process that saved this step may not have come to it
        earlier = progress.seconds
        self._began = began = time.monotonic()
        away = 0.0  # evaluating and saving: not the speed of training
        last_log, last_samples = began, progress.samples
        stopped_by = "max_steps"
        self.task.train()
        while progress.step < limits.max_steps:
            figures, vote = self._step(next(batches))
            progress.step += 1
            progress.seconds = earlier + time.monotonic() - began - away
            self._recent.append(figures)
            done = bool(vote.out_of_time) or progress.step == limits.max_steps
            if progress.step % limits.log_every == 0 or done:
                now = time.monotonic()
                speed = (progress.samples - last_samples) / max(now - last_log, 1e-9)
                row = self._log(speed)
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:.0f} samples/s")
                last_log, last_samples = now, progress.samples
            bar.update()
            pause = time.monotonic()
            stop = bool(vote.told_to_stop) and not done
            if progress.step % limits.save_every == 0 or self._evaluates(progress.step) or done or stop:
                self.save()
            if (self._evaluates(progress.step) or done) and not stop:  # a run that goes on makes up for it
                self._validate(bar)
            paused = time.monotonic() - pause
            away, last_log = away + paused, last_log + paused
            if done or stop:
                stopped_by = "signal" if stop else "max_seconds" if vote.out_of_time else "max_steps"
                break
        bar.close()
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return stopped_by

    def save(self) -> None:
        """Write a checkpoint of this moment; every rank must call it."""
        mine = {
            "random": random_state(),
            "recent": [{name: value.cpu() for name, value in figures.items()} for figures in self._recent],
            "skipped": self.progress.skipped,
            "task": self.task.state_of_rank(),
        }
        ranks = all_objects(mine)
        if self.checkpoints is None or self.ranks.rank != 0:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
            "ranks": ranks,
        }
        average = None if self.average is None else self.average.weights
        self.checkpoints.save(self.progress.step, self.task, state, average)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `save` wrote (the weights aside).

        With as many ranks as wrote it, each takes up its own random numbers, and the run is the one that was not
        stopped. With more or fewer they start anew.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        ranks = state["ranks"]
        same = len(ranks) == self.ranks.world_size
        mine = ranks[self.ranks.rank if same else 0]
        self._recent = [{name: value.to(self.device) for name, value in row.items()} for row in mine["recent"]]
        if same:
            self.progress.skipped = mine["skipped"]
            restore_random_state(mine["random"])
            self.task.restore_state_of_rank(mine["task"])
        else:  # known to all, counted once
            self.progress.skipped = {sample: reason for rank in ranks for sample, reason in rank["skipped"].items()}

    def _step(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], Vote]:
        micro_batches = [part.to(self.device) for part in batch.split(self.accumulation)]
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.task.buffers()]
        loss, figures = accumulate_exact(
            self.wrapped,  # type: ignore[arg-type]
            micro_batches,
            scale=self.scaler.scale,
            autocast=self._autocast,
        )
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        vote = self._vote(len(batch.skipped), finite)
        self._count_skipped(batch, round(vote.skipped))
        if vote.nonfinite:
            self._leave_out(batch, loss, buffers)
        else:
            self.scaler.step(self.optimizer)
            self.scheduler.step()
            self.progress.nonfinite_in_a_row = 0
            if self.average is not None:
                self.average.update()
        self.scaler.update()
        return {"loss": loss, **figures, "gradient_norm": norm}, vote

    def _vote(self, skipped: int, finite: bool) -> Vote:
        limit = self.limits.max_seconds
        out_of_time = limit is not None and time.monotonic() - self._began >= limit
        mine = Vote(skipped, not finite, out_of_time, bool(self.signals.received))
        return Vote(*all_sum([float(value) for value in vars(mine).values()]))

    def _evaluates(self, step: int) -> bool:
        return step % self.limits.eval_every == 0 or step == self.limits.max_steps

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.precision)

    def _leave_out(self, batch: TrainingBatch, loss: Tensor, buffers: list[Tensor]) -> None:
        # fp16 finds its loss scale by overflowing now and then: the scaler has halved it, nothing is wrong yet.
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.task.buffers(), buffers, strict=True):
            buffer.copy_(before)  # running statistics would never forget a NaN
        self.task.forget_step()
        progress = self.progress
        progress.nonfinite_steps += 1
        progress.nonfinite_in_a_row += 1
        if progress.nonfinite_in_a_row <= self.limits.max_nonfinite:
            log.warning(
                "step %d left out: loss %s, gradient not finite (%d such steps so far)",
                progress.step + 1,
                float(loss),
                progress.nonfinite_steps,
            )
            return
        ids = [sample for of_rank in all_objects(batch.sample_ids) for sample in of_rank]
        raise NotFinite(
            f"loss or gradient was no finite number {progress.nonfinite_in_a_row} steps in a row (loss {float(loss)}); "
            "lower optimization.optimizer.lr or set optimization.clip_norm, or look at the samples of the last batch: "
            f"{ids[:8]} ...",
            ids,
        )

    def _count_skipped(self, batch: TrainingBatch, skips: int) -> None:
        progress = self.progress
        progress.samples += len(batch) * self.ranks.world_size
        progress.skips += skips
        progress.skipped |= {row.sample_id: row.reason for row in batch.skipped}
        # A share of what was met so far; the first batches are too few to judge by unless they are very bad.
        allowed = self.limits.max_bad_share * max(progress.samples, 1000)
        if progress.skips > allowed:
            raise TrainingError(
                f"{progress.skips} of {progress.samples} rows met could not be decoded, more than "
                f"dataset.max_bad_share={self.limits.max_bad_share} allows:\n"
                + describe_skipped([SkippedRow(*item) for item in progress.skipped.items()])
            )

    def _log(self, speed: float) -> dict[str, Any]:
        recent = [{name: value.cpu() for name, value in row.items()} for row in self._recent]
        figures = _means([row for of_rank in all_objects(recent) for row in of_rank])
        self._recent.clear()
        written = {
            "kind": "train",
            "step": self.progress.step,
            "epoch": round(self.progress.step / self.epoch_length, 4),
            **figures,
            "lr": self.scheduler.get_last_lr()[0],
            "samples_per_second": round(speed, 2),
            "seconds": round(self.progress.seconds, 2),
        }
        for sink in self.sinks:
            sink.write(written)
        return written

    def _validate(self, bar: tqdm) -> None:
        if self.evaluate is not None and self.ranks.rank == 0:
            with self.average.in_place() if self.average is not None else nullcontext():
                figures = self.evaluate(self.task)
            for sink in self.sinks:
                sink.write({"kind": "eval", "step": self.progress.step, **figures})
            if self.monitor is not None and self.checkpoints is not None:
                self._name_best(figures, self.monitor, bar)
        barrier()
        self.task.train()

    def _name_best(self, figures: dict[str, float], monitor: str, bar: tqdm) -> None:
        if monitor not in figures:
            raise TrainingError(f"training.monitor={monitor}: not among the validation figures {sorted(figures)[:12]}")
        assert self.checkpoints is not None
        best = self.checkpoints.best()
        better = best is None or best["metric"] != monitor or figures[monitor] > best["value"]
        if better:
            self.checkpoints.mark_best(self.progress.step, monitor, figures[monitor])
        bar.write(f"step {self.progress.step}: {monitor} {figures[monitor]:.3f}" + (" (best so far)" if better else ""))


def _means(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each figure over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(torch.stack([r[name].double() for r in rows if name in r]).mean()) for name in names}


def describe_skipped(rows: list[SkippedRow], most: int = 20) -> str:
    """Reasons with their counts, then the rows."""
    reasons = Counter(row.reason.split(":")[0] for row in rows)
    lines = [f"  {count} x {reason}" for reason, count in reasons.most_common()]
    lines += [f"  {row.sample_id}: {row.reason}" for row in rows[:most]]
    if len(rows) > most:
        lines.append(f"  ... and {len(rows) - most} more")
    return "\n".join(lines)
