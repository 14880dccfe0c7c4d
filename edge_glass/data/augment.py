"""Random variation of pictures in training, one independent random stream a sample.

Every sample brings its own generator, seeded by (seed, epoch, row), so that what a sample looks like depends neither on
its neighbours in the batch nor on the number of workers or ranks.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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
        # Black corners on white drawings would give the variation away, so the border is continued.
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
