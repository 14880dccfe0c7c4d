"""One run, from its config to its report; what every rank executes."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from edge_glass.config import save_config, to_experiment
from edge_glass.data.rows import data_hash
from edge_glass.distributed import barrier, connected_ranks, current_ranks
from edge_glass.experiment import Experiment, build, build_experiment, choose_precision, plain, set_threads
from edge_glass.models.alignment import format_parameter_table, parameter_table
from edge_glass.results import evaluate_run, validation_figures
from edge_glass.runs import CONFIG, SUMMARY, keep_metrics_until, write_json
from edge_glass.tasks import AlignmentTask
from edge_glass.training.checkpoints import Checkpoints, load_state, load_weights
from edge_glass.training.logs import Sink, open_sinks
from edge_glass.training.loop import Limits, Trainer
from edge_glass.training.optimization import parameter_groups
from edge_glass.training.summary import commit, peak_memory_mb, skipped_rows, versions

log = logging.getLogger(__name__)


def fit(config: dict[str, Any], run_dir: str) -> float | None:
    """Train, evaluate, report.

    Args:
        config: resolved, as plain containers.
        run_dir: the run's folder; if it holds a checkpoint and `training.resume` is set, the run goes on from it.

    Returns:
        The figure that `training.monitor` names, of the last evaluation; None without one. On every rank but the first
        None.

    Raises:
        UserError: for everything that the user can mend.
    """
    experiment_config = to_experiment(OmegaConf.create(config))
    level = logging.INFO if current_ranks().rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    set_threads(experiment_config)
    with connected_ranks(experiment_config.launch.timeout_minutes):
        experiment = build_experiment(experiment_config)
        return Run(experiment, Path(run_dir)).run()


class Run:
    """The life of one run on this rank.

    Args:
        experiment: the parts.
        run_dir: the run's folder.
    """

    def __init__(self, experiment: Experiment, run_dir: Path):
        self.experiment = experiment
        self.config = experiment.config
        self.run_dir = run_dir
        self.main = current_ranks().rank == 0
        self.checkpoints = Checkpoints(run_dir, self.config.training.keep_last)
        view = self.config.dataset.validation_view
        self.validation = experiment.views([view]) if view is not None and self.main else None
        self.last_figures: dict[str, float] = {}

    def run(self) -> float | None:
        began = time.monotonic()
        trainer = self._trainer()
        if self.config.training.resume:
            self._resume(trainer)
        if self.main:
            trainer.sinks = self._open_folder()
        try:
            stopped_by = trainer.run()
        finally:
            for sink in trainer.sinks:
                sink.close()
        skipped = on_all_ranks(trainer.progress.skipped)
        if not self.main:
            barrier()
            return None
        best = self.config.training.test_checkpoint == "best"
        if best:
            load_weights(self.experiment.task, self.checkpoints.find("best"))
        if self.validation is not None and (best or not self.last_figures):
            self._validate(self.experiment.task)  # of the weights that are judged, not of the last step's
        summary = self._summary(trainer, stopped_by)
        write_json(self.run_dir / SUMMARY, summary)  # before the evaluation, so that its failure costs no figures
        results = evaluate_run(self.experiment, self.run_dir, self.last_figures)
        summary |= results.summary()
        skipped |= results.skipped
        rows = sum(len(table) for table in self.experiment.tables.values())
        summary["skipped_rows"] = skipped_rows(skipped, rows)
        summary["total_seconds"] = round(time.monotonic() - began, 2)
        write_json(self.run_dir / SUMMARY, summary)
        results.show(self.run_dir, summary)
        barrier()
        monitor = self.config.training.monitor
        return self.last_figures.get(monitor) if monitor else None

    def _trainer(self) -> Trainer:
        config, task = self.config, self.experiment.task
        batches = self.experiment.training_batches()
        options = plain(config.optimization.optimizer)
        groups = parameter_groups(task, options.get("weight_decay", 0.0))
        optimizer = build(config.optimization.optimizer, params=groups)
        # Ranks began with equal weights; what they draw from here on (dropout, augmentation) is their own.
        torch.manual_seed(config.seed + 1 + current_ranks().rank)
        return Trainer(
            task,
            optimizer,
            build(config.optimization.scheduler, optimizer=optimizer),
            batches,
            batches.epoch_length,
            Limits(
                config.training.max_steps,
                config.training.max_seconds,
                config.training.eval_every,
                config.training.save_every,
                config.training.log_every,
                config.dataset.max_bad_share,
            ),
            config.optimization.accumulation,
            choose_precision(config.training.precision.value, self.experiment.device),
            config.optimization.clip_norm,
            self._validate if self.validation is not None else None,
            config.training.monitor if self.validation is not None else None,
            self.checkpoints,
        )

    def _validate(self, task: AlignmentTask) -> dict[str, float]:
        assert self.validation is not None
        self.last_figures = validation_figures(self.validation, task, self.experiment.device)
        return self.last_figures

    def _open_folder(self) -> list[Sink]:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run_dir / CONFIG)
        rows = parameter_table(self.experiment.model)
        print(f"run folder: {self.run_dir}\n\n{format_parameter_table(rows)}\n", flush=True)
        values = plain(self.config)
        return open_sinks(self.run_dir, values["logger"], values)

    def _resume(self, trainer: Trainer) -> None:
        folder = self.checkpoints.find("last")
        state = load_state(folder)
        load_weights(self.experiment.task, folder)
        trainer.restore(state)
        if self.main:
            keep_metrics_until(self.run_dir, trainer.progress.step)
            log.info("going on after step %d of %s", trainer.progress.step, self.run_dir)
        barrier()

    def _summary(self, trainer: Trainer, stopped_by: str) -> dict[str, Any]:
        progress = trainer.progress
        return {
            "name": self.config.name,
            "steps": progress.step,
            "stopped_by": stopped_by,
            "seconds": round(progress.seconds, 2),
            "samples": progress.samples,
            "samples_per_second": round(progress.samples / max(progress.seconds, 1e-9), 2),
            "peak_memory_mb": round(peak_memory_mb(self.experiment.device), 1),
            "nonfinite_steps": progress.nonfinite_steps,
            "world_size": current_ranks().world_size,
            "precision": trainer.precision,
            "embedding_width": self.config.encoder.dim,
            "best": self.checkpoints.best(),
            "checkpoint": self.config.training.test_checkpoint,
            "parameters": parameter_table(self.experiment.model),
            "versions": versions(),
            "commit": commit(),
            "data_hash": data_hash(self.experiment.tables.values()),
        }


def on_all_ranks(skipped: dict[str, str]) -> dict[str, str]:
    """The undecodable rows of all ranks together."""
    gathered = [skipped]
    if (world_size := current_ranks().world_size) > 1:
        gathered *= world_size
        dist.all_gather_object(gathered, skipped)
    return {sample: reason for part in gathered for sample, reason in part.items()}
