"""A data set of drawn shapes and synthetic tones that a tiny model learns in seconds, and the config to train on it."""

import io
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    WhisperConfig,
    WhisperModel,
)

from edge_glass.config import to_experiment
from edge_glass.training.fit import fit

CONF = Path(__file__).resolve().parents[1] / "conf"
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
CONCEPTS = len(COLOURS) * len(SHAPES)
VENDORS = {"pen": "train", "brush": "test"}  # the second draws smaller, off the middle
VOICES = {"low": "train", "mid": "val", "high": "test"}
SIDE = 32
RATE = 16_000


def names() -> list[str]:
    """`red circle`, `red square` ...: one a concept."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def drawing(concept: int, size: int = SIDE, inset: float = 0.1) -> Image.Image:
    """A coloured shape on white."""
    colour, shape = names()[concept].split()
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    low, high = inset * size, (1 - inset) * size
    third = (high - low) / 3
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        pen.polygon([(low, high), (high, high), (size / 2, low)], fill=colour)
    else:
        pen.rectangle((low + third, low, high - third, high), fill=colour)
        pen.rectangle((low, low + third, high, high - third), fill=colour)
    return image


def tone(concept: int, octave: float = 1.0, seconds: float = 0.25, rate: int = RATE) -> np.ndarray:
    """Two notes, one for the colour and one for the shape."""
    colour, shape = divmod(concept, len(SHAPES))
    half = np.arange(int(seconds * rate / 2)) / rate
    notes = [np.sin(2 * np.pi * hertz * octave * half) for hertz in (300 + 120 * colour, 1200 + 300 * shape)]
    return (0.5 * np.concatenate(notes)).astype(np.float32)


def png(image: Image.Image, **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def wav(samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16", format: str = "WAV") -> bytes:
    """A sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def image_rows() -> list[dict]:
    """Each concept drawn by both vendors; every sixth of the training vendor's is for validation."""
    insets = {"pen": 0.1, "brush": 0.2}
    return [
        _row(concept, vendor, "val" if split == "train" and concept % 6 == 0 else split)
        | {"image": {"bytes": png(drawing(concept, inset=insets[vendor])), "path": f"{vendor}/{concept}.png"}}
        for vendor, split in VENDORS.items()
        for concept in range(CONCEPTS)
    ]


def speech_rows() -> list[dict]:
    """Each concept spoken by every voice."""
    octaves = {"low": 0.97, "mid": 1.0, "high": 1.03}
    return [
        _row(concept, voice, split)
        | {"audio": {"bytes": wav(tone(concept, octaves[voice])), "path": f"{voice}/{concept}.wav"}}
        for voice, split in VOICES.items()
        for concept in range(CONCEPTS)
    ]


def _row(concept: int, source: str, split: str) -> dict:
    return {
        "sample_id": f"{source}/{concept}",
        "concept_id": concept,
        "group": concept // 2,
        "text": names()[concept],
        "keywords": names()[concept].split(),
        "source": source,
        "split": split,
    }


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """The rows as the embedded data set stores its own."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(folder: Path, rows: list[dict]) -> Path:
    """A folder with metadata.jsonl."""
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_data(folder: Path) -> Path:
    """images.parquet and speech.parquet in `folder`."""
    write_parquet(folder / "images.parquet", image_rows())
    write_parquet(folder / "speech.parquet", speech_rows())
    return folder


def write_text_tower(folder: Path) -> Path:
    """A Sentence-BERT of 16 dimensions that knows the words of this data set."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *SHAPES]
    folder.mkdir()
    BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def composed(*overrides: str) -> DictConfig:
    """The config of `python train.py <overrides>`, not yet checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def sweep_of(params: dict[str, str]) -> list[list[str]]:
    """The overrides of each job that Hydra's basic sweeper makes of its `params`."""
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return batch


