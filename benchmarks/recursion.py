"""Does recursion earn its keep? Models of equal size on unseen 6 x 6 Sudoku.

python -m benchmarks.recursion                      three seeds, 3,000 steps and more: about an hour of one core
python -m benchmarks.recursion --steps 1000 --seeds 1 --to elsewhere.json

Runs that the file holds already are not done again.

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
from edge_glass.runs import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).with_suffix(".json")
ONE_STEP = ["decoder.model.latent_steps=1", "decoder.model.cycles=1"]
# Overrides, and how many times the steps of recursion; the last two follow when all seeds of the others are done.
MODELS: dict[str, tuple[list[str], int]] = {
    "recursion (n = 3)": ([], 1),
    "n = T = 1": (ONE_STEP, 1),
    "plain transformer": (["decoder.model.recursive=false", "decoder.model.supervision=1"], 2),
    "n = T = 1, as much computing": (ONE_STEP, 2),
    "n = T = 1, one supervision step": ([*ONE_STEP, "decoder.model.supervision=1"], 1),
}
FIRST = 3


def train(overrides: list[str], folder: Path) -> dict[str, Any]:
    """The summary of a run of `experiment=trm_sudoku`."""
    command = [sys.executable, str(ROOT / "train.py"), "experiment=trm_sudoku", f"hydra.run.dir={folder}", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def compare(steps: int, seeds: int, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is known at first, with the given runs, and after each further run."""
    done = {(row["model"], row["seed"], row["steps"]) for row in rows}
    names = list(MODELS)
    order = [(name, seed) for part in (names[:FIRST], names[FIRST:]) for seed in range(seeds) for name in part]
    with tempfile.TemporaryDirectory() as temporary:
        yield {"runs": rows, "table": table(rows)}
        for name, seed in order:
            overrides, times = MODELS[name]
            if (name, seed, times * steps) in done:
                continue
            length = [f"training.max_steps={times * steps}", f"training.eval_every={times * steps}"]
            limits = [*length, "training.max_seconds=null", f"seed={seed}"]
            summary = train([*overrides, *limits], Path(temporary, f"{len(rows)}"))
            row = {
                "model": name,
                "seed": seed,
                "exact_match": summary["metrics"]["test/exact_match"],
                "cell_accuracy": summary["metrics"]["test/cell_accuracy"],
                "steps": summary["steps"],
                "parameters": summary["parameters"][-1]["total"],
                "commit": summary["commit"],
            }
            rows = [*rows, row]
            print(f"{name:34} seed {seed}: exact match {row['exact_match']:.3f}, {row['steps']} steps", flush=True)
            yield {"runs": rows, "table": table(rows)}


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
                "exact_match_by_seed": exact,
                "steps": own[0]["steps"],
                "parameters": own[0]["parameters"],
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the model with recursion")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=RESULT)
    options = parser.parse_args()
    known = json.loads(options.to.read_text(encoding="utf-8"))["runs"] if options.to.is_file() else []
    result: dict[str, Any] = {}
    for result in compare(options.steps, options.seeds, known):
        write_json(options.to, result)
        groups = {row["model"]: row["exact_match_by_seed"] for row in result["table"]}
        title = "Unseen 6 x 6 Sudoku, equal parameters"
        grouped_points(groups, options.to.with_suffix(".png"), title, "exact match")
    for row in result["table"]:
        scores = f"{row['exact_match']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
        print(f"{row['model']:34} {scores}, {row['steps']} steps")


if __name__ == "__main__":
    main()
