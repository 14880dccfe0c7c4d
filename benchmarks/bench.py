"""Side by side with peers, on the same work: `make bench`, or one row: `make bench ROW=nested_loss`.

Each row runs ours and the peer in turn and gives the median of the ratio (how many times as fast) and its spread. A row
below its floor ends the command with exit code 1. Needs `pip install -e ".[bench]"`. The table is written to
benchmarks/results.json.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from edge_glass.reports.tables import markdown
from edge_glass.training.summary import commit, versions

RESULTS = Path(__file__).with_name("results.json")
# Modules of this package with a function `rows`.
ROWS = ("alignment", "sweep", "nested_loss", "cached_rows", "resampler", "speech")


def machine() -> dict[str, Any]:
    """What the ratios were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu, "matmul_gflops": round(_matmul_gflops(), 1)}


def _matmul_gflops(size: int = 1024, repeats: int = 10) -> float:
    from benchmarks.sides import seconds

    a, b = torch.randn(size, size), torch.randn(size, size)
    took = min(seconds(lambda: a @ b) for _ in range(repeats))
    return 2 * size**3 / took / 1e9


def _figures(row: dict[str, Any]) -> list[str]:
    least, most = row["spread"]
    return [f"{row['ratio']:.2f}", f"{least:.2f} to {most:.2f}", str(row["floor"]), str(row["equal"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="?", choices=ROWS)
    chosen = parser.parse_args().row
    torch.set_num_threads(1)  # equal for both sides
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else {}
    below = []
    for module in [chosen] if chosen else ROWS:
        for row in importlib.import_module(f"benchmarks.{module}").rows():
            kept[row["name"]] = row
            below += [row["name"]] if row["ratio"] < row["floor"] else []
            print(f"{row['name']}: {row['ratio']:.2f} x {row['peer']}, floor {row['floor']}", flush=True)
    found = {"commit": commit(), "machine": machine(), "versions": versions(), "rows": kept}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    header = ["row", "peer", "times as fast", "spread", "floor", "same result"]
    cells = [[*(str(row[key]) for key in ("name", "peer")), *_figures(row)] for row in kept.values()]
    print("\n" + markdown(header, cells))
    if below:
        print(f"below the floor: {', '.join(below)}", file=sys.stderr)
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main())
