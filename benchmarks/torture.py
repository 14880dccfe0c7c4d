"""Break short runs at random, take them up again, and compare them with runs that nothing happened to.

make torture
python -m benchmarks.torture --rounds 50 --seed 0
python -m benchmarks.torture --rounds 3 --only "full disk"

Each round is the real command in a process, a fault at a random step, and `training.resume=<folder>` until the run is
done. A round is sound if every process said how it ended, no more steps were lost than the checkpoints allow, and the
last weights and all logged figures equal those of the run that was left alone, bit for bit. Exits with 1 if a round
was not; its folder is kept. The full disk needs root, for a small tmpfs (`unshare -rm` will do).
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.faults import FAULTS, SAVE_EVERY, STEPS, Fault, Round, TooLate, can_mount, release
from benchmarks.jobs import Hangs, Job, checkpoints_of, rows_of, step_of
from tests import mini

RESULTS = Path(__file__).with_suffix(".json")
CLOCKS = ("seconds", "samples_per_second")  # all of a row that two equal runs may differ in
TRIES = 3  # a fault may come too late, and a run may need to be resumed more than once
# Everything that draws random numbers in training, so that none of it can be forgotten unnoticed.
OVERRIDES = (
    "encoder.image.projection.dropout=0.2",
    "encoder.audio.projection.dropout=0.2",
    "+backbone.audio.apply_spec_augment=true",
    "+backbone.audio.mask_time_prob=0.2",
    "+backbone.audio.mask_time_length=2",
    "dataset.max_bad_share=0.2",
    f"training.max_steps={STEPS}",
    "training.max_seconds=3600",
    f"training.save_every={SAVE_EVERY}",
    f"training.eval_every={STEPS // 2}",
)
TORN_ROWS = 4


@dataclass
class Result:
    """What came of a round.

    Attributes:
        fault: its name.
        outcome: in words, for the table.
        lost: steps that had to be trained again.
        equal: to the run that nothing happened to.
        problems: why the round was not sound; empty if it was.
        facts: what was drawn.
    """

    fault: str
    outcome: str = ""
    lost: int = 0
    equal: bool = False
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Data, towers, and the runs that nothing happens to, which are made when they are first needed.

    Args:
        folder: for everything.
        draw: decides which rows are torn.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.folder = folder
        self.tower = mini.write_text_tower(folder / "text")
        (folder / "data").mkdir()
        mini.write_data(folder / "data")
        self.torn = write_torn_data(folder / "torn", draw)
        self._clean: dict[tuple[int, bool], Path] = {}

    def arguments(self, fault: Fault) -> list[str]:
        data = self.folder / ("torn" if fault.torn_rows else "data")
        small = mini.overrides(data, self.tower)
        return [*small, *OVERRIDES, f"launch.nproc_per_node={fault.ranks}"]

    def clean(self, fault: Fault) -> Path:
        """The folder of a run of the same config that nothing happened to."""
        kind = (fault.ranks, fault.torn_rows)
        if kind not in self._clean:
            run_dir = self.folder / f"clean-{fault.ranks}{'-torn' * fault.torn_rows}"
            job = Job([*self.arguments(fault), f"hydra.run.dir={run_dir}"], self.folder / f"{run_dir.name}.txt")
            if job.end() != 0:
                raise SystemExit(f"error: the run without a fault failed; nothing can be compared:\n{job.text()}")
            self._clean[kind] = run_dir
        return self._clean[kind]


def write_torn_data(folder: Path, draw: random.Random) -> set[str]:
    """The mini data with some rows that cannot be decoded; returns their ids."""
    images, speech = mini.image_rows(), mini.speech_rows()
    torn = draw.sample([*images, *speech], TORN_ROWS)
    for row in torn:
        medium = row.get("image") or row["audio"]
        half = medium["bytes"][: len(medium["bytes"]) // 2]
        medium["bytes"] = draw.choice([b"", b"<html>404</html>", bytes(len(half)), half[:20]])
    folder.mkdir()
    mini.write_parquet(folder / "images.parquet", images)
    mini.write_parquet(folder / "speech.parquet", speech)
    return {row["sample_id"] for row in torn}


def play_round(fault: Fault, bench: Bench, folder: Path, draw: random.Random) -> Result:
    """Break a run, take it up again, judge it."""
    clean = bench.clean(fault)
    result = Result(fault.name)
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        play = Round(folder, bench.arguments(fault), draw)
        try:
            end = fault.strike(play)
            break
        except TooLate as late:
            result.problems = [f"the run ended before the fault came:\n{late}"]
            release(play.run_dir)
        except Hangs as hangs:
            result.problems = [f"the run hangs: {hangs}"]
            return result
    else:
        return result
    result.problems.clear()
    result.facts = play.facts
    code, text = end.job.process.returncode, end.job.text()
    if code not in end.codes:
        result.problems.append(f"exit code {code}, not {' or '.join(str(int(c)) for c in end.codes)}")
    if not re.search(end.says, text):
        result.problems.append(f"it did not say {end.says!r}")
    if "Traceback" in text:
        result.problems.append("it ended with a traceback")
    reached = step_of(play.run_dir)
    if code == 0:
        result.outcome = "went through"
    else:
        result.outcome = "stopped itself, resumed" if code > 0 else "resumed"
        said = resume(play)
        result.problems += said.problems
        result.lost = max(0, reached - said.went_on_after)  # ranks may have saved themselves since
        if end.resume_says and not re.search(end.resume_says, said.text):
            result.problems.append(f"the run that went on did not say {end.resume_says!r}")
        if result.lost > end.may_lose:
            result.problems.append(
                f"{result.lost} steps lost, {end.may_lose} allowed: {said.went_on_after} of {reached}"
            )
    found = list(differences(play.run_dir, clean))
    if fault.torn_rows:
        found += torn_rows_missed(play.run_dir, bench.torn)
    result.equal = not found
    result.problems += found
    return result


@dataclass
class Resumed:
    """How it went to take up a run.

    Attributes:
        went_on_after: the step of the first attempt.
        text: what all attempts printed.
        problems: why it is not done.
    """

    went_on_after: int = 0
    text: str = ""
    problems: list[str] = field(default_factory=list)


def resume(play: Round) -> Resumed:
    """`training.resume` until the run is done."""
    resumed = Resumed()
    for attempt in range(TRIES):
        job = Job([f"training.resume={play.run_dir}"], play.folder / f"resumed-{attempt}.txt")
        try:
            code = job.end()
        except Hangs as hangs:
            resumed.problems.append(f"the run that went on hangs: {hangs}")
            return resumed
        text = job.text()
        resumed.text += text
        found = re.search(r"going on after step (\d+)", text)
        if attempt == 0 and found:
            resumed.went_on_after = int(found[1])
        if code == 0:
            return resumed
        resumed.problems.append(f"the run that went on ended with exit code {code}")
    return resumed


def differences(found: Path, clean: Path) -> Iterator[str]:
    """What of two runs that should be one is not equal."""
    if not (found / "summary.json").is_file():
        yield "no summary.json: it was not finished"
        return
    weights = [(checkpoints_of(run)[-1] / "model.safetensors") for run in (found, clean)]
    if weights[0].parent.name != weights[1].parent.name or weights[0].read_bytes() != weights[1].read_bytes():
        yield f"other weights: {weights[0].parent.name}"
    rows, expected = ([without_clocks(row) for row in rows_of(run)] for run in (found, clean))
    if rows != expected:
        at = next((i for i, pair in enumerate(zip(rows, expected, strict=False)) if pair[0] != pair[1]), len(expected))
        yield f"other metrics.jsonl: {len(rows)} rows of {len(expected)}, row {at} is the first other one"
    figures = [json.loads((run / "summary.json").read_text()) for run in (found, clean)]
    for name in ("metrics", "steps", "samples", "skipped_rows", "best", "stopped_by"):
        if figures[0].get(name) != figures[1].get(name):
            yield f"other {name} in summary.json"


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in CLOCKS}


def torn_rows_missed(run_dir: Path, torn: set[str]) -> list[str]:
    """A complaint if the rows that cannot be decoded are not the ones that the summary counts."""
    skipped = json.loads((run_dir / "summary.json").read_text())["skipped_rows"]
    named = {row["sample_id"] for row in skipped["rows"]}
    if named == torn and skipped["count"] == len(torn):
        return []
    return [f"skipped rows {sorted(named)}, but {sorted(torn)} cannot be decoded"]


def table_of(results: list[Result]) -> list[dict[str, Any]]:
    """A row a fault, in the order of their first rounds."""
    rows = []
    for name in dict.fromkeys(fault.name for fault in FAULTS):
        of_fault = [result for result in results if result.fault == name]
        if not of_fault:
            continue
        counts: dict[str, int] = {}
        for result in of_fault:
            outcome = "FAILED" if result.problems else result.outcome
            counts[outcome] = counts.get(outcome, 0) + 1
        rows.append(
            {
                "fault": name,
                "rounds": len(of_fault),
                "outcome": ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
                "steps lost (max)": max(result.lost for result in of_fault),
                "equal to the clean run": f"{sum(result.equal for result in of_fault)} of {len(of_fault)}",
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="right" if name in ("rounds", "steps lost (max)") else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=max(120, shutil.get_terminal_size().columns)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[fault.name for fault in FAULTS], help="this fault in every round")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    faults = [fault for fault in FAULTS if options.only in (None, fault.name)]
    if any(fault.mounts for fault in faults) and not can_mount(folder / "mount"):
        print("no full disk: only root may mount a small one (try `unshare -rm`)", file=sys.stderr)
        faults = [fault for fault in faults if not fault.mounts]
    bench = Bench(folder, draw)
    drawn: list[Fault] = []
    while len(drawn) < options.rounds:  # each as often as the others, in an order that is drawn
        drawn += draw.sample(faults, len(faults))
    results = []
    for number, fault in enumerate(bar := tqdm(drawn[: options.rounds], unit="round")):
        bar.set_postfix_str(fault.name)
        place = folder / f"round-{number:02d}"
        try:
            result = play_round(fault, bench, place, draw)
            if result.problems:
                keep(place, result, bar)
        finally:
            release(place / "run")
        if not result.problems:
            shutil.rmtree(place)
        results.append(result)
    rows = table_of(results)
    RESULTS.write_text(
        json.dumps(
            {"seed": options.seed, "steps": STEPS, "save_every": SAVE_EVERY, "table": rows}
            | {"rounds": [asdict(result) for result in results]},
            indent=2,
        )
        + "\n"
    )
    show(rows)
    if any(result.problems for result in results):
        print(f"not every round was sound; what is left of those is in {folder}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(folder)


def keep(place: Path, result: Result, bar: tqdm) -> None:
    """Say what happened in a round that was not sound, and keep its files, also those on a disk of its own."""
    if (place / "run").is_mount():
        shutil.copytree(place / "run", place / "kept")
    bar.write(f"{place.name}: {result.fault} {result.facts}", file=sys.stderr)
    for problem in result.problems:
        bar.write(f"  {problem}", file=sys.stderr)
    for output in sorted(place.glob("*.txt")):
        lines = output.read_text(errors="replace").replace("\r", "\n").splitlines()[-12:]
        bar.write("\n".join([f"  {output.name}:", *(f"    {line}" for line in lines)]), file=sys.stderr)


if __name__ == "__main__":
    main()
