"""One run, from its config to its report; what every rank executes."""

import errno
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from edge_glass.config import ConfigError, load_config, save_config, to_experiment
from edge_glass.distributed import all_objects, barrier, connected_ranks, current_ranks, decided_by_main, is_main
from edge_glass.errors import Stopped, UserError
from edge_glass.experiments.build import build_experiment
from edge_glass.experiments.experiment import Experiment
from edge_glass.experiments.parts import build, choose_precision, plain, set_threads
from edge_glass.models.counts import format_parameter_table
from edge_glass.runs import CONFIG, NONFINITE, SUMMARY, keep_metrics_until, read_json, write_json
from edge_glass.tasks.task import Task
from edge_glass.training.average import WeightAverage
from edge_glass.training.checkpoints import (
    WEIGHTS,
    Checkpoints,
    judged_weights,
    load_state,
    load_weights,
    read_manifest,
    take_over,
    tower_identities,
)
from edge_glass.training.logs import Sink, open_sinks
from edge_glass.training.loop import Limits, NotFinite, Trainer
from edge_glass.training.optimization import parameter_groups
from edge_glass.training.random_state import seed_everything
from edge_glass.training.resume import Start, find_start
from edge_glass.training.signals import StopSignals
from edge_glass.training.summary import commit, peak_memory_mb, skipped_rows, versions

log = logging.getLogger(__name__)


def fit(config: dict[str, Any], run_dir: str) -> float | None:
    """Train, evaluate, report.

    Args:
        config: resolved, as plain containers.
        run_dir: the folder of a new run; where `training.resume` finds an earlier part, the run goes on in its folder.

    Returns:
        The figure that `training.monitor` names, of the last evaluation; None without one. On every rank but the first
        None.

    Raises:
        UserError: for everything that the user can mend.
        Stopped: a signal came; the run has saved itself.
    """
    experiment_config = to_experiment(OmegaConf.create(config))
    level = logging.INFO if current_ranks().rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    set_threads(experiment_config)
    set_determinism(experiment_config.training.deterministic)
    signals = StopSignals()
    try:
        with signals, connected_ranks(experiment_config.launch.timeout_minutes), ExitStack() as stack:
            start = decided_by_main(lambda: find_start(experiment_config, Path(run_dir), stack))
            if start.finished:
                return monitored_figure(start.run_dir, experiment_config.training.monitor)
            return Run(build_experiment(experiment_config), start, signals).run()
    except Stopped:
        signals.hand_on()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{error}: free some space, then go on with training.resume={run_dir}") from error


@dataclass
class Share:
    """What one rank does of a step.

    Attributes:
        samples: of this rank.
        accumulation: micro-batches they come in.
        global_batch: samples of all ranks.
    """

    samples: int
    accumulation: int
    global_batch: int


