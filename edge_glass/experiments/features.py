"""The features of frozen towers: which towers have them stored, under which name, and who computes them."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from edge_glass.config import ConfigError
from edge_glass.data.decode import Undecodable
from edge_glass.data.features import TORCH, FeatureStore
from edge_glass.data.loader import Collate
from edge_glass.data.rows import Rows, data_hash
from edge_glass.data.samples import Decoding, MediaReader
from edge_glass.distributed import barrier, current_ranks, is_main
from edge_glass.encoders.tokens import Tokens
from edge_glass.encoders.weights import weights_hash
from edge_glass.experiments.parts import choose_precision, plain
from edge_glass.models.alignment import MultimodalAlignmentModel, Tower
from edge_glass.training.precision import autocast

log = logging.getLogger(__name__)
VERSION = 1  # of what is computed from one file and one tower; raised when decoding or encoding changes
ENCODED_TOGETHER = 32  # rows; a probe of that size says how large a store will be, and how long it takes


class StoredTower:
    """One frozen tower over the rows of a table, and the store of what it makes of them.

    Args:
        modality: of the tower.
        tower: frozen up to its tokens.
        rows: the table.
        decoding: of its media.
        collate: their normalisation and, if the pictures vary in training, how.
        config: of the run.
        pooled: whether what is stored is what the projection reads, not the tokens.
        device: of the tower.
    """

    def __init__(
        self,
        modality: str,
        tower: Tower,
        rows: Rows,
        decoding: Decoding,
        collate: Collate,
        config: DictConfig,
        pooled: bool,
        device: torch.device,
    ):
        self.modality, self.tower, self.collate, self.config, self.pooled = modality, tower, collate, config, pooled
        self.device = device
        self.reader = MediaReader(rows, modality, decoding)
        self.precision = choose_precision(config.training.precision.value, device)
        self.views = config.cache.views if modality == "image" and collate.image_augment is not None else 0
        folder = Path(config.cache.dir).expanduser() / f"{modality}-{self._key(rows)}"
        self.store = FeatureStore(folder, self.reader.sample_ids, 1 + self.views, config.cache.dtype)

    def build(self) -> None:
        """Compute what is missing, together with other ranks and other jobs; wait for what they compute.

        Raises:
            ConfigError: a store larger than `cache.max_bytes`.
        """
        missing = self.store.missing()
        if not missing:
            log.info("%s features: %d rows, all in %s", self.modality, len(self.store.sample_ids), self.store.folder)
            return
        self._announce(missing)
        bar = tqdm(total=len(missing), desc=f"{self.modality} features", unit="block", disable=not is_main())
        turn = current_ranks().rank * len(missing) // current_ranks().world_size  # ranks begin at different places
        while missing:
            order, wrote = missing[turn:] + missing[:turn], False
            for block in order:
                with self.store.claim(block) as mine:
                    if mine:
                        self._write(block)
                        wrote = True
            left = self.store.missing()
            bar.update(len(missing) - len(left))
            if left and not wrote:
                time.sleep(0.2)  # another process is at it
            missing, turn = left, 0
        bar.close()

    def _announce(self, missing: list[int]) -> None:
        """Say how large the store will be, and how long that takes, from a few rows."""
        rows = self.store.rows_of(missing[0])[:ENCODED_TOGETHER]
        began = time.monotonic()
        features, _ = self._encode(rows)
        seconds = time.monotonic() - began
        real = [row for row in features if row]
        numbers = sum(variant.numel() for row in real for variant in row) / max(len(real), 1)
        size = int(numbers * len(self.store.sample_ids) * torch.finfo(TORCH[self.store.dtype]).bits // 8)
        most = self.config.cache.max_bytes
        if most is not None and size > most:
            raise ConfigError(
                f"cache.max_bytes={most}: the {self.modality} features of {len(self.store.sample_ids):,} rows need "
                f"about {size:,} bytes as {self.store.dtype}; allow more, or give cache.enabled=false"
            )
        left = sum(len(self.store.rows_of(block)) for block in missing)
        wait = seconds / len(rows) * left / current_ranks().world_size
        log.info(
            "%s features: %s rows to compute, about %.1f MB in all and %.0f s, in %s",
            self.modality,
            f"{left:,}",
            size / 1e6,
            wait,
            self.store.folder,
        )

    def _write(self, block: int) -> None:
        features: list[list[Tensor]] = []
        broken: dict[int, str] = {}
        rows = self.store.rows_of(block)
        for start in range(0, len(rows), ENCODED_TOGETHER):
            made, reasons = self._encode(rows[start : start + ENCODED_TOGETHER])
            features += made
            broken |= reasons
        self.store.write(block, features, broken)

    @torch.no_grad()
    def _encode(self, rows: range) -> tuple[list[list[Tensor]], dict[int, str]]:
        """Row -> its variants `[tokens, dim]`, none of a broken one; and why those are broken."""
        media, broken = {}, {}
        for row in rows:
            try:
                media[row] = self.reader.decoded(row)
            except Undecodable as error:
                broken[row] = str(error)
        features: dict[int, list[Tensor]] = {row: [] for row in rows}
        for view in range(1 + self.views) if media else ():
            generators = [np.random.default_rng((self.config.seed, row, view)) for row in media] if view else None
            if self.modality == "image":
                inputs: Any = self.collate.pixels(list(media.values()), generators)
            else:
                inputs = self.collate.waveforms(list(media.values()))
            with autocast(self.device, self.precision):
                tokens = self.tower.encoder(inputs.to(self.device))
                if self.pooled:
                    tokens = _as_tokens(self.tower.pool(tokens), self.tower.pool.segments)
            for row, values, mask in zip(media, tokens.tokens, tokens.mask, strict=True):
                features[row].append(values[mask].float().cpu())
        return [features[row] for row in rows], broken

    def _key(self, rows: Rows) -> str:
        """Of all that the features depend on."""
        encoder = self.tower.encoder
        varied = None if not self.views else [plain(self.config.dataset.image_augment), self.config.seed, self.views]
        facts = {
            "version": VERSION,
            "weights": weights_hash(encoder.state_dict()),
            "encoder": encoder.describe(),
            "pooled": self.tower.pool.segments if self.pooled else None,
            "precision": self.precision,
            "dtype": self.config.cache.dtype,
            "varied": varied,
            "rows": data_hash([rows]),
            "files": rows.media_stamp(self.modality),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stored_features(
    config: DictConfig,
    model: MultimodalAlignmentModel,
    tables: Mapping[str, Rows],
    decoding: Decoding,
    collate: Collate,
    device: torch.device,
    with_tokens: Iterable[str],
    mixed: Iterable[str] = (),
) -> dict[str, FeatureStore]:
    """Modality -> the store of its tower's features, complete; of the towers that `cache.enabled` means.

    Args:
        config: of the run.
        model: the towers.
        tables: modality -> rows.
        decoding: of their media.
        collate: their normalisation and variation.
        device: of the model.
        with_tokens: the modalities whose tokens a decoder reads.
        mixed: the modalities of which other tables have media, too; they are not stored.

    Raises:
        ConfigError: `cache.enabled=true` without a tower that it fits, or a store that is too large.
    """
    if config.cache.enabled is False:
        return {}
    readers, others = set(with_tokens), set(mixed)
    stores = {}
    for name in tables:
        tower = model.tower(name) if name in model.towers else None
        if tower is None or not tower.encoder.frozen or name in others:
            continue
        if name == "image" and collate.image_augment is not None and config.cache.enabled is None:
            log.info(
                "image features are computed anew each time, for pictures vary in training (dataset.image_augment): "
                "cache.enabled=true stores %d variants of each",
                config.cache.views,
            )
            continue
        pooled = tower.resampler is None and name not in readers
        stored = StoredTower(name, tower, tables[name], decoding, collate, config, pooled, device)
        stored.build()
        stores[name] = stored.store
    barrier()
    if config.cache.enabled and not stores:
        frozen = {name: model.tower(name).encoder.frozen for name in model.towers if name != "text"}
        raise ConfigError(
            f"cache.enabled=true: no tower's features can be stored (frozen: {frozen}; media among the instructions: "
            f"{sorted(others)}); give backbone=pretrained, or cache.enabled=null"
        )
    return stores


def _as_tokens(pooled: Tensor, segments: int) -> Tokens:
    """Segments as tokens: pooling them again leaves them as they are."""
    tokens = pooled.unflatten(1, (segments, -1))
    return Tokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
