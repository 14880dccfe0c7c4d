"""Runs a function on all ranks of a job, whatever started the job."""

import importlib
import logging
import os
import signal
import subprocess
import uuid
from typing import Any

from omegaconf import DictConfig, OmegaConf

from edge_glass.errors import Stopped, UserError

PORTS = range(20_000, 32_000)


def run(function: str, config: DictConfig, run_dir: str) -> Any:
    """Call `function(config, run_dir)` on every rank and return what rank 0 returns.

    Three ways to have ranks: the tasks of a SLURM job (under submitit), an outer torchrun, or, with neither, processes
    that this job starts itself (`launch.nproc_per_node`), so that each job of a sweep has a world of its own.

    Args:
        function: `module:name`; a name, so that spawned ranks can import it and this process need not.
        config: resolved.
        run_dir: the run's folder.

    Raises:
        UserError: from any rank, as that rank wrote it.
        ChildFailedError: a defect in a rank that this job started, with that rank's traceback.
    """
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    if "SUBMITIT_EXECUTOR" in os.environ:
        return _as_task(function, plain, run_dir)
    if "RANK" in os.environ or config.launch.nproc_per_node == 1:
        return call(function, plain, run_dir)
    return _spawn(function, plain, run_dir, config.launch.nproc_per_node)


def call(function: str, config: Any, run_dir: str) -> Any:
    """Import and call `function` on this rank."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(config, run_dir)


def _as_task(function: str, config: Any, run_dir: str) -> Any:
    from submitit import JobEnvironment
    from submitit.core.utils import UncompletedJobError
    from submitit.helpers import TorchDistributedEnvironment

    # submitit would draw a port at random, also among those that the kernel gives to clients (from 32768 on). Jobs that
    # share a node have numbers near each other, and so different ports.
    number = int(os.environ.get("SLURM_JOB_ID", JobEnvironment().job_id))
    os.environ["MASTER_PORT"] = str(PORTS[number % len(PORTS)])
    TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
    try:
        return _call_until_stopped(function, config, run_dir, JobEnvironment().job_id)
    except UncompletedJobError as error:
        raise UserError(
            f"{error} Go on with training.resume={run_dir}, or start with a higher hydra.launcher.max_num_timeout or "
            "hydra.launcher.timeout_min"
        ) from error


def _call_until_stopped(function: str, config: Any, run_dir: str, job: str) -> Any:
    """`call`; where a signal stops it, the first task has the job queued again, unless somebody wanted it to end."""
    try:
        return call(function, config, run_dir)
    except Stopped:
        # The first task says what becomes of the job, and may still be queueing it again. A task that failed before it
        # has done so would end it on clusters with KillOnBadExit; one without a result would leave the sweep waiting.
        if os.environ["RANK"] != "0":
            return None
        # submitit acts on SIGUSR2 alone, but clusters also preempt by SIGTERM, as scancel ends a job; a preempted job
        # that ends before it is killed counts as failed.
        if "SLURM_JOB_ID" in os.environ and _slurm_state(job) == "RUNNING":
            signal.raise_signal(signal.SIGUSR2)  # to submitit's handler, which ends this process
        raise


def _slurm_state(job: str) -> str:
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def _spawn(function: str, config: Any, run_dir: str, ranks: int) -> Any:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # elastic_launch leaves the number of threads alone, and ranks that fight for cores are many times slower.
    threads = config["launch"]["threads"] or max(1, (os.cpu_count() or 1) // ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    world = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they would log what is raised here, as tracebacks
    try:
        return elastic_launch(world, call_in_rank)(function, config, run_dir)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not isinstance(failure.message, dict):  # it had no time to say why
            raise UserError(f"rank {rank} ended without a word (out of memory?): {failure.message}") from error
        kind, _, message = failure.message["message"].partition(": ")
        if kind != UserError.__name__:
            raise
        raise UserError(message) from error


def call_in_rank(function: str, config: Any, run_dir: str) -> Any:
    """`call`, with every error for the user under one name: a rank's parent is told an error's name and words only."""
    try:
        return call(function, config, run_dir)
    except UserError as error:
        raise UserError(str(error)) from error
