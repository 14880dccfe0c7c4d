"""Alignment of frozen towers, from the command to the report, beside open_clip with both towers locked.

Both read 512 pictures with captions, ten epochs, batches of 64, through a vision transformer of the size of ViT-B/32
and a text transformer of the size of MiniLM-L6, random weights, and train one linear layer on top of each. open_clip's
side is its model and its loss in the plain loop of its own script, with pictures decoded and captions tokenised
beforehand, and no evaluation; ours is the whole command with its cache, evaluation and report.
"""

import io
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from benchmarks.sides import row, seconds
from edge_glass.runs import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAIRS, EPOCHS, BATCH, WIDTH = 512, 10, 64, 512
WORDS = [f"word{number}" for number in range(1000)]
STEPS = EPOCHS * PAIRS // BATCH


def rows() -> list[dict[str, Any]]:
    """End to end, and a step once every row is known."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        write_towers(folder)
        ours = seconds(lambda: train(folder, "run"))
        speeds = [entry["samples_per_second"] for entry in read_metrics(folder / "run") if entry["kind"] == "train"]
        their_total, their_step = open_clip_run(folder)
    step = BATCH / statistics.median(speeds)
    return [
        row("alignment, end to end", "open_clip", [(ours, their_total)], 6.0, "the same pairs, sizes and steps"),
        row("alignment, a step after the first epoch", "open_clip", [(step, their_step)], 200.0, "as above"),
    ]


def write_data(folder: Path) -> None:
    """`pictures.parquet`: random pictures with random captions of eight words, all of the training split."""
    draw = np.random.default_rng(0)
    table = []
    for number in range(PAIRS):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
        text = " ".join(draw.choice(WORDS, 8)) + f" {WORDS[number]}"
        split = "val" if number % 16 == 0 else "train"
        image = {"bytes": file.getvalue(), "path": None}
        table.append({"sample_id": str(number), "image": image, "text": text, "split": split})
    pq.write_table(pa.Table.from_pylist(table), folder / "pictures.parquet")


def write_towers(folder: Path) -> None:
    """Random weights in the sizes of ViT-B/32 and MiniLM-L6, in the hub's format."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(patch_size=32, hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    CLIPVisionModel(vision).save_pretrained(folder / "image")
    CLIPImageProcessor().save_pretrained(folder / "image")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    text = BertConfig(
        vocab_size=len(vocabulary), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(text).save_pretrained(folder / "text")
    BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}).save_pretrained(folder / "text")


def train(folder: Path, name: str, *more: str, cache: str = "cache") -> None:
    """Our command on these pairs and towers."""
    overrides = [
        "encoder=vision_text",
        "backbone=pretrained",
        "dataset=image_text",
        f"dataset.image={folder}/pictures.parquet",
        "dataset.image_augment=null",
        "~dataset.views.test",
        f"backbone.image.name={folder}/image",
        f"backbone.text.name={folder}/text",
        f"encoder.dim={WIDTH}",
        f"encoder.widths=[{WIDTH}]",
        "projection@encoder.text.projection=matryoshka",
        f"optimization.batch_size={BATCH}",
        "optimization.negative_captions=0",
        f"training.max_steps={STEPS}",
        f"training.eval_every={STEPS}",
        f"training.save_every={STEPS}",
        "training.max_seconds=null",
        "training.device=cpu",
        "launch.threads=1",
        f"cache.dir={folder}/{cache}",
        f"hydra.run.dir={folder}/{name}",
        *more,
    ]
    subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def open_clip_run(folder: Path) -> tuple[float, float]:
    """Seconds of all epochs, and of a step."""
    from open_clip import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=12, width=768, patch_size=32, image_size=224)
    text = CLIPTextCfg(context_length=16, vocab_size=len(WORDS) + 5, width=384, heads=12, layers=6)
    model = CLIP(WIDTH, vision, text)
    model.requires_grad_(False)
    for head in (model.visual.proj, model.text_projection, model.logit_scale):
        head.requires_grad_(True)
    heads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, loss = torch.optim.AdamW(heads, lr=1e-3), ClipLoss()
    images = torch.randn(PAIRS, 3, 224, 224)
    texts = torch.randint(5, len(WORDS) + 5, (PAIRS, 16))

    def step(chosen: torch.Tensor) -> None:
        features = model(images[chosen], texts[chosen])
        value = loss(*features)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    took = []
    for _ in range(EPOCHS):
        took += [seconds(partial(step, chosen)) for chosen in torch.randperm(PAIRS).split(BATCH)]
    return sum(took), sorted(took)[len(took) // 2]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in rows():
        print(found)
