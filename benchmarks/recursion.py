"""Does recursion earn its keep? Four models of equal size on unseen 6 x 6 Sudoku, each trained for equally long.

python -m benchmarks.recursion                      three seeds, five minutes a run: about an hour and a quarter
python -m benchmarks.recursion --seconds 60 --seeds 1

Each model gets as many steps as it makes in that time on this machine, and its learning rate falls over just those. The
table is written to benchmarks/recursion.json, and drawn beside it.
"""

import argparse
import json
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
MODELS = {
    "recursion": [],
    "least recursion (n = T = 1)": ONE_STEP,
    "n = T = 1, one supervision step": [*ONE_STEP, "decoder.model.supervision=1"],
    "plain transformer": ["decoder.model.recursive=false", "decoder.model.supervision=1"],
}
TRIAL_STEPS = 60  # by which the speed of a model is known


def train(overrides: list[str], folder: Path) -> dict[str, Any]:
    """The summary of a run of `experiment=trm_sudoku`."""
    command = [sys.executable, str(ROOT / "train.py"), "experiment=trm_sudoku", f"hydra.run.dir={folder}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def steps_in(seconds: float, overrides: list[str], folder: Path) -> int:
    """How many training steps a model makes in that time."""
    short = [f"training.max_steps={TRIAL_STEPS}", f"training.eval_every={TRIAL_STEPS}", "dataset.puzzles.train=256"]
    small = ["dataset.puzzles.val=16", "dataset.puzzles.test=16"]
    return int(seconds * TRIAL_STEPS / train([*overrides, *short, *small], folder)["seconds"])


def compare(seconds: float, seeds: int) -> dict[str, Any]:
    """Every model with every seed, one after the other."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        steps = {name: steps_in(seconds, MODELS[name], Path(temporary, name)) for name in MODELS}
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
    parser.add_argument("--seconds", type=float, default=300.0, help="training time of each run")
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
