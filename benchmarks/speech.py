"""What a short context saves on clips of 1 to 5 seconds, and what it costs: cosine of each token to the exact one.

python -m benchmarks.speech                                    random weights in the size of whisper-base
python -m benchmarks.speech --backbone openai/whisper-tiny.en  a checkpoint: a folder or a hub name

Ours is measured from waveforms to tokens, transformers' WhisperEncoder from log-mels that are ready. The silence that
short contexts attend to is encoded before, once, as in every run whose backbone is frozen. Random weights take as long
as real ones, but of how near the tokens are they say little: they attend to all tokens about alike.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from edge_glass.data.batch import AudioClips
from edge_glass.data.decode import decode_audio
from edge_glass.data.rows import read_rows
from edge_glass.encoders.audio import SAMPLING_RATE, AudioEncoder
from edge_glass.models.pooling import SegmentPool
from edge_glass.reports.tables import markdown

SPEECH = Path(__file__).resolve().parents[1] / "data" / "emoji_speech" / "speech.parquet"
BASE: dict[str, Any] = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
SECONDS = (1, 2, 3, 4, 5)
MARGINS = (0, 50, 100, 200)
POOL = SegmentPool()  # the mean over a clip
FLOOR = 5.0  # times as fast as WhisperEncoder; less is a defect


def clips(seconds: tuple[int, ...] = SECONDS, seed: int = 0) -> AudioClips:
    """Clips of these lengths, each of one voice that says one name after the other."""
    speech = read_rows(SPEECH)
    voices: dict[str, list[int]] = {}
    for row, voice in enumerate(speech.column("source")):
        voices.setdefault(voice, []).append(row)
    draw = random.Random(seed)
    waveforms = []
    for length in (SAMPLING_RATE * count for count in seconds):
        rows = voices[draw.choice(sorted(voices))]
        said = torch.zeros(0)
        while len(said) < length:
            said = torch.cat([said, decode_audio(speech.media("audio", draw.choice(rows)), max(seconds))])
        waveforms.append(said[:length])
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return AudioClips(pad_sequence(waveforms, batch_first=True), lengths)


def exact_encoder(backbone: str | None) -> AudioEncoder:
    """The encoder of a checkpoint; None: of random weights in the size of whisper-base."""
    if backbone is not None:
        return AudioEncoder.from_pretrained(backbone)
    torch.manual_seed(0)
    return AudioEncoder(AudioEncoder.from_config(**BASE).backbone, frozen=True)


def short_encoder(exact: AudioEncoder, margin_frames: int = 50, silent_keys: bool = True) -> AudioEncoder:
    """The same weights with a short context."""
    return AudioEncoder(exact.backbone, True, context="short", margin_frames=margin_frames, silent_keys=silent_keys)


def rows(repeats: int = 5, backbone: str | None = None) -> list[dict[str, Any]]:
    """Short contexts beside WhisperEncoder, which takes 30 s of each clip, on one batch, in turn.

    Args:
        repeats: how often each is timed.
        backbone: see `exact_encoder`.

    Returns:
        Rows of `name`, `peer`, seconds (medians), `ratio` (median over the repeats), `spread` (its least and most),
        `floor`; `equal`: whether our encoder gives WhisperEncoder's very tokens where the margin fills the window
        (a short one is near, see `likeness`).
    """
    exact, batch = exact_encoder(backbone), clips()
    mel = exact.log_mel(batch)
    ours = {
        "short context": short_encoder(exact),
        "short context, silent_keys=false": short_encoder(exact, silent_keys=False),
    }
    calls: list[Callable[[], Any]] = [partial(encoder, batch) for encoder in ours.values()]
    with torch.no_grad():
        window = short_encoder(exact, margin_frames=exact.log_mel.frames)(batch[:1]).tokens
        equal = torch.equal(window, exact.backbone(mel[:1]).last_hidden_state)
        *own, peer = _timed([*calls, partial(exact.backbone, mel)], repeats)
    found = []
    for name, seconds in zip(ours, own, strict=True):
        ratios = [theirs / mine for mine, theirs in zip(seconds, peer, strict=True)]
        found.append(
            {
                "name": f"{name}, {len(batch)} clips of {min(SECONDS)} to {max(SECONDS)} s",
                "peer": "transformers WhisperEncoder, 30 s a clip",
                "ours_seconds": statistics.median(seconds),
                "peer_seconds": statistics.median(peer),
                "ratio": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "floor": FLOOR,
                "equal": equal,
            }
        )
    return found


def _timed(calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds of each call, one after the other and again; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            if repeat:
                taken.append(time.perf_counter() - began)
    return seconds


def likeness(backbone: str | None = None, sets: int = 3) -> list[dict[str, Any]]:
    """Cosines of tokens of sound, and of their mean over a clip, to the exact ones, by margin and silent keys.

    Args:
        backbone: see `exact_encoder`.
        sets: how many clips of each length.
    """
    exact, batch = exact_encoder(backbone), clips(SECONDS * sets, seed=1)
    wanted = exact(batch)
    found = []
    for silent_keys in (False, True):
        for margin in MARGINS:
            short = short_encoder(exact, margin, silent_keys)(batch)
            cosines = cosine_similarity(short.tokens[short.mask], wanted.tokens[wanted.mask], dim=-1)
            figures = {
                "mean": cosines.mean().item(),
                "percentile": cosines.quantile(0.01).item(),
                "least": cosines.min().item(),
                "least_clip": cosine_similarity(POOL(short), POOL(wanted), dim=-1).min().item(),
            }
            found.append({"silent_keys": silent_keys, "margin_frames": margin, "tokens": len(cosines), **figures})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", help="a Whisper checkpoint; random weights without it")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    weights = options.backbone or "random weights, whose cosines say little about real ones"
    print(f"{weights}; threads: {torch.get_num_threads()}")
    measured = rows(options.repeats, options.backbone)
    for row in measured:
        least, most = row["spread"]
        print(
            f"{row['name']}: {row['ours_seconds']:.3f} s, {row['peer']}: {row['peer_seconds']:.3f} s; "
            f"{row['ratio']:.1f} x ({least:.1f} to {most:.1f}); exact over the whole window: {row['equal']}"
        )
    columns = ("mean", "percentile", "least", "least_clip")
    table = [
        [str(row["silent_keys"]).lower(), str(row["margin_frames"]), *(f"{row[name]:.4f}" for name in columns)]
        for row in likeness(options.backbone, sets=3 if options.backbone else 1)
    ]
    print(markdown(["silent_keys", "margin_frames", *columns], table))
    slow = [row["name"] for row in measured if row["ratio"] < row["floor"] or not row["equal"]]
    if slow:
        raise SystemExit(f"less than {FLOOR} x, or not equal: {slow}")


if __name__ == "__main__":
    main()
