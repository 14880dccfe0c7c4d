"""How long a job with two ranks takes to its first step, beside a bare script under torchrun.

    python -m benchmarks.startup --repeats 5

Three starts in turn, the median of each: a script that imports torch, joins two ranks and takes one step of a linear
layer in DistributedDataParallel, under torchrun; `python train.py launch.nproc_per_node=2` with small towers; and the
second job of a sweep, whose ranks are forked from the server of the first. Exits with 1 if the second takes more than
`LIMIT` seconds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests import mini

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 6.0  # seconds on two cores
BARE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
layer(torch.randn(4, 8)).sum().backward()
torch.optim.SGD(layer.parameters(), lr=0.1).step()
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text("a step")
dist.destroy_process_group()
"""


def first_seen(files: list[Path], command: list[str], folder: Path) -> list[float]:
    """Seconds from the start of the command until each file holds something."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    seen: dict[Path, float] = {}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=quiet, stderr=quiet) as process:
        while len(seen) < len(files) and process.poll() in (None, 0):
            for file in files:
                if file not in seen and file.is_file() and file.stat().st_size:
                    seen[file] = time.monotonic() - began
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return [seen[file] for file in files]


def bare(folder: Path) -> float:
    script = folder / "bare.py"
    script.write_text(BARE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    mark = folder / "mark"
    return first_seen([mark], [*torchrun, "--rdzv-endpoint=localhost:0", str(script), str(mark)], folder)[0]


def sweep(folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds to the first step of the first job, and from the start of the second job to its first step."""
    small = ["launch.nproc_per_node=2", "optimization.batch_size=4", "training.max_steps=1", "seed=0,1"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides, *small, f"hydra.sweep.dir={folder}/sweep"]
    files = [folder / "sweep" / name for name in ("0/metrics.jsonl", "1/job.json", "1/metrics.jsonl")]
    first, second_began, second = first_seen(files, command, folder)
    return first, second - second_began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {"bare script under torchrun": [], "first job": [], "second job of a sweep": []}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        overrides = mini.overrides(mini.write_data(data), mini.write_text_tower(data / "text"))
        for repeat in tqdm(range(repeats), desc="startup"):
            folder = data / str(repeat)
            folder.mkdir()
            times["bare script under torchrun"].append(bare(folder))
            first, second = sweep(folder, overrides)
            times["first job"].append(first)
            times["second job of a sweep"].append(second)
    medians = {what: statistics.median(values) for what, values in times.items()}
    for what, median in medians.items():
        ratio = median / medians["bare script under torchrun"]
        print(f"{what:<28} {median:6.2f} s to the first step  {ratio:5.2f} x  (from {min(times[what]):.2f} s)")
    sys.exit(medians["first job"] > LIMIT)


if __name__ == "__main__":
    main()
