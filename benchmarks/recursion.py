"""Does recursion earn its keep? Models of equal size on unseen 6 x 6 Sudoku, each trained for equally long.

python -m benchmarks.recursion                      three seeds, 200 seconds a run: about three quarters of an hour
python -m benchmarks.recursion --seconds 60 --seeds 1

Each model gets as many steps as it makes in that time of one core, and its learning rate falls over just those; the one
with the least recursion also gets as many steps as the one with recursion. The table is written to
benchmarks/recursion.json, and drawn beside it.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edge_glass.reports.figures import grouped_points
from edge_glass.training.summary import commit

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).with_suffix(".json")
ONE_STEP = ["decoder.model.latent_steps=1", "decoder.model.cycles=1"]
RECURSION, LEAST = "recursion", "n = T = 1"
MODELS = {
    RECURSION: [],
    LEAST: ONE_STEP,
    "n = T = 1, as many steps": ONE_STEP,
    "n = T = 1, one supervision step": [*ONE_STEP, "decoder.model.supervision=1"],
    "plain transformer": ["decoder.model.recursive=false", "decoder.model.supervision=1"],
}
TRIALS = (20, 80)  # steps; the difference leaves out what a run costs beside them


def train(overrides: list[str], folder: Path) -> dict[str, Any]:
    """The summary of a run of `experiment=trm_sudoku`."""
    command = [sys.executable, str(ROOT / "train.py"), "experiment=trm_sudoku", f"hydra.run.dir={folder}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def steps_in(seconds: float, overrides: list[str], folder: Path) -> int:
    """How many training steps a model makes in that time of a core, whatever else the machine does."""
    small = ["dataset.puzzles.train=256", "dataset.puzzles.val=16", "dataset.puzzles.test=16"]
    used = []
    for steps in TRIALS:
        before = _core_seconds()
        train([*overrides, *small, f"training.max_steps={steps}", f"training.eval_every={steps}"], folder / str(steps))
        used.append(_core_seconds() - before)
    return int(seconds * (TRIALS[1] - TRIALS[0]) / (used[1] - used[0]))


def _core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(seconds: float, seeds: int) -> dict[str, Any]:
    """Every model with every seed, one after the other."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        steps = {name: steps_in(seconds, MODELS[name], Path(temporary, f"trial-{i}")) for i, name in enumerate(MODELS)}
        steps["n = T = 1, as many steps"] = steps[RECURSION]
        print(steps, flush=True)
        for name, overrides in MODELS.items():
            every = f"training.eval_every={steps[name]}"
            for seed in range(seeds):
                length = [f"training.max_steps={steps[name]}", "training.max_seconds=null", every]
                summary = train([*overrides, *length, f"seed={seed}"], Path(temporary, f"{len(rows)}"))
                row = {
                    "model": name,
                    "seed": seed,
                    "exact_match": summary["metrics"]["test/exact_match"],
                    "cell_accuracy": summary["metrics"]["test/cell_accuracy"],
                    "steps": summary["steps"],
                    "seconds": summary["seconds"],
                    "parameters": summary["parameters"][-1]["total"],
                }
                rows.append(row)
                print(f"{name:34} seed {seed}: exact match {row['exact_match']:.3f}, {row['steps']} steps", flush=True)
    return {"seconds": seconds, "commit": commit(), "runs": rows, "table": table(rows)}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over seeds."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        exact = [row["exact_match"] for row in own]
        found.append(
            {
                "model": name,
                "exact_match": round(statistics.mean(exact), 4),
                "least": min(exact),
                "most": max(exact),
                "steps": own[0]["steps"],
                "parameters": own[0]["parameters"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    result = compare(options.seconds, options.seeds)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    grouped_points(
        {
            row["model"]: [run["exact_match"] for run in result["runs"] if run["model"] == row["model"]]
            for row in result["table"]
        },
        RESULT.with_suffix(".png"),
        "Unseen 6 x 6 Sudoku, equal parameters and time",
        "exact match",
    )
    for row in result["table"]:
        scores = f"{row['exact_match']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
        print(f"{row['model']:34} {scores}, {row['steps']} steps")


if __name__ == "__main__":
    main()
