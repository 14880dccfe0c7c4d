"""The speech tower's backbone: Whisper's encoder, from waveform to tokens."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, WhisperConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_glass.data.batch import AudioClips
from edge_glass.encoders.context import encode, silent_states
from edge_glass.encoders.spectrogram import SpectrogramAugment
from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.encoders.weights import checked_options, load_checkpoint, load_model

SAMPLING_RATE = 16_000  # hertz; this and the next two are Whisper's own (Radford et al. 2022, section 2.2)
FRAME_SAMPLES = 400
HOP_SAMPLES = 160
FRAMES_PER_TOKEN = 2  # the stride of the encoder's second convolution
BUCKET_FRAMES = 64  # short contexts are multiples of this, so that clips of a batch share one and shapes are few
CHIRP_SECONDS = 0.4  # shorter than the shortest context


class AudioEncoder(Encoder):
    """Tokens of speech: 20 ms of a clip each (two frames), the mask marking those with sound of the clip.

    Every clip is cut or filled with silence to the backbone's fixed window, whatever its batch looks like:
    a clip has the same tokens alone and beside a longer one. An empty clip keeps one (silent) token.

    A short context encodes the frames of a clip and a margin of silent ones, and lets them attend to tokens of silence
    that were encoded once, in the place of the rest of the window: much less work, nearly the same tokens
    (docs/speech.md). Clips of about one length are encoded together, so that here, too, neighbours change nothing.

    Args:
        backbone: Whisper's encoder.
        frozen: whether the backbone stays as it is.
        hop_ms: time from frame to frame; Whisper's own is 10.
        augment: varies the spectrograms in training, beside the masking that Whisper's config may ask for.
        context: `full`, the window, as Whisper was trained; or `short`.
        margin_frames: silent frames after a clip in a short context, at least so many.
        silent_keys: whether a short context attends to the silence after its margin.

    Attributes:
        sampling_rate: of the waveforms, in hertz.
        window_seconds: the length of the window, in seconds; what is longer is cut.

    Raises:
        ValueError: another context, or a negative margin.
    """

    sampling_rate = SAMPLING_RATE
    backbone: WhisperEncoder

    def __init__(
        self,
        backbone: WhisperEncoder,
        frozen: bool,
        hop_ms: int = 10,
        augment: SpectrogramAugment | None = None,
        context: Literal["full", "short"] = "full",
        margin_frames: int = 50,
        silent_keys: bool = True,
    ):
        if context not in ("full", "short"):
            raise ValueError(f"context={context!r}: give 'full' or 'short'")
        if margin_frames < 0:
            raise ValueError(f"margin_frames={margin_frames}: give a number of frames, at least 0")
        config = backbone.config
        super().__init__(backbone, dim=config.d_model, frozen=frozen)
        frames = config.max_source_positions * FRAMES_PER_TOKEN
        self.hop = hop_ms * SAMPLING_RATE // 1000
        self.log_mel = LogMel(config.num_mel_bins, frames, self.hop)
        self.augment = augment
        self.mask = SpecAugment.from_whisper(config) if config.apply_spec_augment else None
        self.window_seconds = frames * self.hop / SAMPLING_RATE
        self.context = context
        self.margin_frames = margin_frames
        self.silent_keys = silent_keys
        self._kept_silence: list[Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)

    @classmethod
    def from_config(
        cls,
        hop_ms: int = 10,
        augment: SpectrogramAugment | None = None,
        context: Literal["full", "short"] = "full",
        margin_frames: int = 50,
        silent_keys: bool = True,
        **options,
    ) -> "AudioEncoder":
        """A backbone with random weights, to be trained.

        Args:
            hop_ms: time from frame to frame; Whisper's own is 10.
            augment: varies the spectrograms in training.
            context: `full` or `short`; this and the next two: see the class.
            margin_frames: silent frames after a clip in a short context.
            silent_keys: whether a short context attends to the silence after its margin.
            **options: of transformers' WhisperConfig, such as `d_model`, `encoder_layers`, `num_mel_bins`,
                `max_source_positions` (tokens of two frames) or `apply_spec_augment`.

        Raises:
            ValueError: unknown option.
        """
        backbone = WhisperEncoder(WhisperConfig(**checked_options("whisper", options)))
        return cls(backbone, False, hop_ms, augment, context, margin_frames, silent_keys)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        frozen: bool = True,
        context: Literal["full", "short"] = "full",
        margin_frames: int = 50,
        silent_keys: bool = True,
    ) -> "AudioEncoder":
        """The encoder of a Whisper checkpoint; the decoder is not read.

        Args:
            name: a folder, `package:<package>/<folder>`, or a hub name.
            frozen: whether the weights stay as they are.
            context: `full` or `short`; this and the next two: see the class.
            margin_frames: silent frames after a clip in a short context.
            silent_keys: whether a short context attends to the silence after its margin.

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
            return cls(backbone, frozen, context=context, margin_frames=margin_frames, silent_keys=silent_keys)

        return load_checkpoint(name, load)

    def _encode(self, inputs: AudioClips) -> Tokens:
        frames = (inputs.lengths / self.hop).ceil().long().clamp(1, self.log_mel.frames)
        varied = self.training and (self.augment is not None or self.mask is not None)
        # What varies spectrograms may move and stretch sound over the window, and draws by its width.
        whole = varied or self.context == "full"
        mel = self.log_mel(inputs, None if whole else max(self._contexts(frames)))  # [batch, mel bins, frames]
        if self.training and self.augment is not None:
            mel, frames = self.augment(mel, frames)
        if self.training and self.mask is not None:
            mel = self.mask(mel, frames)
        tokens = self._encode_short(mel, frames) if self.context == "short" else self.backbone(mel).last_hidden_state
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return Tokens(tokens, place * FRAMES_PER_TOKEN < frames[:, None])

    def _contexts(self, frames: Tensor) -> list[int]:
        """How many frames of each clip are encoded."""
        buckets = -(-(frames + self.margin_frames) // BUCKET_FRAMES)
        return (buckets * BUCKET_FRAMES).clamp(max=self.log_mel.frames).tolist()

    def _encode_short(self, mel: Tensor, frames: Tensor) -> Tensor:
        """Tokens `[batch, tokens, dim]` of clips, each in its own context; zeros after the shorter ones."""
        contexts = self._contexts(frames)
        silence = self._silence() if self.silent_keys else None
        order: list[int] = []
        parts: list[Tensor] = []
        for context in sorted(set(contexts)):
            rows = [row for row, own in enumerate(contexts) if own == context]
            tokens = encode(self.backbone, mel[rows, :, :context], silence)
            after = max(contexts) // FRAMES_PER_TOKEN - tokens.shape[1]
            parts.append(nn.functional.pad(tokens, (0, 0, 0, after)))
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=mel.device).argsort()]

    def _silence(self) -> list[Tensor]:
        """What a short context attends to after its margin; encoded again where the backbone learns."""
        if not self.frozen:
            return silent_states(self.backbone, self.log_mel(self._chirp()))
        if self._kept_silence is None:
            with torch.autocast(self.backbone.device.type, enabled=False):  # kept for fp32 readers too
                self._kept_silence = silent_states(self.backbone, self.log_mel(self._chirp()))
        return self._kept_silence

    def _chirp(self) -> AudioClips:
        """A short sound: Whisper encodes the silence after one otherwise than silence alone."""
        samples = round(CHIRP_SECONDS * SAMPLING_RATE)
        time = torch.arange(samples, device=self.backbone.device) / SAMPLING_RATE
        waveform = 0.3 * torch.sin(2 * math.pi * (200 * time + 5000 * time.square()))
        return AudioClips(waveform[None], torch.tensor([samples], device=waveform.device))

    def _apply(self, fn, recurse: bool = True) -> "AudioEncoder":
        self._kept_silence = None  # it is of the device and the type that the weights had
        return super()._apply(fn, recurse)