def overrides(data: Path, text_tower: Path) -> list[str]:
    """The command line for a run of seconds: this data, towers of a few thousand weights."""
    return [
        f"dataset.image={data}/images.parquet",
        f"dataset.audio={data}/speech.parquet",
        "~dataset.where",  # a dict would be merged into the one that is there
        "+dataset.where={split: [train]}",
        "~dataset.views",
        "+dataset.views={val: {queries: {image: {split: [val]}, audio: {split: [val]}}, "
        "gallery: {image: {split: [val]}, audio: {split: [val]}, text: {split: [train, val]}}}, "
        "test: {queries: {image: {split: [test]}, audio: {split: [test]}}, "
        "gallery: {image: {split: [test]}, audio: {split: [test]}}}}",
        f"backbone.text.name={text_tower}",
        "backbone.text.sha256=null",
        "~backbone.image",
        "+backbone.image={_target_: edge_glass.encoders.vision.VisionEncoder.from_config, model_type: resnet, "
        "image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], layer_type: basic, embedding_size: 8, "
        "hidden_sizes: [8], depths: [1]}",
        "~backbone.audio",
        "+backbone.audio={_target_: edge_glass.encoders.audio.AudioEncoder.from_config, num_mel_bins: 16, "
        "max_source_positions: 16, d_model: 16, encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 16}",
        "backbone.segments={image: 4, audio: 4, text: 1}",
        "encoder.dim=16",
        "encoder.widths=[16,8]",
        "dataset.recall=null",
        "optimization.batch_size=8",
        "training.max_steps=6",
        "training.max_seconds=null",
        "training.eval_every=4",
        "training.save_every=2",
        "training.log_every=1",
        "training.device=cpu",
        "training.precision=fp32",
        "launch.threads=1",
    ]


# A decoder of a few thousand weights, for a run with `overrides`.
DECODER = (
    "decoder=trm",
    "decoder.model.width=32",
    "decoder.model.heads=2",
    "decoder.tokenizer.vocabulary=300",
    "fusion.model.hidden_dim=32",
)


def experiment(data: Path, text_tower: Path, *more: str) -> DictConfig:
    """A checked config for this data set, with further overrides."""
    return to_experiment(composed(*overrides(data, text_tower), *more))


def puzzle_experiment(*more: str) -> DictConfig:
    """A checked config that solves 4 x 4 Sudoku in seconds."""
    small = [
        "experiment=trm_sudoku",
        "dataset.puzzles.game.side=4",
        "dataset.puzzles.game.clues=6",
        "dataset.puzzles.train=64",
        "dataset.puzzles.val=16",
        "dataset.puzzles.test=16",
        "decoder.model.width=16",
        "decoder.model.heads=2",
        "decoder.model.supervision=3",
        "optimization.batch_size=8",
        "optimization.average=0.9",
        "training.max_steps=6",
        "training.max_seconds=null",
        "training.eval_every=4",
        "training.save_every=3",
        "training.log_every=2",
        "training.device=cpu",
        "training.precision=fp32",
        "launch.threads=1",
    ]
    return to_experiment(composed(*small, *more))


def run(config: DictConfig, folder: Path) -> float | None:
    """Train in this process."""
    return fit(plain(config), str(folder))


def plain(config: DictConfig) -> dict:
    """As `launch.run` hands configs over."""
    return cast(dict, OmegaConf.to_container(config, resolve=True, enum_to_str=True))


def write_frozen_towers(folder: Path) -> Path:
    """A CLIP vision model (`image`) and a Whisper (`audio`) of a few thousand random weights, in the hub's format."""
    folder.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        CLIPVisionModel(CLIPVisionConfig(**small, image_size=16, patch_size=8)).save_pretrained(folder / "image")
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / "image")
        audio: dict[str, Any] = {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
        }
        config = WhisperConfig(
            **audio,
            num_mel_bins=16,
            max_source_positions=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            vocab_size=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        WhisperModel(config).save_pretrained(folder / "audio")
    return folder


def frozen(towers: Path) -> list[str]:
    """Overrides, after those of `overrides`, that put these frozen towers into the place of the trained ones."""
    return [
        "~backbone.image",
        f"+backbone.image={{_target_: edge_glass.encoders.vision.VisionEncoder.from_pretrained, name: {towers}/image}}",
        "~backbone.audio",
        f"+backbone.audio={{_target_: edge_glass.encoders.audio.AudioEncoder.from_pretrained, name: {towers}/audio}}",
        "dataset.image_augment=null",
    ]
