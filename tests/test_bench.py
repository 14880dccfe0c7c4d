"""`make bench`: the table, and a row below its floor."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import bench
from benchmarks.sides import compare, row


def test_a_row_is_the_median_of_what_the_peer_takes_over_what_we_take():
    found = row("work", "peer", [(1.0, 2.0), (2.0, 6.0), (1.0, 10.0)], floor=2.0)
    assert found["ratio"] == 3.0 and found["spread"] == [2.0, 10.0]
    assert (found["ours_seconds"], found["peer_seconds"]) == (1.0, 6.0)


def test_both_sides_are_run_in_turn():
    turns: list[str] = []
    compare("work", "peer", lambda: turns.append("ours"), lambda: turns.append("theirs"), floor=0.0, repeats=2)
    assert turns == ["ours", "theirs"] * 3  # the first pair warms up


@pytest.mark.parametrize(("floor", "code"), [(2.0, 0), (4.0, 1)])
def test_a_row_below_its_floor_ends_the_command_with_1(tmp_path, monkeypatch, capsys, floor, code):
    measured = [row("work", "peer", [(1.0, 3.0)], floor, equal=True)]
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(bench, "ROWS", ("work",))
    monkeypatch.setitem(sys.modules, "benchmarks.work", SimpleNamespace(rows=lambda: measured))
    monkeypatch.setattr(sys, "argv", ["bench", "work"])
    assert bench.main() == code
    shown = capsys.readouterr()
    assert "| work | peer | 3.00 | 3.00 to 3.00 |" in shown.out
    assert ("below the floor: work" in shown.err) == bool(code)
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["work"]["ratio"] == 3.0
