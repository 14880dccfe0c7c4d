"""The experiment that a config describes, new or out of a run's folder."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from edge_glass.config import ConfigError, load_config
from edge_glass.experiments.experiment import Experiment
from edge_glass.experiments.multimodal import MultimodalExperiment
from edge_glass.experiments.puzzles import PuzzleExperiment
from edge_glass.runs import CONFIG, SUMMARY, read_json, write_json
from edge_glass.training.checkpoints import Checkpoints, judged_weights, load_weights


def build_experiment(config: DictConfig) -> Experiment:
    """Everything a run needs, or an error before anything is written.

    Raises:
        UserError: data that is not there, arguments that a class does not take, weights that cannot be loaded.
    """
    return MultimodalExperiment(config) if config.dataset.puzzles is None else PuzzleExperiment(config)


def open_run(folder: str, checkpoint: str = "last", device: str = "auto") -> tuple[Path, Experiment, Path]:
    """A finished or stopped run with the weights that it is judged by.

    Args:
        folder: the run's folder.
        checkpoint: `last` or `best`.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The folder, the experiment, and the folder of the checkpoint.

    Raises:
        UserError: no run there, or no checkpoint that fits it.
    """
    run_dir = Path(folder).expanduser()
    if checkpoint not in ("last", "best"):
        raise ConfigError(f"checkpoint={checkpoint!r}: give 'last' or 'best'")
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"run={folder}: no run there ({run_dir / CONFIG} is missing)")
    weights = Checkpoints(run_dir).find(checkpoint)
    config = load_config(run_dir / CONFIG)
    config.training.device = device
    experiment = build_experiment(config)
    load_weights(experiment.task, weights, judged_weights(weights))
    return run_dir, experiment, weights


def evaluate_folder(folder: str, checkpoint: str = "last", device: str = "auto") -> dict[str, Any]:
    """Evaluate a checkpoint of a run and write its summary, figures and report anew.

    Args:
        folder: the run's folder.
        checkpoint: `last` or `best`.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The summary.

    Raises:
        UserError: no run there, or no checkpoint that fits it.
    """
    run_dir, experiment, weights = open_run(folder, checkpoint, device)
    path = run_dir / SUMMARY
    summary = read_json(path) if path.is_file() else {"name": experiment.config.name}
    experiment.prepare()
    validation = experiment.validation()
    results = experiment.results(run_dir, {} if validation is None else validation(experiment.task))
    summary |= {"checkpoint": checkpoint, "evaluated": weights.name, **results.summary()}
    write_json(path, summary)
    results.show(run_dir, summary)
    return summary
