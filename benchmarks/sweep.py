"""A sweep over nested widths, six jobs, with one store of features for all and without any."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.alignment import train, write_data, write_towers
from benchmarks.sides import row, seconds

WIDTHS = ("[512]", "[512,256]", "[512,256,128]", "[512,128]", "[512,64]", "[512,256,128,64]")


def rows() -> list[dict[str, Any]]:
    """End to end, job after job."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        write_towers(folder)

        def sweep(*more: str) -> None:
            name = "with" if not more else "without"
            for number, widths in enumerate(WIDTHS):
                train(folder, f"{name}-{number}", f"encoder.widths={widths}", *more)

        ours, theirs = seconds(sweep), seconds(lambda: sweep("cache.enabled=false"))
    return [row("mrl sweep of 6 jobs", "the same without a cache", [(ours, theirs)], 5.0, "the same configs")]


if __name__ == "__main__":
    print(rows())
