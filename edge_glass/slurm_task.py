"""This process as one rank among the tasks of a SLURM job that submitit has started."""

import logging
import os
import signal
import subprocess
from typing import Any

from edge_glass.errors import Stopped, UserError
from edge_glass.local_ranks import call

log = logging.getLogger(__name__)
PORTS = range(20_000, 32_000)


def is_one() -> bool:
    """Whether this process is such a task."""
    return "SUBMITIT_EXECUTOR" in os.environ


def run(function: str, config: Any, run_dir: str) -> Any:
    """Call `function(config, run_dir)` as a rank; have a job that was stopped queued again, unless it was cancelled.

    Returns:
        What the function returns; None from a task other than the first when the run was stopped.

    Raises:
        UserError: from the function, or because the job was queued again too often already.
        Stopped: by the first task, when the run was told to stop and is not queued again.
    """
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
    try:
        return call(function, config, run_dir)
    except Stopped:
        # The first task says what becomes of the job, and may still be queueing it again. A task that failed before it
        # has done so would end it on clusters with KillOnBadExit; one without a result would leave the sweep waiting.
        if os.environ["RANK"] != "0":
            return None
        # submitit acts on SIGUSR2 alone, but clusters also preempt by SIGTERM, as scancel ends a job; a preempted job
        # that ends before it is killed counts as failed.
        if "SLURM_JOB_ID" in os.environ and _state(job, run_dir) == "RUNNING":
            signal.raise_signal(signal.SIGUSR2)  # to submitit's handler, which ends this process
        raise


def _state(job: str, run_dir: str) -> str:
    """SLURM's word for where the job is, empty where it does not say; a job that scancel ends is no longer RUNNING."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "whether job %s was cancelled or preempted is not known (%s), so it is not queued again; go on with "
            "training.resume=%s",
            job,
            error,
            run_dir,
        )
        return ""
