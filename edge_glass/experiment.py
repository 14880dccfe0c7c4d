"""The parts of a run, built from its config: data first, since it fails fastest, then the task."""

import math
import os
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from edge_glass.config import ConfigError, modalities
from edge_glass.data.batch import Batch
from edge_glass.data.datasets import Decoding
from edge_glass.data.loader import Collate, EpochBatches, training_loader
from edge_glass.data.rows import Rows, read_tables
from edge_glass.distributed import current_ranks
from edge_glass.evaluation.names import MetricName
from edge_glass.evaluation.views import Views
from edge_glass.models.alignment import MultimodalAlignmentModel, Tower
from edge_glass.models.projection import WhitenedProjection
from edge_glass.models.recall import CaptionRecall
from edge_glass.signatures import check_targets
from edge_glass.tasks import AlignmentTask

MOST_CAPTIONS = 8192  # evenly spread ones of more; whitening needs a few times as many as dimensions
# For towers that the config does not have: nothing is decoded with these.
NO_IMAGES: dict[str, Any] = {"image_size": 1, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


@dataclass
class Experiment:
    """What a config describes.

    Attributes:
        config: checked and resolved.
        tables: `image` and/or `audio` -> all rows of the data set.
        model: the towers.
        task: the same model and its loss, on its device.
        decoding: how media are decoded, as the towers need them.
        collate: how samples become batches; holds the towers' normalisation and the training augmentation.
        device: where the task is.
    """

    config: DictConfig
    tables: dict[str, Rows]
    model: MultimodalAlignmentModel
    task: AlignmentTask
    decoding: Decoding
    collate: Collate
    device: torch.device

    def views(self, names: list[str]) -> Views:
        """The evaluation of the named views, for the modalities that have towers."""
        views = plain(self.config.dataset.views)
        chosen = {name: _present(views[name], self.tables) for name in names}
        widths, towers = list(self.config.encoder.widths), list(self.model.towers)
        return Views(self.tables, chosen, self.decoding, self.collate, widths, towers)

    def training_rows(self) -> dict[str, Rows]:
        """The rows of the training split."""
        conditions = plain(self.config.dataset.where)
        return {name: rows.where(conditions) for name, rows in self.tables.items()}

    def training_batches(self, samples: int) -> "TrainingBatches":
        """The training batches of this rank, of `samples` samples each."""
        dataset = build(
            self.config.dataset.train, rows=self.training_rows(), decoding=self.decoding, seed=self.config.seed
        )
        collate = copy(self.collate)
        collate.negative_captions = dataset.negative_captions(self.config.optimization.negative_captions, samples)
        return TrainingBatches(dataset, collate, samples, self.config, pin_memory=self.device.type == "cuda")


class TrainingBatches:
    """Makes the endless batches of this rank, from any place in the run.

    Args:
        dataset: indexed by (epoch, place).
        collate: samples to a batch.
        samples: a batch of this rank.
        config: of the run.
        pin_memory: for a GPU.
    """

    def __init__(self, dataset: Any, collate: Collate, samples: int, config: DictConfig, pin_memory: bool):
        ranks = current_ranks()
        self.dataset, self.collate, self.pin_memory = dataset, collate, pin_memory
        self.workers = config.training.workers
        self.order = EpochBatches(len(dataset), samples, config.seed, ranks.rank, ranks.world_size)

    @property
    def epoch_length(self) -> int:
        """Global batches an epoch."""
        return self.order.batches_per_epoch

    def __call__(self, first: int) -> Iterator[Batch]:
        """Batches from global batch `first` on."""
        self.order.first = first
        return iter(training_loader(self.dataset, self.collate, self.order, self.workers, self.pin_memory))


def build(node: Any, **given: Any) -> Any:
    """What a `_target_` node describes, called with `given` if it is `_partial_`.

    Raises:
        ConfigError: values that what is called with `given` refuses, in its own words.
    """
    built = hydra.utils.instantiate(node, _convert_="all")
    if not given:
        return built
    try:
        return built(**given)
    except ValueError as error:
        raise ConfigError(f"{node['_target_']}: {error}") from error


def build_experiment(config: DictConfig) -> Experiment:
    """Everything a run needs, or an error before anything is written.

    Raises:
        UserError: data that is not there, arguments that a class does not take, weights that cannot be loaded.
    """
    device = choose_device(config.training.device)
    check_monitor(config)
    dataset = config.dataset
    paths = {name: dataset[name] if name in modalities(config) else None for name in ("image", "audio")}
    tables = read_tables(paths["image"], paths["audio"], dataset.pair_by.value, plain(dataset.shares))
    check_targets(plain(config), foreign=True)
    torch.manual_seed(config.seed)
    try:
        model = MultimodalAlignmentModel({name: build(config.encoder[name]) for name in modalities(config)})
        prepare_captions(model, [rows.where(plain(dataset.where)) for rows in tables.values()], dataset.recall)
        task = AlignmentTask(model, build(config.objective)).to(device)
    except hydra.errors.InstantiationException as error:
        # Hydra wraps what a constructor raises; the person wants the constructor's own words.
        raise ConfigError(f"{error.__cause__ or error}") from error
    encoders: dict[str, Any] = {name: tower.get_submodule("encoder") for name, tower in model.towers.items()}
    images = vars(encoders["image"]) if "image" in encoders else NO_IMAGES
    seconds = encoders["audio"].window_seconds if "audio" in encoders else 0.0
    decoding = Decoding(images["image_size"], seconds, dataset.keep_decoded_mb)
    collate = Collate(images["mean"], images["std"], build(dataset.image_augment))
    return Experiment(config, tables, model, task, decoding, collate, device)


def prepare_captions(model: MultimodalAlignmentModel, tables: list[Rows], recall: float | None) -> None:
    """Fit a whitened text projection to the training captions, and let the model recall them.

    Args:
        model: its text tower takes part, if it has one.
        tables: the training rows.
        recall: the scale of recall; None for none.

    Raises:
        ConfigError: a whitened projection of another modality, or recall of captions whose embeddings will change in
            training.
    """
    for name, other in model.towers.items():
        if name != "text" and isinstance(other.get_submodule("projection"), WhitenedProjection):
            raise ConfigError(
                f"encoder.{name}.projection is whitened, which is fitted to captions: only the text tower can have it; "
                f"give projection@encoder.{name}.projection=matryoshka"
            )
    if "text" not in model.towers:
        return
    tower = model.towers.get_submodule("text")
    assert isinstance(tower, Tower)
    if recall is not None and any(parameter.requires_grad for parameter in tower.parameters()):
        raise ConfigError(
            f"dataset.recall={recall} keeps the captions' embeddings, but the text tower is trained: give "
            "dataset.recall=null, or a frozen text tower with projection@encoder.text.projection=whitened"
        )
    whitened = tower.projection if isinstance(tower.projection, WhitenedProjection) else None
    if recall is None and whitened is None:
        return
    captions = sorted({text for rows in tables for text in rows.column("text")})
    captions = captions[:: math.ceil(len(captions) / MOST_CAPTIONS)]
    with torch.no_grad():
        features = torch.cat([tower.features(captions[start : start + 64]) for start in range(0, len(captions), 64)])
        if whitened is not None:
            whitened.fit(features)
        if recall is not None:
            model.recall = CaptionRecall(tower.projection(features), recall)


def plain(node: DictConfig) -> Any:
    """A config node as plain containers."""
    return OmegaConf.to_container(node, enum_to_str=True)


def check_monitor(config: DictConfig) -> None:
    """Make sure that `training.monitor` will be among the validation figures, which come only after some training.

    Raises:
        ConfigError: it will not.
    """
    view, monitor = config.dataset.validation_view, config.training.monitor
    if view is None or monitor in (None, f"{view}/mean/R@1"):
        return
    name, present, widths = MetricName.parse(monitor), modalities(config), [None, *config.encoder.widths]
    if not (name and name.view == view and {name.query, name.answer} <= {*present} and name.width in widths):
        raise ConfigError(
            f"training.monitor={monitor!r} is no figure of dataset.validation_view={view!r}: give {view}/mean/R@1, or "
            f"one like {view}/{present[0]}_to_{present[1]}/R@1"
        )


def choose_device(name: str) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("training.device=cuda: torch sees no GPU here; use training.device=cpu or auto")
        device = torch.device("cuda", current_ranks().local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if name != "cpu":
        raise ConfigError(f"training.device={name!r}: give auto, cpu or cuda")
    return torch.device("cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` takes bf16 where it is faster.

    On a CPU without bf16 instructions it is computed in fp32 and converted, which is slower than fp32 itself.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities()
    return "bf16" if any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def set_threads(config: DictConfig) -> None:
    """Share the machine's cores among the ranks on it: ranks that fight for cores are many times slower."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", current_ranks().world_size))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.launch.threads or max(1, cores // ranks_here))


def _present(view: dict[str, Any], tables: dict[str, Rows]) -> dict[str, Any]:
    """The view without the modalities that have no table in this run."""
    return {
        role: {name: conditions for name, conditions in parts.items() if name in (*tables, "text")}
        for role, parts in view.items()
    }
