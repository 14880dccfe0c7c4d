"""The speech tower's backbone: Whisper's own features and encoder, without its dependence on the batch."""

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import sinusoids

from edge_glass.data.batch import AudioClips
from edge_glass.encoders.audio import AudioEncoder, LogMel, SpecAugment
from edge_glass.encoders.weights import WeightsNotFound

SECOND = 16_000
SMALL = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 40,
    "max_source_positions": 50,  # a window of one second
}


def clips(*lengths: int, width: int | None = None) -> AudioClips:
    """Noise that dies away, with zeros after each clip's end."""
    generator = torch.Generator().manual_seed(0)
    waveform = torch.zeros(len(lengths), width or max(lengths))
    for row, length in enumerate(lengths):
        fade = torch.linspace(0, -4, length).exp()
        waveform[row, :length] = 0.1 * fade * torch.randn(length, generator=generator)
    return AudioClips(waveform, torch.tensor(lengths))


def small(**options) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder.from_config(**{**SMALL, **options})


@pytest.mark.parametrize("mel_bins", [80, 40])
@pytest.mark.parametrize("length", [SECOND // 3, SECOND, 2 * SECOND, 3 * SECOND + 7])
def test_log_mel_equals_the_feature_extractor_of_whisper(mel_bins, length):
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=2)
    batch = clips(length, SECOND // 2)
    raw = [row[:count].numpy() for row, count in zip(batch.waveform, batch.lengths.tolist(), strict=True)]
    expected = extractor(raw, sampling_rate=SECOND, return_tensors="pt").input_features
    found = LogMel(mel_bins, frames=200)(batch)
    assert found.shape == expected.shape == (2, mel_bins, 200)
    assert torch.allclose(found, expected, atol=1e-5)


def test_log_mel_of_silence_equals_the_feature_extractor_of_whisper():
    extractor = WhisperFeatureExtractor(chunk_length=1)
    expected = extractor([np.zeros(SECOND, np.float32)], sampling_rate=SECOND, return_tensors="pt")
    found = LogMel(80, frames=100)(AudioClips(torch.zeros(1, SECOND), torch.tensor([SECOND])))
    assert torch.allclose(found, expected.input_features, atol=1e-5)


def test_log_mel_stays_exact_inside_autocast():
    log_mel, batch = LogMel(80, frames=100), clips(SECOND)
    with torch.autocast("cpu", torch.bfloat16):
        inside = log_mel(batch)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, log_mel(batch))


def test_a_clip_has_the_same_tokens_alone_and_beside_a_longer_one():
    encoder = small().eval()
    together = clips(4000, 30_000)
    alone = AudioClips(together.waveform[:1, :4000], together.lengths[:1])
    both, one = encoder(together), encoder(alone)
    assert torch.allclose(both.tokens[:1], one.tokens, atol=1e-5)
    assert torch.equal(both.mask[:1], one.mask)


def test_what_lies_after_a_clips_end_changes_nothing():
    encoder = small().eval()
    batch = clips(4000, 16_000)
    before = encoder(batch)
    batch.waveform[0, 4000:] = 1.0
    after = encoder(batch)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.mask, after.mask)


def test_what_lies_after_the_window_changes_nothing():
    encoder = small().eval()
    batch = clips(20_000)
    shorter = AudioClips(batch.waveform[:, :SECOND], torch.tensor([SECOND]))
    assert torch.equal(encoder(batch).tokens, encoder(shorter).tokens)


@pytest.mark.parametrize(
    ("samples", "tokens"), [(0, 1), (1, 1), (320, 1), (321, 2), (8000, 25), (16_000, 50), (40_000, 50)]
)
def test_the_mask_marks_the_tokens_that_hold_sound_of_the_clip(samples, tokens):
    encoder = small().eval()
    out = encoder(clips(samples, width=40_000))
    assert out.tokens.shape == (1, 50, 16)
    assert out.tokens.isfinite().all()
    assert out.mask[0].tolist() == [True] * tokens + [False] * (50 - tokens)


def test_the_window_follows_from_the_positions():
    encoder = small(max_source_positions=75)
    assert encoder.window_seconds == 1.5
    assert encoder.sampling_rate == 16_000


def test_the_positions_of_a_tower_from_a_config_are_whispers_and_stay():
    encoder = small()
    positions = encoder.backbone.embed_positions.weight
    assert torch.allclose(positions, sinusoids(50, 16))
    assert not positions.requires_grad


