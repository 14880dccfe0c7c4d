"""What tests of whole runs share."""

import pytest

from tests import mini
from tests.commands import run_in_process


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory):
    """Drawn shapes and tones: see tests/mini.py. Read only."""
    return mini.write_data(tmp_path_factory.mktemp("mini_data"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves the figures out of runs in this process: drawing takes four fifths of so short a run."""
    monkeypatch.setattr("edge_glass.results.retrieval_gallery", lambda *_: None)
    for figure in ("training_curves", "recall_by_width"):
        monkeypatch.setattr(f"edge_glass.reports.figures.{figure}", lambda *_: True)


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory):
    """A Sentence-BERT of 16 dimensions."""
    return mini.write_text_tower(tmp_path_factory.mktemp("towers") / "text")


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs a script in this process, where torch is already imported, in a folder of its own."""
    yield from run_in_process(tmp_path, monkeypatch, capfd)
