"""What every kind of experiment is built with: nodes to objects, devices, precision, threads, training batches."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from edge_glass.config import ConfigError
from edge_glass.data.loader import EpochBatches, training_loader
from edge_glass.distributed import current_ranks
from edge_glass.tasks.task import TrainingBatch


class TrainingBatches:
    """Makes the endless batches of this rank, from any place in the run.

    Args:
        dataset: indexed by (epoch, place).
        collate: samples to a batch.
        samples: a batch of this rank.
        config: of the run.
        pin_memory: for a GPU.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], TrainingBatch],
        samples: int,
        config: DictConfig,
        pin_memory: bool,
    ):
        ranks = current_ranks()
        self.dataset, self.collate, self.pin_memory = dataset, collate, pin_memory
        self.workers = config.training.workers
        self.order = EpochBatches(len(dataset), samples, config.seed, ranks.rank, ranks.world_size)

    @property
    def epoch_length(self) -> int:
        """Global batches an epoch."""
        return self.order.batches_per_epoch

    def __call__(self, first: int) -> Iterator[TrainingBatch]:
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


def plain(node: DictConfig) -> Any:
    """A config node as plain containers."""
    return OmegaConf.to_container(node, enum_to_str=True)


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
