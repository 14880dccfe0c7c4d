"""Encoded bytes to pictures and waveforms, with every way they can be broken turned into one error."""

import io
import re
import warnings

import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps
from torch import Tensor

SAMPLING_RATE = 16_000
# A 30 s Whisper window is the longest that a tower reads; the header of a broken or hostile file may promise hours.
MAX_CLIP_SECONDS = 600
# libsndfile reads a wav or aiff file that ends too early without complaint, but notes it in its log.
SHORT_CHUNK = re.compile(r"^ *(?:data|SSND) : (?P<promised>\d+) \(should be (?P<found>\d+)\)", re.MULTILINE)
STREAMED = 0x7FF0_0000  # programs that write to a pipe cannot know the size and promise about 2 or 4 GiB


class Undecodable(Exception):
    """Media that cannot be used; the message says why."""


def decode_image(data: bytes, size: int) -> Tensor:
    """A square picture: the short side scaled to `size` (bicubic), the middle cut out, transparency on white.

    Args:
        data: an image file of any format that Pillow reads.
        size: side in pixels.

    Returns:
        `[3, size, size]` uint8.

    Raises:
        Undecodable: no image, a broken one, or one of so many pixels that Pillow takes it for a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                picture = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's plugins raise almost anything on broken input
        raise Undecodable(f"image: {_reason(error)}") from error
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode.startswith("I;16"):  # Pillow would cut off all above 255: almost everything white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("RGB")
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def decode_audio(data: bytes, max_seconds: float) -> Tensor:
    """A mono clip at 16 kHz: channels averaged, resampled, cut after `max_seconds`.

    soundfile reads wav, flac, mp3 and Ogg about ten times faster than `torchaudio.load`, which needs torchcodec and
    ffmpeg.

    Args:
        data: an audio file of any format that libsndfile reads.
        max_seconds: longer clips lose their end.

    Returns:
        `[samples]` float32 in -1..1.

    Raises:
        Undecodable: no audio, a broken or empty clip, one that ends before its header says, or one with samples
            that are no numbers.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            promised = min(file.frames, rate * MAX_CLIP_SECONDS)
            wanted = min(promised, int(max_seconds * rate) + 1)
            samples = file.read(wanted, dtype="float32", always_2d=True)
            cut = SHORT_CHUNK.search(file.extra_info)
    except Exception as error:  # libsndfile's own errors and what a broken header leads to
        raise Undecodable(f"audio: {_reason(error)}") from error
    if len(samples) == 0:
        raise Undecodable("audio: the clip is empty")
    if cut and int(cut["promised"]) < STREAMED:
        raise Undecodable(f"audio: truncated, {cut['found']} of {cut['promised']} bytes")
    if len(samples) < wanted:
        raise Undecodable(f"audio: truncated, {len(samples)} of {wanted} samples")
    waveform = torch.from_numpy(samples.mean(axis=1))
    if not torch.isfinite(waveform).all():
        raise Undecodable("audio: samples that are no numbers (NaN or infinite)")
    if rate != SAMPLING_RATE:
        from torchaudio.functional import resample  # slow to import, and most sets are stored at 16 kHz

        waveform = resample(waveform, rate, SAMPLING_RATE)
    return waveform[: int(max_seconds * SAMPLING_RATE)]


def _reason(error: Exception) -> str:
    """The same words in every run: libraries write where in memory the bytes lie."""
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the bytes", f"{type(error).__name__}: {error}")