def _forget(encoder: AudioEncoder, _incompatible_keys) -> None:
    """Other weights encode silence otherwise."""
    encoder._kept_silence = None


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
    def forward(self, clips: AudioClips, width: int | None = None) -> Tensor:
        """Log-mel spectrograms `[batch, mel_bins, frames]` of clips, cut or filled up to the window.

        Args:
            clips: the waveforms.
            width: how many frames to give of the window, no fewer than the longest clip has; None for all.
        """
        width = width or self.frames
        samples = self.frames * self.hop
        waveform = clips.waveform[:, :samples]
        place = torch.arange(waveform.shape[1], device=waveform.device)
        waveform = waveform.masked_fill(place >= clips.lengths[:, None], 0.0)
        waveform = nn.functional.pad(waveform, (0, samples - waveform.shape[1]))
        with torch.autocast(waveform.device.type, enabled=False):  # powers of ten need fp32
            edges = (FRAME_SAMPLES // 2, FRAME_SAMPLES // 2)
            framed = nn.functional.pad(waveform[:, None], edges, mode="reflect").squeeze(1)
            # Frames overlap: some after the last that starts in the clip still hold sound, maybe the loudest.
            heard = min(width + FRAME_SAMPLES // 2 // self.hop + 1, self.frames)
            framed = framed.unfold(1, FRAME_SAMPLES, self.hop)[:, :heard]
            spectrum = torch.fft.rfft(framed * self.window)  # [batch, frames, 201]; 3 x as fast as torch.stft
            power = spectrum.real.square() + spectrum.imag.square()
            log_mel = (power @ self.filters).clamp(min=1e-10).log10().transpose(1, 2)
        # Within 80 dB of the clip's loudest place, scaled to about -1..1.
        log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log_mel[:, :, :width] + 4.0) / 4.0


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
