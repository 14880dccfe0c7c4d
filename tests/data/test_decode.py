import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from edge_glass.data.decode import SAMPLING_RATE, Undecodable, decode_audio, decode_image
from tests import mini


def file_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours, as of a real picture."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 5, height))
    waves = [np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y)]
    return Image.fromarray((127.5 * (np.stack(waves, axis=2) + 1)).astype(np.uint8))


def left_and_right(picture: torch.Tensor) -> tuple[list[int], list[int]]:
    side = picture.shape[2]
    return picture[:, side // 2, 1].tolist(), picture[:, side // 2, -2].tolist()


def half_red(size=(8, 8)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


RED, BLUE = [255, 0, 0], [0, 0, 255]


@pytest.mark.parametrize("form", ["RGBA", "palette", "LA"])
def test_what_is_transparent_becomes_white(form):
    image = half_red().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[255] * 4 + [0] * 4]), 8, axis=0)))
    if form == "palette":
        image = image.quantize(8)
    elif form == "LA":
        image = image.convert("LA")
    left, right = left_and_right(decode_image(file_of(image), 8))
    assert left == ([76, 76, 76] if form == "LA" else RED)
    assert right == [255, 255, 255]


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    assert decode_image(file_of(image), 4)[:, 0, 0].tolist() == pytest.approx([227, 127, 127], abs=2)


def test_a_camera_held_sideways_gives_an_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turned by 180 degrees
    left, right = left_and_right(decode_image(file_of(half_red(), exif=exif), 8))
    assert (left, right) == (BLUE, RED)


def test_grey_pictures_have_three_equal_channels():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    picture = decode_image(file_of(grey), 8)
    assert picture.shape == (3, 8, 8) and picture.dtype == torch.uint8
    assert torch.equal(picture[0], torch.from_numpy(np.array(grey)))
    assert torch.equal(picture[0], picture[1]) and torch.equal(picture[0], picture[2])


def test_sixteen_bit_pictures_keep_their_shades():
    shades = np.linspace(0, 65535, 64).reshape(8, 8)
    picture = decode_image(file_of(Image.fromarray(shades.astype(np.uint16))), 8)
    np.testing.assert_allclose(picture[1].numpy(), shades / 257, atol=1)


