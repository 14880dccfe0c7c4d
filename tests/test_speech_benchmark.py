"""The benchmark of short contexts, on an encoder so small that its figures mean nothing."""

import pytest

from benchmarks import speech


@pytest.fixture(autouse=True)
def small(monkeypatch):
    options = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    monkeypatch.setattr(speech, "BASE", options)


def test_clips_have_their_lengths_and_are_speech():
    batch = speech.clips((1, 3))
    assert batch.lengths.tolist() == [16_000, 48_000]
    assert (batch.waveform.abs().amax(1) > 0.05).all()


def test_every_row_says_what_was_compared_and_how_it_came_out():
    for row in speech.rows(repeats=2):
        assert {"name", "peer", "ours_seconds", "peer_seconds", "ratio", "spread", "floor", "equal"} == set(row)
        assert row["equal"]
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]


def test_likeness_is_measured_for_every_margin_with_and_without_silent_keys():
    found = speech.likeness(sets=1)
    assert len(found) == 2 * len(speech.MARGINS)
    assert all(-1 <= row["least"] <= row["mean"] <= 1.001 for row in found)
