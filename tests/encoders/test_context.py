"""A short context: the frames that a clip needs, in place of Whisper's whole window."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_glass.config import ConfigError
from edge_glass.data.batch import AudioClips
from edge_glass.encoders import context
from edge_glass.encoders.audio import AudioEncoder, LogMel
from edge_glass.encoders.spectrogram import SpectrogramAugment
from edge_glass.signatures import check_targets
from tests.encoders.test_audio import SECOND, SMALL, clips

WINDOW = 200  # tokens: a window of four seconds
EITHER = pytest.mark.parametrize("silent_keys", [True, False])


def small(**options) -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder.from_config(**{**SMALL, "max_source_positions": WINDOW, "init_std": 0.2, **options})


def like(encoder: AudioEncoder, frozen: bool = False, **options) -> AudioEncoder:
    """Another encoder on the same backbone."""
    return AudioEncoder(encoder.backbone, frozen, **options).train(encoder.training)


def frames_read(encoder: AudioEncoder) -> list[int]:
    """Clips times frames of each call of the first convolution, from now on."""
    counts: list[int] = []
    encoder.backbone.conv1.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0][:, 0].numel()))
    return counts


def likeness(encoder: AudioEncoder, exact: AudioEncoder, batch: AudioClips) -> torch.Tensor:
    """Cosine of each real token to the exact one."""
    found, wanted = encoder(batch), exact(batch)
    return cosine_similarity(found.tokens[found.mask], wanted.tokens[wanted.mask], dim=-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_of_the_full_window_the_tokens_are_those_of_whisper_bit_for_bit(attention, training):
    torch.manual_seed(0)
    options = {"dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.3} if training else {}
    config = WhisperConfig(**{**SMALL, "encoder_layers": 6}, **options, attn_implementation=attention)
    backbone = WhisperEncoder(config).train(training)
    mel = torch.randn(3, 40, 100)
    silence = [torch.randn(1, 4, 16)] * 6  # has no place in the full window
    for seed in range(3):
        torch.manual_seed(seed)
        expected = backbone(mel).last_hidden_state
        for given in (None, silence):
            torch.manual_seed(seed)
            assert torch.equal(context.encode(backbone, mel, given), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_all_the_silence_of_the_clip_itself_a_short_context_is_exact(monkeypatch, attention):
    monkeypatch.setattr(context, "TOKENS_PER_KEY", 1)
    backbone = small(attn_implementation=attention).eval().backbone
    assert not backbone.conv1.bias.any() and not backbone.conv2.bias.any()
    mel = torch.randn(2, 40, 2 * WINDOW)
    mel[:, :, 94:] = 0.0  # without biases the convolutions then see the same at the cut
    exact = backbone(mel).last_hidden_state
    for row in range(2):
        silence = context.silent_states(backbone, mel[row : row + 1])
        found = context.encode(backbone, mel[row : row + 1, :, :100], silence)
        assert torch.allclose(found, exact[row : row + 1, :50], atol=1e-5)
        without = context.encode(backbone, mel[row : row + 1, :, :100])
        assert not torch.allclose(without, exact[row : row + 1, :50], atol=1e-2)


def test_one_silent_key_has_the_weight_of_the_tokens_it_stands_for(monkeypatch):
    backbone = small().eval().backbone
    mel = torch.randn(1, 40, 2 * WINDOW)
    states = [torch.randn(1, 1, 16) for _ in backbone.layers]
    alike = context.encode(backbone, mel[:, :, :128], [state.expand(1, 13, 16) for state in states])
    monkeypatch.setattr(context, "TOKENS_PER_KEY", 1)
    each = context.encode(backbone, mel[:, :, :128], [state.expand(1, WINDOW, 16) for state in states])
    assert torch.allclose(alike, each, atol=1e-5)


@EITHER
def test_a_wider_margin_is_not_worse_and_one_of_the_whole_window_is_exact(silent_keys):
    exact = small().eval()
    batch = clips(SECOND // 2, SECOND)
    means = []
    for margin in (0, 64, 192, 400):
        encoder = like(exact, context="short", margin_frames=margin, silent_keys=silent_keys)
        means.append(likeness(encoder, exact, batch).mean().item())
    assert all(wide >= narrow - 1e-3 for narrow, wide in pairwise(means)), means
    assert torch.equal(encoder(batch).tokens, exact(batch).tokens)
    assert means[1] > 0.9


def test_silent_keys_bring_the_tokens_nearer_to_the_exact_ones():
    exact = small().eval()
    batch = clips(SECOND // 2, SECOND)
    with_keys, without = (like(exact, context="short", silent_keys=keys) for keys in (True, False))
    assert likeness(with_keys, exact, batch).mean() > likeness(without, exact, batch).mean()


@EITHER
def test_a_clip_has_the_same_tokens_alone_and_beside_a_longer_one(silent_keys):
    encoder = small(context="short", silent_keys=silent_keys).eval()
    together = clips(50_000, 4000, 30_000, 4500, 90_000, 3000)
    both = encoder(together)
    for row, length in enumerate(together.lengths.tolist()):
        one = encoder(AudioClips(together.waveform[row : row + 1, :length], together.lengths[row : row + 1]))
        width = one.tokens.shape[1]
        assert torch.allclose(both.tokens[row : row + 1, :width], one.tokens, atol=1e-6)
        assert torch.equal(both.mask[row : row + 1, :width], one.mask)
        assert not both.mask[row, width:].any()


def test_what_lies_after_a_clips_end_changes_nothing():
    encoder = small(context="short").eval()
    batch = clips(4000, 30_000)
    before = encoder(batch).tokens
    batch.waveform[0, 4000:] = 1.0
    assert torch.equal(before, encoder(batch).tokens)


def test_a_clip_longer_than_the_window_has_the_tokens_of_the_full_context():
    exact = small().eval()
    encoder = like(exact, context="short")
    batch = clips(90_000)
    assert torch.equal(encoder(batch).tokens, exact(batch).tokens)
    assert torch.equal(encoder(batch).mask, exact(batch).mask)


@pytest.mark.parametrize("lengths", [(0,), (1, 320), (321, 8000), (20_479, 20_480, 20_481), (64_000, 90_000)])
def test_the_mask_marks_the_tokens_that_hold_sound_of_the_clip(lengths):
    exact = small().eval()
    found, wanted = like(exact, context="short", margin_frames=0)(clips(*lengths, width=90_000)), exact(clips(*lengths))
    width = found.mask.shape[1]
    assert torch.equal(found.mask, wanted.mask[:, :width])
    assert not wanted.mask[:, width:].any()
    assert found.tokens.isfinite().all()


def test_a_short_context_runs_far_fewer_frames():
    lengths = [1, 2, 3, 4, 5]
    encoder = small(context="short", max_source_positions=1500).eval()
    encoder.frozen = True
    counts = frames_read(encoder)
    batch = clips(*(SECOND * seconds for seconds in lengths))
    encoder(batch)
    assert counts[0] == 3000  # the silence, once
    counts.clear()
    encoder(batch)
    longest_allowed = [100 * seconds + 50 + 63 for seconds in lengths]
    assert sum(counts) <= sum(longest_allowed) < 5 * 3000 / 7


def test_clips_of_about_one_length_are_encoded_together():
    encoder = small(context="short", silent_keys=False).eval()
    counts = frames_read(encoder)
    encoder(clips(4000, 30_000, 3900, 29_900, 4100))
    assert counts == [3 * 128, 2 * 256]


def test_a_frozen_encoder_encodes_silence_once_and_again_with_other_weights():
    encoder = like(small().eval(), frozen=True, context="short")
    counts = frames_read(encoder)
    batch = clips(4000)
    before = [encoder(batch).tokens for _ in range(2)]
    assert counts == [400, 128, 128]
    assert torch.equal(*before)
    other = {name: weight * 1.5 for name, weight in encoder.state_dict().items()}
    encoder.load_state_dict(other)
    fresh = like(encoder, frozen=True, context="short")
    assert torch.equal(encoder(batch).tokens, fresh(batch).tokens)
    encoder.double().float()
    counts.clear()
    encoder(batch)
    assert counts == [400, 128]


def test_a_frozen_encoder_keeps_the_silence_of_full_precision():
    encoder = like(small().eval(), frozen=True, context="short")
    fresh = like(encoder, frozen=True, context="short")
    batch = clips(4000)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(batch).tokens
    assert torch.equal(encoder(batch).tokens, fresh(batch).tokens)
    assert cosine_similarity(rough.float(), fresh(batch).tokens, dim=-1).min() > 0.99


@EITHER
def test_every_trainable_parameter_gets_a_gradient(silent_keys):
    encoder = small(context="short", silent_keys=silent_keys)
    assert encoder.training
    encoder(clips(8000, 30_000)).tokens.square().sum().backward()
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trainable
    assert all(parameter.grad is not None for parameter in trainable)


def test_training_follows_the_weights():
    encoder = small(context="short")
    batch = clips(8000)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder(batch).tokens.square().sum().backward()
    optimizer.step()
    assert torch.equal(encoder(batch).tokens, like(encoder, context="short")(batch).tokens)


def test_spectrograms_vary_in_training_as_in_the_full_context():
    augment = SpectrogramAugment(tempo=1.3, delay=0.1, noise=0.5, hidden_frames=5)
    exact = small(apply_spec_augment=True, mask_time_prob=0.3)
    batch = clips(12_000, 16_000)
    encoders = [like(exact, augment=augment, context="short", margin_frames=m) for m in (50, 400)]
    for seed in range(4):
        outputs = []
        for encoder in (like(exact, augment=augment), *encoders):
            torch.manual_seed(seed)
            outputs.append(encoder(batch))
        full, short, widest = outputs
        assert torch.equal(widest.tokens, full.tokens)
        width = short.mask.shape[1]
        assert width < WINDOW
        assert torch.equal(short.mask, full.mask[:, :width])
        assert cosine_similarity(short.tokens[short.mask], full.tokens[full.mask], dim=-1).mean() > 0.9


@pytest.mark.parametrize("length", [3000, 8000, 16_000, 16_079, 16_081])
def test_the_log_mel_of_part_of_the_window_is_part_of_the_log_mel(length):
    log_mel = LogMel(40, frames=400)
    batch = clips(length)
    batch.waveform[0, : length // 2] = 0.0  # as quiet as the loudest place allows,
    batch.waveform[0, -40:] = 1.0  # which is heard in the frames after the clip
    frames = -(-length // 160)
    whole = log_mel(batch)
    for width in (frames, frames + 1, frames + 50, 400):
        assert torch.allclose(log_mel(batch, width), whole[:, :, :width], atol=1e-6)


def test_the_log_mel_of_a_clip_does_not_depend_on_louder_neighbours():
    log_mel = LogMel(40, frames=400)
    batch = clips(16_000, 16_000)
    batch.waveform[1] *= 100
    alone = AudioClips(batch.waveform[:1], batch.lengths[:1])
    assert torch.allclose(log_mel(batch, 150)[:1], log_mel(alone, 150), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"context": "long"}, "context='long': give 'full' or 'short'"), ({"margin_frames": -1}, "margin_frames=-1")],
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_a_config_with_another_context_is_refused_before_anything_is_built():
    node = {"_target_": "edge_glass.encoders.audio.AudioEncoder.from_pretrained", "name": "x", "context": "long"}
    with pytest.raises(ConfigError, match=r"audio\.context='long'"):
        check_targets({"audio": node})