def test_every_trainable_parameter_gets_a_gradient():
    encoder = small()
    assert encoder.training
    encoder(clips(8000, 12_000)).tokens.square().sum().backward()
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None for parameter in trainable)


def test_a_misspelt_option_is_refused():
    with pytest.raises(ValueError, match="did you mean 'encoder_layers'"):
        AudioEncoder.from_config(encoder_layer=2)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    torch.manual_seed(0)
    config = WhisperConfig(
        **{**SMALL, "num_mel_bins": 80},
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=100,
        pad_token_id=0,
    )
    model = WhisperForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder / "with_language_head")
    model.model.save_pretrained(folder / "without")
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder / "with_language_head")
    return folder, model.model


@pytest.mark.parametrize("kind", ["with_language_head", "without"])
def test_a_whisper_checkpoint_gives_its_own_tokens(whisper, kind):
    folder, model = whisper
    encoder = AudioEncoder.from_pretrained(str(folder / kind))
    batch = clips(9000, 16_000)
    raw = [row[:count].numpy() for row, count in zip(batch.waveform, batch.lengths.tolist(), strict=True)]
    extractor = WhisperFeatureExtractor(chunk_length=1)
    features = extractor(raw, sampling_rate=SECOND, return_tensors="pt").input_features
    expected = model.encoder(features).last_hidden_state
    assert torch.allclose(encoder(batch).tokens, expected, atol=1e-4)


def test_the_decoder_of_a_whisper_checkpoint_is_not_held(whisper):
    folder, model = whisper
    encoder = AudioEncoder.from_pretrained(str(folder / "with_language_head"))
    held = sum(parameter.numel() for parameter in encoder.parameters())
    assert held == sum(parameter.numel() for parameter in model.encoder.parameters())


def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode(whisper):
    encoder = AudioEncoder.from_pretrained(str(whisper[0] / "without")).train()
    assert encoder.frozen
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(clips(8000)).tokens.requires_grad


def test_pretrained_weights_can_be_trained_on(whisper):
    encoder = AudioEncoder.from_pretrained(str(whisper[0] / "without"), frozen=False).train()
    encoder(clips(8000)).tokens.square().sum().backward()
    assert encoder.backbone.conv1.weight.grad is not None


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' model; the audio tower reads 'whisper'"):
        AudioEncoder.from_pretrained(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(WeightsNotFound, match=r"it has no config\.json"):
        AudioEncoder.from_pretrained(str(tmp_path))


def test_spec_augment_works_in_training_alone_and_only_when_asked_for():
    batch = clips(12_000, 16_000)
    for asked in (True, False):
        encoder = small(apply_spec_augment=asked, mask_time_prob=0.5, mask_feature_prob=0.5)
        plain = encoder.eval()(batch).tokens
        assert torch.equal(plain, encoder(batch).tokens)
        assert torch.equal(plain, encoder.train()(batch).tokens) != asked


def test_spec_augment_is_replayed_by_the_state_of_torch():
    encoder = small(apply_spec_augment=True, mask_time_prob=0.5)
    batch = clips(12_000, 16_000)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(encoder(batch).tokens)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_spec_augment_hides_whole_frames_and_bands_inside_the_clip():
    torch.manual_seed(0)
    augment = SpecAugment(0.2, 5, 1, 0.2, 4, 1)
    mel = torch.ones(64, 40, 100)
    frames = torch.tensor([60, 100] * 32)
    hidden = augment(mel, frames) == 0
    hidden_frames, hidden_bands = hidden.all(dim=1), hidden.all(dim=2)
    assert torch.equal(hidden, hidden_frames[:, None, :] | hidden_bands[:, :, None])
    assert hidden_frames.any(dim=1).all()
    assert hidden_bands.any(dim=1).all()
    assert not hidden_frames[::2, 60:].any()
    assert not torch.equal(hidden_frames[0], hidden_frames[2])


def test_spec_augment_hides_about_the_share_it_was_given():
    torch.manual_seed(0)
    mel, frames = torch.ones(2000, 4, 100), torch.full((2000,), 100)
    hidden = (SpecAugment(0.10, 5, 0, 0.0, 1, 0)(mel, frames) == 0).float().mean().item()
    assert 0.08 < hidden <= 0.10  # overlaps cost a little


def test_spec_augment_draws_the_fewest_stretches_even_in_a_clip_shorter_than_one():
    torch.manual_seed(0)
    hidden = SpecAugment(0.01, 10, 2, 0.0, 1, 0)(torch.ones(8, 4, 100), torch.full((8,), 6)) == 0
    assert hidden[:, :, :6].all()
