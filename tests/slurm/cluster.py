"""A real SLURM of one node on this machine, for tests: its files in a folder of its own, its ports its own.

python -m tests.slurm.cluster    # install and start it once; exit code 77 and the reason where it cannot be had
"""

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ["slurm-wlm", "munge"]

# Root throughout and no cgroups, so that a container will do. A queued-again job waits for cred_expire (default 120 s).
# Jobs share the node's cores; those in `high` send those in `main` away, with the signal that they asked for.
SLURM_CONF = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PreemptExemptTime=0
JobRequeue=1
KillOnBadExit=1
ReturnToService=2
KillWait=10
MinJobAge=600
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Default=YES Nodes=localhost PriorityTier=1 OverSubscribe=FORCE:4 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=localhost PriorityTier=10 OverSubscribe=NO PreemptMode=OFF
"""
CGROUP_CONF = "CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n"


class NoCluster(Exception):
    """SLURM cannot be had on this machine; the message says why."""


def install() -> None:
    """Install SLURM and munge from the distribution, where they are missing.

    Raises:
        NoCluster: no root, no apt-get, or no packages.
    """
    if os.geteuid() != 0:
        raise NoCluster("a SLURM that starts jobs has to run as root")
    if all(shutil.which(program) for program in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    if shutil.which("apt-get") is None:
        raise NoCluster("neither SLURM nor apt-get is there")
    apt_get = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run([*apt_get, *command], env=environment, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise NoCluster(f"apt-get {command[0]} did not end in {error.timeout:.0f} s") from error
        if done.returncode:
            raise NoCluster(f"apt-get {command[0]} failed: {(done.stderr or done.stdout).strip()}")


class Cluster:
    """A running cluster.

    Attributes:
        environment: for the cluster's commands, and for programs that call them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def command(self, *words: str) -> str:
        """What a command of the cluster prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}\n{self.logs()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the cluster knows of a job, such as JobState, Restarts and ExitCode."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "-o", number)))

    def jobs(self) -> list[str]:
        """Numbers of the jobs that wait or run, parts of an array as <array>_<part>."""
        return self.command("squeue", "--noheader", "--array", "--format=%i").split()

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        tails = []
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            tails.append("\n".join([f"-- {path.name}", *lines[-30:]]))
        return "\n".join(tails)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a cluster, stop it and its jobs, and remove what it wrote.

    Raises:
        NoCluster: it cannot be installed here.
    """
    install()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge refuses a socket that others cannot reach
    cluster = Cluster(folder)
    daemons: list[subprocess.Popen] = []
    try:
        _write_files(folder)
        daemons.append(_start(cluster, "munged", *_munge_options(folder / "munge")))
        wait_for("munge", (folder / "munge" / "socket").exists, daemons[-1])
        daemons.append(_start(cluster, "slurmctld", "-D"))
        daemons.append(_start(cluster, "slurmd", "-D", "-N", "localhost"))
        wait_for("an idle node", lambda: _node_state(cluster) == "idle", daemons[-1], seconds=60)
        yield cluster
    except BaseException:
        print(cluster.logs(), file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, TimeoutError):
            if len(daemons) == 3:
                _end_jobs(cluster)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(
    what: str, come: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 30
) -> None:
    """Wait until `come()` is true.

    Raises:
        TimeoutError: it did not become true in time, or `process`, which was to bring it about, has ended.
    """
    end = time.monotonic() + seconds
    while not come():
        if process is not None and process.poll() is not None:
            raise TimeoutError(f"waited for {what}, but {process.args} ended with {process.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def _write_files(folder: Path) -> None:
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    ports = dict(zip(("control_port", "node_port"), _free_ports(2), strict=True))
    # Ranks meet at a port that follows from their job's number: a second such cluster here must number otherwise.
    first_job = random.randrange(1000, 60_000)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, first_job=first_job, **ports))


def _munge_options(folder: Path) -> list[str]:
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    return ["--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


def _start(cluster: Cluster, *words: str) -> subprocess.Popen:
    with (cluster.folder / f"{words[0]}.out.log").open("w") as output:
        return subprocess.Popen(words, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT)


def _node_state(cluster: Cluster) -> str | None:
    try:
        return cluster.command("sinfo", "--noheader", "--partition=main", "--format=%T")
    except RuntimeError:  # not up yet
        return None


def _end_jobs(cluster: Cluster) -> None:
    for job in cluster.jobs():
        cluster.command("scancel", "--signal=KILL", "--full", job)
        cluster.command("scancel", job)
    wait_for("the end of all jobs", lambda: not cluster.jobs(), seconds=30)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    try:
        with running_cluster():
            print("SLURM starts here")
    except (NoCluster, TimeoutError) as reason:
        print(reason)
        sys.exit(77)
