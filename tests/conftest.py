"""What tests of whole runs share."""

import pytest

from tests import mini


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory):
    """Drawn shapes and tones: see tests/mini.py. Read only."""
    return mini.write_data(tmp_path_factory.mktemp("mini_data"))


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory):
    """A Sentence-BERT of 16 dimensions."""
    return mini.write_text_tower(tmp_path_factory.mktemp("towers") / "text")