@pytest.mark.parametrize(("mode", "format"), [("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("P", "GIF"), ("RGB", "WEBP")])
def test_every_kind_of_pixel_is_read(mode, format):
    data = file_of(half_red((64, 64)).convert(mode), format)
    np.testing.assert_allclose(left_and_right(decode_image(data, 16)), [RED, BLUE], atol=12)


# CLIP cuts at whole pixels: where the margin is odd, its square lies half a pixel off the middle.
@pytest.mark.parametrize(
    ("size", "tolerance"), [((90, 60), 2), ((60, 90), 2), ((48, 48), 2), ((32, 32), 0.1), ((20, 31), 9)]
)
def test_the_square_is_the_one_that_clip_sees(size, tolerance):
    image = photograph(*size)
    clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = clip(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0].float()
    difference = (decode_image(file_of(image), 32).float() - expected).abs()
    assert difference.mean() < tolerance  # of 255; one pixel off would be about 15


def test_a_picture_of_the_right_size_is_not_touched():
    image = photograph(24, 24)
    assert torch.equal(decode_image(file_of(image), 24), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify"),
        (b"<!DOCTYPE html><html><body>404 not found</body></html>", "cannot identify"),
        (mini.png(photograph(64, 64))[:-400], "truncated|broken|ended"),
        (mini.wav(mini.tone(0)), "cannot identify"),
    ],
    ids=["nothing", "a web page", "a torn picture", "a sound"],
)
def test_what_is_no_whole_picture_is_undecodable_and_says_why(data, reason):
    with pytest.raises(Undecodable, match=f"^image: .*({reason})"):
        decode_image(data, 16)


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(monkeypatch):
    bomb = file_of(Image.new("1", (4000, 4000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)  # Pillow's own limit is 89 million
    assert len(bomb) < 5000
    with pytest.raises(Undecodable, match=r"^image: DecompressionBomb"):
        decode_image(bomb, 16)


def pitch(waveform: torch.Tensor) -> float:
    """The strongest frequency, in hertz."""
    spectrum = torch.fft.rfft(waveform * torch.hann_window(len(waveform))).abs()
    return float(spectrum.argmax()) * SAMPLING_RATE / len(waveform)


def sine(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_stereo_at_another_rate_becomes_mono_at_16_khz_with_its_pitch():
    both = np.stack([sine(440, 44_100), np.zeros(22_050, np.float32)], axis=1)
    clip = decode_audio(mini.wav(both, 44_100), max_seconds=1)
    assert clip.shape == (8000,) and clip.dtype == torch.float32
    assert pitch(clip) == pytest.approx(440, abs=2)
    assert clip.abs().max() == pytest.approx(0.25, abs=0.01)  # the mean of the channels


@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("AIFF", "PCM_24")]
)
def test_usual_formats_are_read(format, subtype):
    clip = decode_audio(mini.wav(sine(500, 16_000), subtype=subtype, format=format), max_seconds=1)
    assert len(clip) == 8000
    assert pitch(clip) == pytest.approx(500, abs=2)


def test_long_clips_lose_their_end():
    samples = sine(300, 8000, seconds=2)
    clip = decode_audio(mini.wav(samples, 8000), max_seconds=0.5)
    assert len(clip) == 8000
    whole = decode_audio(mini.wav(samples, 8000), max_seconds=9)
    assert len(whole) == 32_000
    torch.testing.assert_close(clip[:7900], whole[:7900], atol=1e-3, rtol=0)


def with_data_size(wav: bytes, size: int) -> bytes:
    """The same wav file with another promise in its header."""
    place = wav.index(b"data") + 4
    return wav[:place] + size.to_bytes(4, "little") + wav[place + 4 :]


def test_a_wav_file_that_was_written_to_a_pipe_is_whole():
    wav = mini.wav(sine(440, 16_000))
    assert len(decode_audio(with_data_size(wav, 0xFFFF_FFFF), max_seconds=1)) == 8000


NAN = sine(440, 16_000)
NAN[100] = np.nan


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", ""),
        (b"<html>404 not found</html>", ""),
        (mini.png(mini.drawing(0)), ""),
        (mini.wav(np.zeros(0, np.float32)), "empty"),
        (mini.wav(sine(440, 16_000))[:4000], "truncated, 3956 of 16000 bytes"),
        (mini.wav(sine(440, 16_000), format="AIFF")[:4000], "truncated"),
        (mini.wav(sine(440, 16_000), format="FLAC")[:2000], ""),
        (mini.wav(sine(440, 16_000), subtype="OPUS", format="OGG")[:1500], ""),
        (mini.wav(sine(440, 16_000), subtype="VORBIS", format="OGG")[:-300], ""),
        (mini.wav(NAN, subtype="FLOAT"), "no numbers"),
    ],
    ids=[
        "nothing",
        "web page",
        "picture",
        "empty",
        "torn wav",
        "torn aiff",
        "torn flac",
        "torn opus",
        "torn vorbis",
        "nan",
    ],
)
def test_what_is_no_whole_clip_is_undecodable_and_says_why(data, reason):
    with pytest.raises(Undecodable, match=f"^audio: .*{reason}"):
        decode_audio(data, max_seconds=1)


def test_a_header_that_promises_hours_costs_no_memory():
    wav = with_data_size(mini.wav(sine(440, 16_000)), 0x7000_0000)  # 16 hours
    with pytest.raises(Undecodable, match="truncated"):
        decode_audio(wav, max_seconds=1e9)


@pytest.mark.parametrize(("decode", "argument"), [(decode_image, 32), (decode_audio, 1.0)])
def test_the_reason_is_the_same_in_every_run(decode, argument):
    with pytest.raises(Undecodable) as refused:
        decode(b"<html>404</html>", argument)
    assert "the bytes" in str(refused.value) and "0x" not in str(refused.value)
