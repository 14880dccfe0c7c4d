import pytest
import torch

from edge_glass.data.batch import AudioClips
from edge_glass.encoders.audio import AudioEncoder
from edge_glass.encoders.spectrogram import SpectrogramAugment

TINY = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 16}


def spectrograms(count=64, bins=16, width=50, sound=20):
    """Silence (-1) with a loud stretch in the first `sound` frames."""
    mel = torch.full((count, bins, width), -1.0)
    mel[:, 4:8, :sound] = 1.0
    return mel, torch.full((count,), sound)


def test_without_settings_nothing_changes():
    mel, frames = spectrograms()
    varied, heard = SpectrogramAugment()(mel, frames)
    assert torch.allclose(varied, mel, atol=1e-5)
    assert torch.equal(heard, frames)


def test_slower_speech_is_longer_and_all_of_it_is_marked_as_sound():
    torch.manual_seed(0)
    mel, frames = spectrograms()
    varied, heard = SpectrogramAugment(tempo=1.5, delay=0.1)(mel, frames)
    assert heard.min() < 20 < heard.max()
    place = torch.arange(mel.shape[2])
    loud = (varied.amax(dim=1) > 0.5) & (place >= heard[:, None])
    assert not loud.any()


def test_a_warp_moves_the_band_and_keeps_the_time():
    torch.manual_seed(0)
    mel, frames = spectrograms()
    varied, heard = SpectrogramAugment(warp=1.5, shift=0.1)(mel, frames)
    centres = (varied[:, :, 10] > 0).float()
    centres = (centres * torch.arange(16)).sum(1) / centres.sum(1).clamp(min=1)
    assert centres.std() > 0.5
    assert torch.equal(heard, frames)
    assert torch.allclose(varied[:, :, 25:], torch.tensor(-1.0), atol=1e-5)


def test_hidden_places_are_few_bounded_and_inside_the_sound():
    torch.manual_seed(0)
    mel, frames = spectrograms()
    mel[:] = -1.0
    varied, _ = SpectrogramAugment(hidden_frames=5, hidden_bins=3)(mel, frames)
    hidden = varied == 0
    columns, rows = hidden.all(dim=1), hidden.all(dim=2)
    assert columns.sum(1).max() == 5 and rows.sum(1).max() == 3
    assert not columns[:, 20:].any()


def test_noise_lifts_the_silence_and_leaves_the_loudest_place():
    torch.manual_seed(0)
    mel, frames = spectrograms()
    varied, _ = SpectrogramAugment(noise=1.0)(mel, frames)
    assert (varied[:, 0, 40] > -1).all()
    assert (varied.amax(dim=(1, 2)) - 1).abs().max() < 0.1  # powers add: 3 dB at most, 40 dB a unit


def test_a_factor_below_one_is_refused():
    with pytest.raises(ValueError, match=r"tempo=0.9.*at least 1"):
        SpectrogramAugment(tempo=0.9)


def test_speech_is_varied_in_training_only():
    torch.manual_seed(0)
    augment = SpectrogramAugment(tempo=1.3, warp=1.2, balance=0.2)
    encoder = AudioEncoder.from_config(max_source_positions=25, augment=augment, **TINY)
    clips = AudioClips(torch.randn(4, 6000), torch.full((4,), 6000))
    assert not torch.allclose(encoder(clips).tokens, encoder(clips).tokens)
    encoder.eval()
    assert torch.equal(encoder(clips).tokens, encoder(clips).tokens)


def test_a_longer_hop_covers_a_longer_window_with_the_same_tokens():
    short = AudioEncoder.from_config(max_source_positions=25, **TINY)
    long = AudioEncoder.from_config(max_source_positions=25, hop_ms=20, **TINY)
    assert (short.window_seconds, long.window_seconds) == (0.5, 1.0)
    clips = AudioClips(torch.randn(1, 16_000), torch.tensor([12_000]))
    assert short(clips).mask.sum() == 25  # 0.75 s fill the window of 0.5 s
    assert long(clips).mask.sum() == 19  # 38 frames of 20 ms, two a token
