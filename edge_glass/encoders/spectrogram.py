"""Random variation of spectrograms in training: the same words from other mouths, at other speeds, in other rooms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectrogramAugment(nn.Module):
    """Stretches time and frequency, tilts the spectrum, raises the noise floor and hides stretches and bands.

    On the spectrogram each of these costs a few percent of what it costs on the waveform. Stretching frequency stands
    for the length of the vocal tract (Jaitly & Hinton 2013), a smooth gain over frequency for the voice and the room,
    hidden stretches and bands are SpecAugment's (Park et al. 2019). Draws from torch's generator, whose state is part
    of a checkpoint.

    Args:
        tempo: the speed is drawn log-uniformly from [1/tempo, tempo]; 1 keeps it.
        warp: the stretch of the frequency axis, likewise.
        shift: the frequency axis is moved by up to this share of its height.
        delay: silence of up to this share of the window comes first.
        balance: standard deviation of the gain at six points over frequency, lines in between, in units of the
            spectrogram (0.25 is 10 dB).
        noise: probability of a noise floor, drawn between the loudest place and 80 dB below.
        hidden_frames: longest hidden stretch.
        hidden_bins: widest hidden band.
    """

    def __init__(
        self,
        tempo: float = 1.0,
        warp: float = 1.0,
        shift: float = 0.0,
        delay: float = 0.0,
        balance: float = 0.0,
        noise: float = 0.0,
        hidden_frames: int = 0,
        hidden_bins: int = 0,
    ):
        super().__init__()
        if tempo < 1 or warp < 1:
            raise ValueError(f"tempo={tempo} and warp={warp} are factors of at least 1")
        self.tempo = tempo
        self.warp = warp
        self.shift = shift
        self.delay = delay
        self.balance = balance
        self.noise = noise
        self.hidden_frames = hidden_frames
        self.hidden_bins = hidden_bins

    @torch.no_grad()
    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Varied spectrograms and the number of frames that hold sound in them.

        Args:
            mel: `[batch, bins, frames]`, 40 dB a unit, as `LogMel` gives it.
            frames: `[batch]`, the frames that hold sound.
        """
        mel, frames = self._stretch(mel, frames)
        batch, bins, width = mel.shape
        if self.balance:
            points = self.balance * torch.randn(batch, 1, 6, device=mel.device)
            mel = mel + F.interpolate(points, size=bins, mode="linear", align_corners=True).transpose(1, 2)
        if self.noise:
            floor = mel.amax(dim=(1, 2), keepdim=True) - 2 * torch.rand(batch, 1, 1, device=mel.device)
            noisy = torch.rand(batch, 1, 1, device=mel.device) < self.noise
            unit = 4 * math.log(10)  # a unit of the spectrogram is 40 dB; here as ln of power, since powers add
            mel = torch.where(noisy, torch.logaddexp(mel * unit, floor * unit) / unit, mel)
        hidden = _span(frames, width, self.hidden_frames)[:, None, :]
        bands = _span(torch.full_like(frames, bins), bins, self.hidden_bins)[:, :, None]
        return mel.masked_fill(hidden | bands, 0.0), frames

    def _stretch(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        batch, bins, width = mel.shape
        draw = torch.rand(batch, 4, device=mel.device) * 2 - 1
        tempo = torch.exp(draw[:, 0] * math.log(self.tempo))
        warp = torch.exp(draw[:, 1] * math.log(self.warp))
        delay = (draw[:, 3] + 1) / 2 * self.delay
        # From output to input coordinates, which run from -1 to 1: both axes are stretched from their start.
        theta = mel.new_zeros(batch, 2, 3)
        theta[:, 0, 0], theta[:, 0, 2] = tempo, tempo - 1 - 2 * delay * tempo
        theta[:, 1, 1], theta[:, 1, 2] = warp, warp - 1 + 2 * self.shift * draw[:, 2]
        floor = mel.amin(dim=(1, 2), keepdim=True)  # what lies outside is silence
        grid = F.affine_grid(theta, [batch, 1, bins, width], align_corners=False)
        stretched = F.grid_sample((mel - floor)[:, None], grid, align_corners=False)[:, 0] + floor
        return stretched, (frames / tempo + delay * width).ceil().long().clamp(1, width)


def _span(sizes: Tensor, width: int, longest: int) -> Tensor:
    """`[batch, width]` bool, True in one random stretch of 0 to `longest` places among the first `sizes`."""
    length = (torch.rand(len(sizes), device=sizes.device) * (longest + 1)).long()
    start = (torch.rand(len(sizes), device=sizes.device) * (sizes - length).clamp(min=1)).long()
    place = torch.arange(width, device=sizes.device)
    return (place >= start[:, None]) & (place < (start + length)[:, None])
