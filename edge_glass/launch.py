"""Runs a function on all ranks of a job, whatever started the job."""

import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from edge_glass import local_ranks, slurm_task
from edge_glass.local_ranks import call, run_local_ranks


def warm_up(config: DictConfig) -> None:
    """Begin to import what the ranks of this job will need, if it starts any itself; the config may still be wrong."""
    if OmegaConf.select(config, "launch.nproc_per_node") not in (None, 1) and not _launched():
        local_ranks.warm_up()


def run(function: str, config: DictConfig, run_dir: str) -> Any:
    """Call `function(config, run_dir)` on every rank and return what rank 0 returns.

    Three ways to have ranks: the tasks of a SLURM job (under submitit), an outer torchrun, or, with neither, processes
    that this job starts itself (`launch.nproc_per_node`), so that each job of a sweep has a world of its own.

    Args:
        function: `module:name`; a name, so that ranks can import it and this process need not.
        config: resolved.
        run_dir: the run's folder.

    Raises:
        UserError: from any rank, as that rank wrote it.
        RankError: a defect in a rank that this job started, with that rank's traceback.
        Stopped: the run was told to stop and has saved itself.
    """
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    if slurm_task.is_one():
        return slurm_task.run(function, plain, run_dir)
    ranks = config.launch.nproc_per_node
    if _launched() or ranks == 1:
        return call(function, plain, run_dir)
    threads = config.launch.threads or max(1, (os.cpu_count() or 1) // ranks)
    return run_local_ranks(function, plain, run_dir, ranks, threads)


def _launched() -> bool:
    """True in a rank that something else has started: torchrun or SLURM."""
    return "RANK" in os.environ or slurm_task.is_one()
