"""Random variation of whole batches in training, one independent random stream a sample.

Every sample brings its own generator, seeded by (seed, epoch, row), so that what a sample looks like depends neither on
its neighbours in the batch nor on the number of workers or ranks.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_glass.data.batch import AudioClips
from edge_glass.data.decode import SAMPLING_RATE


class ImageAugment:
    """Random affine maps, colour mixing and blur for a batch of images.

    Args:
        degrees: rotation is drawn from ±degrees.
        translate: shift as a share of the side, drawn from ±translate in each direction.
        scale: the size factor is drawn log-uniformly from [1/scale, scale]; 1 keeps the size.
        stretch: the aspect factor, likewise.
        shear: horizontal shear (share of the height), drawn from ±shear.
        flip: probability of a mirror image.
        colour: strength of the random 3 x 3 colour matrix (standard deviation of its entries around the identity).
        brightness: shift of each channel, drawn from ±brightness (pixels are in 0..1).
        blur: probability of a 3 x 3 blur.
        erase: probability that a rectangle of up to half the side is painted in a random grey.
    """

    def __init__(
        self,
        degrees: float = 10.0,
        translate: float = 0.08,
        scale: float = 1.2,
        stretch: float = 1.1,
        shear: float = 0.1,
        flip: float = 0.0,
        colour: float = 0.15,
        brightness: float = 0.1,
        blur: float = 0.0,
        erase: float = 0.0,
    ):
        self.degrees = degrees
        self.translate = translate
        self.scale = scale
        self.stretch = stretch
        self.shear = shear
        self.flip = flip
        self.colour = colour
        self.brightness = brightness
        self.blur = blur
        self.erase = erase

    def __call__(self, images: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """Vary each image.

        Args:
            images: `[batch, 3, height, width]` in 0..1.
            generators: one a sample.

        Returns:
            Images of the same shape, in 0..1.
        """
        draws = np.stack([rng.random(16, dtype=np.float32) for rng in generators])
        unit = torch.from_numpy(draws) * 2 - 1  # [batch, 16] in -1..1
        normal = torch.from_numpy(np.stack([rng.standard_normal(9, dtype=np.float32) for rng in generators]))
        # A kernel over rows already split over the cores gains nothing from padding with zeros (black corners on white
        # drawings would give the augmentation away), so the border is continued.
        grid = F.affine_grid(self._maps(unit), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        mix = torch.eye(3) + self.colour * normal.view(-1, 3, 3)
        images = torch.einsum("bij,bjhw->bihw", mix, images - 0.5) + 0.5
        images = images + self.brightness * unit[:, 6:9, None, None]
        if self.blur:
            chosen = draws[:, 9] < self.blur
            if chosen.any():
                images[chosen] = F.avg_pool2d(F.pad(images[chosen], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        if self.erase:
            _erase(images, draws, self.erase)
        return images.clamp_(0, 1)

    def _maps(self, unit: Tensor) -> Tensor:
        """`[batch, 2, 3]`: from output to input coordinates in -1..1."""
        angle = unit[:, 0] * math.radians(self.degrees)
        size = torch.exp(unit[:, 1] * math.log(self.scale))
        aspect = torch.exp(unit[:, 2] * math.log(self.stretch) / 2)
        shear = unit[:, 3] * self.shear
        mirror = torch.where(unit[:, 4] < self.flip * 2 - 1, -1.0, 1.0)
        cos, sin = torch.cos(angle), torch.sin(angle)
        x_axis = torch.stack([cos * mirror / (size * aspect), (shear * cos - sin) / (size / aspect)], dim=1)
        y_axis = torch.stack([sin * mirror / (size * aspect), (shear * sin + cos) / (size / aspect)], dim=1)
        shift = unit[:, [5, 10]] * 2 * self.translate
        return torch.cat([torch.stack([x_axis, y_axis], dim=1), shift[:, :, None]], dim=2)


def _erase(images: Tensor, draws: np.ndarray, probability: float) -> None:
    side = images.shape[-1]
    for row in np.flatnonzero(draws[:, 11] < probability):
        height, width = (np.ceil((0.1 + 0.4 * draws[row, 12:14]) * side)).astype(int)
        top, left = (draws[row, 14:16] * (side - np.array([height, width]))).astype(int)
        images[row, :, top : top + height, left : left + width] = float(draws[row, 9])


class AudioAugment:
    """Random speed, spectral balance, loudness, noise and leading silence for a batch of clips.

    Speed is changed by resampling, which moves pitch and formants along: to the tower it is another voice.

    Args:
        speed: the rate is drawn log-uniformly from [1/speed, speed]; 1 leaves it.
        balance_db: the gain of each of eight equally spaced frequencies, with lines in between, is drawn with this
            standard deviation, in dB.
        gain_db: the loudness is drawn from ±gain_db.
        noise_db: white noise is added at this many dB below full scale, or up to 30 dB less; 0 adds none.
        shift_seconds: silence of up to this length is put before the clip.
    """

    def __init__(
        self,
        speed: float = 1.15,
        balance_db: float = 6.0,
        gain_db: float = 6.0,
        noise_db: float = 40.0,
        shift_seconds: float = 0.1,
    ):
        self.speed = speed
        self.balance_db = balance_db
        self.gain_db = gain_db
        self.noise_db = noise_db
        self.shift_seconds = shift_seconds
        self.noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def __call__(self, clips: AudioClips, generators: list[np.random.Generator]) -> AudioClips:
        """Vary each clip; lengths change with speed and leading silence."""
        unit = torch.from_numpy(np.stack([rng.random(5, dtype=np.float32) for rng in generators])) * 2 - 1
        rate = torch.exp(unit[:, 0] * math.log(self.speed))
        lead = ((unit[:, 1] + 1) / 2 * self.shift_seconds * SAMPLING_RATE).long()
        lengths = (clips.lengths / rate).long() + lead
        waveform = _resample(clips.waveform, rate, lead, int(lengths.max()))
        if self.balance_db:
            gains = np.stack([rng.standard_normal(8, dtype=np.float32) for rng in generators])
            waveform = _balance(waveform, torch.from_numpy(gains) * self.balance_db)
        waveform = waveform * 10 ** (unit[:, 2:3] * self.gain_db / 20)
        if self.noise_db:
            level = 10 ** (-(self.noise_db + (unit[:, 3:4] + 1) * 15) / 20)
            waveform = waveform + level * self._noise(unit[:, 4], waveform.shape[1])
        ends = torch.arange(waveform.shape[1]) < lengths[:, None]
        return AudioClips(waveform * ends, lengths)

    def _noise(self, unit: Tensor, samples: int) -> Tensor:
        """A random stretch of one long noise for each clip: new noise for each would cost more than the rest."""
        starts = ((unit + 1) / 2 * (len(self.noise) - samples)).long().tolist()
        return torch.stack([self.noise[start : start + samples] for start in starts])


def _resample(waveform: Tensor, rate: Tensor, lead: Tensor, samples: int) -> Tensor:
    """Linear interpolation at `rate` times the speed, after `lead` zeros. `[batch, in]` -> `[batch, samples]`."""
    position = (torch.arange(samples)[None] - lead[:, None]) * rate[:, None]
    x = (position + 0.5) * 2 / waveform.shape[1] - 1  # grid_sample's coordinate of a sample's middle
    grid = torch.stack([x, torch.zeros_like(x)], dim=2)[:, None]  # [batch, 1, samples, 2]
    return F.grid_sample(waveform[:, None, None], grid, padding_mode="zeros", align_corners=False)[:, 0, 0]


def _balance(waveform: Tensor, gains_db: Tensor) -> Tensor:
    """Filters each clip with a gain curve over frequency. `[batch, samples]`, `[batch, points]` in dB."""
    size = 2 ** math.ceil(math.log2(waveform.shape[1]))
    spectrum = torch.fft.rfft(waveform, n=size)
    curve = F.interpolate(gains_db[:, None], size=spectrum.shape[1], mode="linear", align_corners=True)[:, 0]
    return torch.fft.irfft(spectrum * 10 ** (curve / 20), n=size)[:, : waveform.shape[1]]
