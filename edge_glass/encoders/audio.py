"""The speech tower's backbone: Whisper's encoder, from waveform to tokens."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_glass.data.batch import AudioClips
from edge_glass.encoders.spectrogram import SpectrogramAugment
from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.encoders.weights import checked_options, load_checkpoint, load_model

SAMPLING_RATE = 16_000  # hertz; this and the next two are Whisper's own (Radford et al. 2022, section 2.2)
FRAME_SAMPLES = 400
HOP_SAMPLES = 160
FRAMES_PER_TOKEN = 2  # the stride of the encoder's second convolution


class AudioEncoder(Encoder):
    """Tokens of speech: 20 ms of a clip each (two frames), the mask marking those with sound of the clip.

    Every clip is cut or filled with silence to the backbone's fixed window, whatever its batch looks like:
    a clip has the same tokens alone and beside a longer one. An empty clip keeps one (silent) token.

    Args:
        backbone: Whisper's encoder.
        frozen: whether the backbone stays as it is.
        hop_ms: time from frame to frame; Whisper's own is 10.
        augment: varies the spectrograms in training, beside the masking that Whisper's config may ask for.

    Attributes:
        sampling_rate: of the waveforms, in hertz.
        window_seconds: the length of the window, in seconds; what is longer is cut.
    """

    sampling_rate = SAMPLING_RATE
    backbone: WhisperEncoder

    def __init__(
        self,
        backbone: WhisperEncoder,
        frozen: bool,
        hop_ms: int = 10,
        augment: SpectrogramAugment | None = None,
    ):
        config = backbone.config
        super().__init__(backbone, dim=config.d_model, frozen=frozen)
        frames = config.max_source_positions * FRAMES_PER_TOKEN
        self.hop = hop_ms * SAMPLING_RATE // 1000
        self.log_mel = LogMel(config.num_mel_bins, frames, self.hop)
        self.augment = augment
        self.mask = SpecAugment.from_whisper(config) if config.apply_spec_augment else None
        self.window_seconds = frames * self.hop / SAMPLING_RATE

    @classmethod
    def from_config(cls, hop_ms: int = 10, augment: SpectrogramAugment | None = None, **options) -> "AudioEncoder":
        """A backbone with random weights, to be trained.

        Args:
            hop_ms: time from frame to frame; Whisper's own is 10.
            augment: varies the spectrograms in training.
            **options: of transformers' WhisperConfig, such as `d_model`, `encoder_layers`, `num_mel_bins`,
                `max_source_positions` (tokens of two frames) or `apply_spec_augment`.

        Raises:
            ValueError: unknown option.
        """
        backbone = WhisperEncoder(WhisperConfig(**checked_options("whisper", options)))
        return cls(backbone, frozen=False, hop_ms=hop_ms, augment=augment)

    @classmethod
    def from_pretrained(cls, name: str, frozen: bool = True) -> "AudioEncoder":
        """The encoder of a Whisper checkpoint; the decoder is not read.

        Args:
            name: a folder, `package:<package>/<folder>`, or a hub name.
            frozen: whether the weights stay as they are.

        Raises:
            WeightsNotFound: no such checkpoint.
            ValueError: a checkpoint of another architecture.
        """

        def load(source: str) -> AudioEncoder:
            config = AutoConfig.from_pretrained(source)
            if config.model_type != "whisper":
                raise ValueError(f"{name!r} holds a {config.model_type!r} model; the audio tower reads 'whisper'")
            encoder_only = {r"^(model\.)?encoder\.": ""}  # with and without the language modelling head
            backbone = load_model(WhisperEncoder, source, config=config, key_mapping=encoder_only)
            return cls(backbone, frozen)

        return load_checkpoint(name, load)

    def _encode(self, inputs: AudioClips) -> Tokens:
        mel = self.log_mel(inputs)  # [batch, mel bins, frames]
        frames = (inputs.lengths / self.hop).ceil().long().clamp(1, self.log_mel.frames)
        if self.training and self.augment is not None:
            mel, frames = self.augment(mel, frames)
        if self.training and self.mask is not None:
            mel = self.mask(mel, frames)
        tokens = self.backbone(mel).last_hidden_state
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return Tokens(tokens, place * FRAMES_PER_TOKEN < frames[:, None])


class LogMel(nn.Module):
    """The picture of sound that Whisper was trained on, equal to transformers' WhisperFeatureExtractor.

    Args:
        mel_bins: height of the spectrogram.
        frames: width of the spectrogram.
        hop: samples from frame to frame.
    """

    filters: Tensor  # [frequencies, mel_bins]
    window: Tensor  # [FRAME_SAMPLES]

    def __init__(self, mel_bins: int, frames: int, hop: int = HOP_SAMPLES):
        super().__init__()
        self.frames = frames
        self.hop = hop
        filters = mel_filter_bank(
            num_frequency_bins=1 + FRAME_SAMPLES // 2,
            num_mel_filters=mel_bins,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=SAMPLING_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(FRAME_SAMPLES), persistent=False)

    @torch.no_grad()
    def forward(self, clips: AudioClips) -> Tensor:
        """Log-mel spectrograms `[batch, mel_bins, frames]` of clips, cut or filled up to the window."""
        samples = self.frames * self.hop
        waveform = clips.waveform[:, :samples]
        place = torch.arange(waveform.shape[1], device=waveform.device)
        waveform = waveform.masked_fill(place >= clips.lengths[:, None], 0.0)
        waveform = nn.functional.pad(waveform, (0, samples - waveform.shape[1]))
        with torch.autocast(waveform.device.type, enabled=False):  # powers of ten need fp32
            edges = (FRAME_SAMPLES // 2, FRAME_SAMPLES // 2)
            framed = nn.functional.pad(waveform[:, None], edges, mode="reflect").squeeze(1)
            framed = framed.unfold(1, FRAME_SAMPLES, self.hop)[:, : self.frames]
            spectrum = torch.fft.rfft(framed * self.window)  # [batch, frames, 201]; 3 x as fast as torch.stft
            power = spectrum.real.square() + spectrum.imag.square()
            log_mel = (power @ self.filters).clamp(min=1e-10).log10().transpose(1, 2)
        # Within 80 dB of the clip's loudest place, scaled to about -1..1.
        log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log_mel + 4.0) / 4.0


class SpecAugment(nn.Module):
    """Random stretches of time and bands of frequency set to zero (Park et al. 2019), as WhisperConfig asks.

    The counterpart of `WhisperModel._mask_input_features`, which draws with numpy: here torch draws, so that
    the random state that torch keeps replays it. Stretches may overlap.

    Args:
        time_prob: share of the frames to hide, were no stretches to overlap.
        time_length: frames a stretch.
        time_min_masks: the fewest stretches.
        feature_prob: share of the mel bins to hide, were no bands to overlap.
        feature_length: mel bins a band.
        feature_min_masks: the fewest bands.
    """

    def __init__(
        self,
        time_prob: float,
        time_length: int,
        time_min_masks: int,
        feature_prob: float,
        feature_length: int,
        feature_min_masks: int,
    ):
        super().__init__()
        self.time = (time_prob, time_length, time_min_masks)
        self.feature = (feature_prob, feature_length, feature_min_masks)

    @classmethod
    def from_whisper(cls, config: WhisperConfig) -> "SpecAugment":
        """With the `mask_*` options of a WhisperConfig."""
        return cls(
            config.mask_time_prob,
            config.mask_time_length,
            config.mask_time_min_masks,
            config.mask_feature_prob,
            config.mask_feature_length,
            config.mask_feature_min_masks,
        )

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        """Spectrograms with holes.

        Args:
            mel: `[batch, mel bins, frames]`.
            frames: `[batch]`, the frames that hold sound of the clip; stretches lie among them.
        """
        batch, bins, _ = mel.shape
        hidden_frames = _spans(frames, mel.shape[2], *self.time)
        hidden_bins = _spans(torch.full((batch,), bins, device=mel.device), bins, *self.feature)
        return mel.masked_fill(hidden_frames[:, None, :] | hidden_bins[:, :, None], 0.0)


def _spans(sizes: Tensor, width: int, share: float, length: int, fewest: int) -> Tensor:
    """`[batch, width]` bool, True inside random spans of `length` among the first `sizes` places."""
    if share <= 0:  # as in transformers, the fewest count only where masking is on
        return torch.zeros(len(sizes), width, dtype=torch.bool, device=sizes.device)
    most = max(fewest, int(share * width / length) + 1)
    wanted = share * sizes / length + torch.rand(len(sizes), device=sizes.device)  # rounds at random
    counts = wanted.long().clamp(min=fewest)
    choices = (sizes - length + 1).clamp(min=1)[:, None]
    starts = (torch.rand(len(sizes), most, device=sizes.device) * choices).long()
    place = torch.arange(width, device=sizes.device)
    inside = (place >= starts[..., None]) & (place < starts[..., None] + length)  # [batch, spans, width]
    drawn = torch.arange(most, device=sizes.device) < counts[:, None]
    return (inside & drawn[..., None]).any(dim=1)
