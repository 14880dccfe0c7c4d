import numpy as np
import pytest
import torch

from edge_glass.data.augment import ImageAugment
from edge_glass.data.decode import decode_image
from tests import mini

STILL = {
    "degrees": 0.0,
    "translate": 0.0,
    "scale": 1.0,
    "stretch": 1.0,
    "shear": 0.0,
    "flip": 0.0,
    "colour": 0.0,
    "brightness": 0.0,
    "blur": 0.0,
    "erase": 0.0,
}
STRONG = {
    "degrees": 40.0,
    "translate": 0.3,
    "scale": 1.5,
    "stretch": 1.5,
    "shear": 0.3,
    "flip": 0.5,
    "colour": 0.5,
    "brightness": 0.4,
    "blur": 0.5,
    "erase": 0.5,
}


def images(count=6, size=32) -> torch.Tensor:
    return torch.stack([decode_image(mini.png(mini.drawing(i * 3 + 1)), size) for i in range(count)]).float() / 255


def streams(count: int, epoch: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((0, epoch, place)) for place in range(count)]


def energy_centre(image: torch.Tensor) -> tuple[float, float]:
    """Where the drawing is, as (x, y) in pixels."""
    ink = (1 - image).sum(0)
    place = torch.arange(image.shape[-1], dtype=torch.float32)
    return float((ink.sum(0) * place).sum() / ink.sum()), float((ink.sum(1) * place).sum() / ink.sum())


def test_settings_that_change_nothing_leave_the_picture():
    torch.testing.assert_close(ImageAugment(**STILL)(images(), streams(6)), images(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", [name for name in STRONG if name not in ("flip", "blur", "erase")])
def test_each_setting_alone_changes_every_picture_in_its_own_way(setting):
    augment = ImageAugment(**{**STILL, setting: STRONG[setting]})
    once, again = augment(images(), streams(6)), augment(images(), streams(6, epoch=1))
    for picture, first, second in zip(images(), once, again, strict=True):
        assert (first - picture).abs().mean() > 1e-3
        assert (first - second).abs().mean() > 1e-4


@pytest.mark.parametrize("setting", ["flip", "blur", "erase"])
def test_a_probability_is_the_share_of_pictures_that_change(setting):
    ramp = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(400, 3, 8, 8).clone()
    for probability in (0.0, 0.3, 1.0):
        varied = ImageAugment(**{**STILL, setting: probability})(ramp.clone(), streams(400))
        changed = ((varied - ramp).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean()
        assert float(changed) == pytest.approx(probability, abs=0.08)


def test_a_flip_is_the_mirror_image():
    varied = ImageAugment(**{**STILL, "flip": 1.0})(images(), streams(6))
    torch.testing.assert_close(varied, images().flip(3), atol=1e-4, rtol=0)


def test_a_shift_stays_within_its_share_of_the_side():
    picture = decode_image(mini.png(mini.drawing(0, 64, inset=0.4)), 64).float()[None] / 255
    varied = ImageAugment(**{**STILL, "translate": 0.2})(picture.expand(200, 3, 64, 64), streams(200))
    centres = np.array([energy_centre(image) for image in varied]) - energy_centre(picture[0])
    assert np.abs(centres).max() <= 0.2 * 64 + 0.5
    assert np.abs(centres).max(axis=0).min() > 0.18 * 64
    assert np.abs(centres.mean(axis=0)).max() < 2


def test_a_larger_scale_draws_larger_and_smaller():
    picture = decode_image(mini.png(mini.drawing(1, 64, inset=0.35)), 64).float()[None] / 255
    varied = ImageAugment(**{**STILL, "scale": 1.5})(picture.expand(200, 3, 64, 64), streams(200))
    size = ((1 - varied).sum(dim=(1, 2, 3)) / (1 - picture).sum()).sqrt()
    assert float(size.min()) == pytest.approx(1 / 1.5, abs=0.05)
    assert float(size.max()) == pytest.approx(1.5, abs=0.05)


def test_the_background_is_continued():
    settings = {**STRONG, "colour": 0.0, "brightness": 0.0, "erase": 0.0}
    shape = decode_image(mini.png(mini.drawing(20, 32, inset=0.4)), 32).float() / 255
    varied = ImageAugment(**settings)(shape.expand(100, 3, 32, 32).clone(), streams(100))
    corners = varied[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 0.99).float().mean() > 0.9  # a shape may have been moved into a corner; black never is
    torch.testing.assert_close(ImageAugment(**settings)(torch.ones(50, 3, 9, 9), streams(50)), torch.ones(50, 3, 9, 9))


def test_pixels_stay_between_black_and_white():
    varied = ImageAugment(**STRONG)(images(), streams(6))
    assert varied.min() >= 0 and varied.max() <= 1
    assert torch.isfinite(varied).all()


def test_the_pictures_that_came_in_are_left_as_they_were():
    given = images()
    ImageAugment(**STRONG)(given, streams(6))
    assert torch.equal(given, images())


def test_a_picture_is_varied_alone_as_among_others():
    augment = ImageAugment(**STRONG)
    together = augment(images(), streams(6))
    for place in (0, 3, 5):
        alone = augment(images()[place : place + 1], [np.random.default_rng((0, 0, place))])
        torch.testing.assert_close(alone[0], together[place])