def share_of_batch(config: DictConfig, global_batch: int | None, world_size: int) -> Share:
    """The share of each rank in a step: as configured, or, in a run that goes on, in the batch that it began with.

    Args:
        config: whose batch size is the most that a micro-batch may hold.
        global_batch: of the run's earlier part; None in a new run.
        world_size: ranks now.

    Raises:
        ConfigError: the batch does not divide among the ranks.
    """
    size, accumulation = config.optimization.batch_size, config.optimization.accumulation
    if global_batch is None or global_batch == size * accumulation * world_size:
        return Share(size * accumulation, accumulation, size * accumulation * world_size)
    samples, rest = divmod(global_batch, world_size)
    if rest:
        raise ConfigError(
            f"the run began with {global_batch} samples a step, which {world_size} ranks cannot share equally; resume "
            "it with a number of ranks that divides it"
        )
    parts = next(parts for parts in range(-(-samples // size), samples + 1) if samples % parts == 0)
    return Share(samples, parts, global_batch)


class Run:
    """The life of one run on this rank.

    Args:
        experiment: the parts.
        start: where it begins.
        signals: that may stop it.
    """

    def __init__(self, experiment: Experiment, start: Start, signals: StopSignals):
        self.experiment = experiment
        self.config = experiment.config
        self.start = start
        self.run_dir = start.run_dir
        self.signals = signals
        self.main = is_main()
        self.share = share_of_batch(self.config, start.global_batch, current_ranks().world_size)
        self.facts: dict[str, Any] = decided_by_main(
            lambda: {
                "commit": commit(),
                "data_hash": experiment.data_hash(),
                "towers": tower_identities(experiment.task),
                "world_size": current_ranks().world_size,
                "global_batch": self.share.global_batch,
            }
        )
        self.checkpoints = Checkpoints(self.run_dir, self.config.training.keep_last, self.facts)
        self.validation = experiment.validation() if self.main else None
        self.last_figures: dict[str, float] = {}
        if self.config.objective.init_from is not None and start.checkpoint is None:
            self._take_over(self.config.objective.init_from)

    def run(self) -> float | None:
        began = time.monotonic()
        self.experiment.prepare()
        trainer = self._trainer()
        if self.start.checkpoint is not None:
            self._take_up(trainer, self.start.checkpoint)
        if self.main:
            trainer.sinks = self._open_folder(trainer)
        try:
            stopped_by = trainer.run()
        except NotFinite as error:
            if self.main:
                write_json(self.run_dir / NONFINITE, {"step": trainer.progress.step, "sample_ids": error.sample_ids})
            raise
        finally:
            for sink in trainer.sinks:
                sink.close()
        if stopped_by == "signal":
            self.signals.share()
            self._say_that_it_stopped(trainer)
            raise Stopped
        if stopped_by == "max_seconds":
            training = self.config.training
            log.warning(
                "training.max_seconds=%g cut the run off after %d of %d steps, its learning rate still high: give more "
                "time, or as many training.max_steps as fit",
                training.max_seconds,
                trainer.progress.step,
                training.max_steps,
            )
        self.signals.at_once = True  # what is trained is saved; an evaluation can be done again
        saved = self._save_again(trainer)
        skipped: dict[str, str] = {}
        for of_rank in all_objects(trainer.progress.skipped):
            skipped |= of_rank
        if not self.main:
            barrier()
            return None
        self._load_judged_weights(trainer)
        if self.validation is not None and (self.config.training.test_checkpoint == "best" or not self.last_figures):
            self._validate(self.experiment.task)  # of the weights that are judged, not of the last step's
        summary = self._summary(trainer, stopped_by)
        write_json(self.run_dir / SUMMARY, summary)  # before the evaluation, so that its failure costs no figures
        results = self.experiment.results(self.run_dir, self.last_figures)
        summary |= results.summary()
        skipped |= results.skipped
        if self.validation is not None:
            skipped |= self.validation.skipped
        summary["skipped_rows"] = skipped_rows(skipped, self.experiment.row_count())
        summary["total_seconds"] = round(time.monotonic() - began, 2)
        write_json(self.run_dir / SUMMARY, summary)
        results.show(self.run_dir, summary)
        barrier()
        if not saved:
            raise UserError(
                f"the run is done, but the weights of step {trainer.progress.step} could not be saved: free some space "
                f"and give training.resume={self.run_dir} to train the steps after {self._newest()} again"
            )
        monitor = self.config.training.monitor
        return self.last_figures.get(monitor) if monitor else None

    def _trainer(self) -> Trainer:
        config, task = self.config, self.experiment.task
        batches = self.experiment.training_batches(self.share.samples)
        options = plain(config.optimization.optimizer)
        groups = parameter_groups(task, options.get("weight_decay", 0.0))
        optimizer = build(config.optimization.optimizer, params=groups)
        average = config.optimization.average
        # Ranks began with equal weights; what they draw from here on (dropout, masks) is their own.
        seed_everything(config.seed + 1 + current_ranks().rank)
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
                config.optimization.max_nonfinite,
            ),
            self.share.accumulation,
            choose_precision(config.training.precision.value, self.experiment.device),
            config.optimization.clip_norm,
            self._validate if self.validation is not None else None,
            config.training.monitor if self.validation is not None else None,
            self.checkpoints,
            average=None if average is None else WeightAverage(task, average),
            signals=self.signals,
        )

    def _validate(self, task: Task) -> dict[str, float]:
        assert self.validation is not None
        self.last_figures = self.validation(task)
        return self.last_figures

    def _take_over(self, folder: str) -> None:
        """Begin with the weights that another run is judged by."""
        other = Path(folder).expanduser()
        if not (other / CONFIG).is_file():
            raise ConfigError(f"objective.init_from={folder}: no run there ({other / CONFIG} is missing)")
        judged = load_config(other / CONFIG).training.test_checkpoint
        parts = take_over(self.experiment.task, Checkpoints(other).find(judged))
        log.info("beginning with %s of %s", ", ".join(parts), folder)

    def _take_up(self, trainer: Trainer, checkpoint: Path) -> None:
        load_weights(self.experiment.task, checkpoint, WEIGHTS)
        trainer.restore(load_state(checkpoint))
        if trainer.average is not None:
            trainer.average.restore(checkpoint)
        written = read_manifest(checkpoint)
        if written["data_hash"] != self.facts["data_hash"]:
            log.warning(
                "the data set's files have changed since %s was written (%s, now %s): the run goes on, but it is not "
                "the one that was stopped",
                checkpoint,
                written["data_hash"],
                self.facts["data_hash"],
            )

    def _open_folder(self, trainer: Trainer) -> list[Sink]:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run_dir / CONFIG)
        rows = self.experiment.parameters()
        print(f"run folder: {self.run_dir}\n\n{format_parameter_table(rows)}\n", flush=True)
        if self.start.goes_on:
            keep_metrics_until(self.run_dir, trainer.progress.step)
            (self.run_dir / SUMMARY).unlink(missing_ok=True)  # of a run that was finished and now goes further
            self.checkpoints.forget_after(trainer.progress.step)
            log.info("going on after step %d of %s", trainer.progress.step, self.run_dir)
        values = plain(self.config)
        return open_sinks(self.run_dir, values["logger"], values, self.facts)

    def _say_that_it_stopped(self, trainer: Trainer) -> None:
        if self.main:
            log.warning(
                "stopped by %s after step %d, saved as step %s; go on with: python train.py training.resume=%s",
                self.signals.received[0].name,
                trainer.progress.step,
                self._newest(),
                self.run_dir,
            )

    def _newest(self) -> int | None:
        steps = self.checkpoints.steps()
        return steps[-1] if steps else None

    def _save_again(self, trainer: Trainer) -> bool:
        """Whether the last step is saved; the disk may have had no room for it at first."""
        saved = decided_by_main(lambda: self._newest() == trainer.progress.step)
        if not saved:
            trainer.save()
            saved = decided_by_main(lambda: self._newest() == trainer.progress.step)
        return saved

    def _load_judged_weights(self, trainer: Trainer) -> None:
        if self.config.training.test_checkpoint == "best":
            best = self.checkpoints.find("best")
            load_weights(self.experiment.task, best, judged_weights(best))
        elif trainer.average is not None:
            trainer.average.put_in_place()

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
            "failed_saves": self.checkpoints.failures,
            "precision": trainer.precision,
            "embedding_width": self.config.encoder.dim,
            "best": self.checkpoints.best(),
            "checkpoint": self.config.training.test_checkpoint,
            "parameters": self.experiment.parameters(),
            "versions": versions(),
            **self.facts,
        }


def monitored_figure(run_dir: Path, monitor: str | None) -> float | None:
    """What a finished run returned."""
    log.info("%s is finished; nothing is left to do", run_dir)
    return read_json(run_dir / SUMMARY)["metrics"].get(monitor)


def set_determinism(wanted: bool) -> None:
    """Have torch refuse operations whose result depends on the order of threads; the CPU has hardly any."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
