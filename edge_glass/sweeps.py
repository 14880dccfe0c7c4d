"""The jobs of a sweep: what each came to, kept in its folder and told at the end."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from edge_glass.cli import refuse
from edge_glass.config import ConfigError
from edge_glass.errors import UserError
from edge_glass.runs import read_json, write_json

JOB = "job.json"
# The rank of this process by the names of torchrun, SLURM and submitit's local stand-in for it.
RANK_NAMES = ("RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID")


class SweepOutcomes(Callback):
    """Hydra calls this before and after each job, in the process that runs it, wherever that is.

    Each job's folder gets a `job.json`: number, overrides, status (`running`, `completed`, `failed`), and its value or
    error. A job that was killed stays `running`.
    """

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            check_sweep(list(config.hydra.overrides.task))
        except UserError as error:  # Hydra would turn it into a warning
            refuse(error)
        SweepOutcomes.folder = Path(config.hydra.sweep.dir)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        _note(config, status="running")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status is JobStatus.COMPLETED:
            _note(config, status="completed", monitor=config.training.monitor, value=job_return.return_value)
        else:
            error = job_return._return_value
            _note(config, status="failed", error=str(error) if isinstance(error, UserError) else repr(error))


def check_sweep(overrides: list[str]) -> None:
    """The sweeps that would not do what they say.

    Args:
        overrides: of the command line.

    Raises:
        ConfigError: a sweep under torchrun, or one over ablations.
    """
    if "RANK" in os.environ and "SUBMITIT_EXECUTOR" not in os.environ:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "2")
        raise ConfigError(
            "torchrun starts one world, which ends with the first job: a sweep needs one a job. Give\n  "
            f"python train.py -m {' '.join(overrides)} launch.nproc_per_node={ranks}".rstrip()
        )
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group == "ablation" and override.is_sweep_override():
            rest = [line for line in overrides if line != override.input_line]
            commands = [" ".join(["python train.py -m", f"ablation={name}", *rest]) for name in _choices(override)]
            raise ConfigError(
                f"{override.input_line}: an ablation is a sweep of its own, and Hydra would drop the settings of both. "
                "Run one after the other:\n  " + "\n  ".join(commands)
            )


def show_outcomes(folder: Path | None = None) -> None:
    """Print what each job of a sweep came to, from the jobs' folders alone.

    Args:
        folder: of the sweep; None: of the one that this process has just run, if any.
    """
    if folder is None:
        folder, SweepOutcomes.folder = SweepOutcomes.folder, None
    jobs = [] if folder is None else [read_json(path) for path in folder.glob(f"*/{JOB}")]
    if not jobs:
        return
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    print(f"\nsweep: {folder}")
    for job in sorted(jobs, key=lambda job: job["number"]):
        own = " ".join(override for override in job["overrides"] if override not in common)
        print(f"  #{job['number']:<3} {own:<40} {_told(job)}")
    count = Counter(job["status"] for job in jobs)
    print(f"{count['completed']} of {len(jobs)} jobs completed, {count['failed']} failed", end="")
    if count["running"]:
        print(f", {count['running']} stopped or still running", end="")
    if count["completed"] < len(jobs):
        print(f"\ngo on with the same command and hydra.sweep.dir={folder} training.resume=auto", end="")
    print(flush=True)


def _told(job: dict[str, Any]) -> str:
    if job["status"] == "completed":
        value = job["value"]
        return f"{job['monitor']} {value:.4f}" if isinstance(value, float) else "completed"
    if job["status"] == "failed":
        return f"FAILED: {job['error'].splitlines()[0]}"
    return "no outcome: stopped, killed or still running"


def _note(config: DictConfig, **facts: Any) -> None:
    rank = next((os.environ[name] for name in RANK_NAMES if name in os.environ), "0")
    if config.hydra.mode is not RunMode.MULTIRUN or rank != "0":
        return
    overrides = OmegaConf.to_container(config.hydra.overrides.task)
    job = {"number": config.hydra.job.num, "overrides": overrides, **facts}
    write_json(Path(config.hydra.runtime.output_dir) / JOB, job)


def _choices(override: Any) -> list[str]:
    try:
        return [str(choice) for choice in override.sweep_string_iterator()]
    except Exception:  # a range, a glob: named by no list
        return ["<one of them>"]
