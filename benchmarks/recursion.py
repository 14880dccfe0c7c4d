"""Does recursion earn its keep? Models of equal size on unseen 6 x 6 Sudoku.

python -m benchmarks.recursion                      three seeds, 3,000 steps and more: about an hour of one core
python -m benchmarks.recursion --steps 1000 --seeds 1

In a training step recursion applies the net 16 times, n = T = 1 half as often: it is trained for as many steps, and for
twice as many, which is as much computing. The others get about the time that recursion takes. The table is written to
benchmarks/recursion.json, and drawn beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_glass.reports.figures import grouped_points
from edge_glass.training.summary import commit

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).with_suffix(".json")
ONE_STEP = ["decoder.model.latent_steps=1", "decoder.model.cycles=1"]
MODELS = {  # overrides, and how many times the steps of recursion
    "recursion (n = 3)": ([], 1),
    "n = T = 1": (ONE_STEP, 1),
    "n = T = 1, as much computing": (ONE_STEP, 2),
    "n = T = 1, one supervision step": ([*ONE_STEP, "decoder.model.supervision=1"], 1),
    "plain transformer": (["decoder.model.recursive=false", "decoder.model.supervision=1"], 2),
}


def train(overrides: list[str], folder: Path) -> dict[str, Any]:
    """The summary of a run of `experiment=trm_sudoku`."""
    command = [sys.executable, str(ROOT / "train.py"), "experiment=trm_sudoku", f"hydra.run.dir={folder}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def compare(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """What is known after each run: every model with one seed, then with the next."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(seeds):
            for name, (overrides, times) in MODELS.items():
                length = [f"training.max_steps={times * steps}", f"training.eval_every={times * steps}"]
                limits = [*length, "training.max_seconds=null", f"seed={seed}"]
                summary = train([*overrides, *limits], Path(temporary, f"{len(rows)}"))
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
                yield {"commit": commit(), "runs": rows, "table": table(rows)}


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
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the model with recursion")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for result in compare(options.steps, options.seeds):
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    grouped_points(
        {
            row["model"]: [run["exact_match"] for run in result["runs"] if run["model"] == row["model"]]
            for row in result["table"]
        },
        RESULT.with_suffix(".png"),
        "Unseen 6 x 6 Sudoku, equal parameters",
        "exact match",
    )
    for row in result["table"]:
        scores = f"{row['exact_match']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
        print(f"{row['model']:34} {scores}, {row['steps']} steps")


if __name__ == "__main__":
    main()
