"""The schema: every plain knob with its type, and the rules between knobs.

`_target_` nodes (towers, losses, optimizers) are typed `Any` here: their constructors' signatures are their schema, see
`signatures.py`.
"""

import os
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from edge_glass.errors import UserError

MODALITIES = ("image", "audio", "text")
SOLVER = "edge_glass.decoders.trm.TinyRecursiveModel"


class ConfigError(UserError):
    """A config that cannot run; raised before any weight is loaded."""


class Precision(Enum):
    """What matrix products are computed in; auto: bf16 where the hardware multiplies it natively, else fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class PairBy(Enum):
    """What makes rows of an image table and an audio table belong together."""

    concept_id = "concept_id"
    sample_id = "sample_id"
    text = "text"


class WandbMode(Enum):
    """Where wandb's figures go."""

    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class EncoderConfig:
    """The towers. A modality that is null takes no part."""

    dim: int = MISSING
    widths: list[int] = MISSING
    image: Any = None
    audio: Any = None
    text: Any = None


@dataclass
class ViewConfig:
    """Which rows ask and which are ranked, as column -> values."""

    queries: dict[str, dict[str, Any]] = field(default_factory=dict)
    gallery: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class PuzzleConfig:
    """Puzzles made by script: of which game, and how many for what."""

    game: Any = MISSING
    train: int = MISSING
    val: int = MISSING
    test: int = MISSING
    vary: bool = True


@dataclass
class DatasetConfig:
    """Where the rows are, how they become training samples, and on which rows a run is judged."""

    name: str = MISSING
    image: str | None = None
    audio: str | None = None
    pair_by: PairBy = PairBy.concept_id
    shares: dict[str, float] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    train: Any = None
    image_augment: Any = None
    keep_decoded_mb: int = 512
    max_bad_share: float = 0.01
    recall: float | None = None
    prompts: Any = None
    instructions: str | None = None
    instruction_share: float = 0.0
    answered_rows: int | None = None
    caption_share: float = 0.0
    puzzles: PuzzleConfig | None = None
    views: dict[str, ViewConfig] = field(default_factory=dict)
    validation_view: str | None = None


@dataclass
class ObjectiveConfig:
    """What is trained: the alignment of the towers, a decoder's answers, or both."""

    alignment: Any = None
    lm: float = 0.0
    train_towers: bool = True
    init_from: str | None = None
    judged_by: str | None = None


@dataclass
class GenerationConfig:
    """How a decoder's text is drawn."""

    max_new_tokens: int = MISSING
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: list[str] = field(default_factory=list)


@dataclass
class DecoderConfig:
    """What speaks after the prefix; `model` null: nothing does."""

    model: Any = None
    tokenizer: Any = None
    max_tokens: int = 0
    generation: GenerationConfig | None = None


@dataclass
class FusionConfig:
    """How the modalities' tokens become the decoder's prefix."""

    model: Any = None
    reads: list[str] = field(default_factory=list)
    takes: list[str] = field(default_factory=list)
    modality_dropout: float = 0.0


@dataclass
class OptimizationConfig:
    """How a step is made."""

    batch_size: int = MISSING
    accumulation: int = 1
    negative_captions: int = 0
    optimizer: Any = None
    scheduler: Any = None
    clip_norm: float | None = None
    average: float | None = None
    max_nonfinite: int = 20


@dataclass
class TrainingConfig:
    """How long a run lasts and what it leaves behind."""

    max_steps: int = MISSING
    max_seconds: float | None = None
    eval_every: int = MISSING
    save_every: int = MISSING
    log_every: int = 10
    keep_last: int = 2
    monitor: str | None = None
    test_checkpoint: str = "last"
    precision: Precision = Precision.auto
    device: str = "auto"
    workers: int = 0
    deterministic: bool = False
    resume: str | None = None


@dataclass
class WandbConfig:
    """wandb's own knobs."""

    mode: WandbMode = WandbMode.off
    project: str = "edge-glass"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggerConfig:
    """Where figures go beside metrics.jsonl, which is always written."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False


@dataclass
class CacheConfig:
    """The features of frozen towers, computed once."""

    enabled: bool | None = None
    dir: str = "outputs/cache"
    dtype: str = "fp16"
    views: int = 4
    max_bytes: int | None = None


@dataclass
class LaunchConfig:
    """The ranks of a run that no outer launcher starts."""

    nproc_per_node: int = 1
    threads: int | None = None
    timeout_minutes: float = 30.0


@dataclass
class ExperimentConfig:
    """One run."""

    name: str = MISSING
    seed: int = 0
    backbone: Any = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def to_experiment(config: DictConfig) -> DictConfig:
    """The config checked against the schema, with every interpolation resolved.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a missing value, or values that do not go together.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), config)
        OmegaConf.resolve(typed)
        OmegaConf.to_container(typed, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, config)) from error
    assert isinstance(typed, DictConfig)
    check(typed)
    return typed


def load_config(path: str | Path) -> DictConfig:
    """A run's config from YAML, checked.

    Raises:
        ConfigError: no such file, or a config that does not fit the schema.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no config at {path}; a run folder holds one as config.yaml")
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return to_experiment(loaded)


def save_config(config: DictConfig, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back equal; whole or not at all."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    temporary.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    os.replace(temporary, path)


def modalities(config: DictConfig) -> list[str]:
    """The modalities that have a tower, in the order image, audio, text."""
    return [name for name in MODALITIES if config.encoder[name] is not None]


def check(config: DictConfig) -> None:
    """The rules between knobs that no type expresses.

    Raises:
        ConfigError: naming the keys, their values and what would be valid.
    """
    encoder, dataset, optimization, training = config.encoder, config.dataset, config.optimization, config.training
    present = modalities(config)
    _check_objective(config, present)
    widths = list(encoder.widths)
    if not widths or max(widths) != encoder.dim or min(widths) < 1 or len(set(widths)) != len(widths):
        raise ConfigError(
            f"encoder.widths={widths} does not fit encoder.dim={encoder.dim}: the widths are distinct and "
            f"positive, and "
            f"the largest is the dim, say [{encoder.dim}, {max(encoder.dim // 2, 1)}]"
        )
    compared = config.objective.alignment.get("widths") if config.objective.alignment is not None else None
    if compared is not None and max(compared, default=0) > encoder.dim:
        raise ConfigError(
            f"objective.alignment.widths={list(compared)} does not fit encoder.dim={encoder.dim}: the loss compares "
            "leading dimensions of the embedding"
        )
    for name in present:
        if name != "text" and dataset[name] is None:
            raise ConfigError(
                f"encoder has a tower for {name}, but dataset={dataset.name} has no {name} rows: give "
                f"dataset.{name}=<path>, "
                f"or choose another dataset or encoder={'audio' if name == 'image' else 'vision'}_text"
            )
    for key, value, least in (
        ("optimization.batch_size", optimization.batch_size, 2),
        ("optimization.accumulation", optimization.accumulation, 1),
        ("optimization.negative_captions", optimization.negative_captions, 0),
        ("optimization.max_nonfinite", optimization.max_nonfinite, 0),
        ("training.max_steps", training.max_steps, 1),
        ("training.eval_every", training.eval_every, 1),
        ("training.save_every", training.save_every, 1),
        ("training.log_every", training.log_every, 1),
        ("training.keep_last", training.keep_last, 1),
        ("training.workers", training.workers, 0),
        ("launch.nproc_per_node", config.launch.nproc_per_node, 1),
    ):
        if value < least:
            raise ConfigError(f"{key}={value}: give a whole number of at least {least}")
    if config.launch.timeout_minutes <= 0:
        raise ConfigError(f"launch.timeout_minutes={config.launch.timeout_minutes}: give a positive number of minutes")
    if training.max_seconds is not None and training.max_seconds <= 0:
        raise ConfigError(f"training.max_seconds={training.max_seconds}: give a positive number of seconds, or null")
    if optimization.average is not None and not 0 < optimization.average < 1:
        raise ConfigError(
            f"optimization.average={optimization.average}: give a decay between 0 and 1, such as 0.999, or null"
        )
    if training.test_checkpoint not in ("last", "best"):
        raise ConfigError(f"training.test_checkpoint={training.test_checkpoint!r}: give 'last' or 'best'")
    if training.test_checkpoint == "best" and training.monitor is None:
        raise ConfigError("training.test_checkpoint='best' needs training.monitor, the figure that best is judged by")
    if config.cache.dtype not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"cache.dtype={config.cache.dtype!r}: give fp16, bf16 or fp32")
    if config.cache.views < 1:
        raise ConfigError(f"cache.views={config.cache.views}: give at least 1 variant of a picture")
    if not dataset.views and dataset.puzzles is None:
        raise ConfigError("dataset.views is empty: name at least one view to evaluate the run on")
    if dataset.validation_view is not None and dataset.validation_view not in dataset.views:
        raise ConfigError(
            f"dataset.validation_view={dataset.validation_view!r}: not among dataset.views, which are "
            f"{list(dataset.views)}"
        )
    if not 0 <= dataset.max_bad_share <= 1:
        raise ConfigError(f"dataset.max_bad_share={dataset.max_bad_share}: give a share in 0..1")
    if dataset.recall is not None and dataset.recall <= 0:
        raise ConfigError(f"dataset.recall={dataset.recall}: give a positive scale, such as 20, or null for no recall")
    if sum(dataset.shares.values()) >= 1 or min(dataset.shares.values(), default=0) < 0:
        raise ConfigError(
            f"dataset.shares={dict(dataset.shares)}: give positive shares with a sum below 1; the rest is for training"
        )


def _check_objective(config: DictConfig, present: list[str]) -> None:
    """Whether there is what the objective trains."""
    objective, decoder, dataset = config.objective, config.decoder, config.dataset
    if dataset.puzzles is not None:
        _check_puzzles(config, present)
        return
    if objective.alignment is not None and len(present) < 2:
        raise ConfigError(f"encoder has towers for {present}; alignment needs at least two of {list(MODALITIES)}")
    if objective.lm < 0:
        raise ConfigError(f"objective.lm={objective.lm}: give a weight of at least 0")
    if decoder.model is not None and decoder.model.get("_target_") == SOLVER:
        raise ConfigError(
            f"decoder.model={SOLVER} solves puzzles, of which dataset={dataset.name} has none: dataset=sudoku"
        )
    if decoder.model is None:
        if objective.lm > 0:
            raise ConfigError(
                f"objective.lm={objective.lm} weighs a decoder's answers, but there is no decoder: give decoder=trm or "
                "decoder=qwen, or objective=alignment"
            )
        if objective.alignment is None:
            raise ConfigError("objective.alignment is null and there is no decoder: nothing would be trained")
        return
    if objective.lm == 0:
        raise ConfigError(
            "objective.lm=0: the decoder would not be trained; give objective=joint or objective=instruction, or "
            "decoder=none"
        )
    if objective.alignment is not None and not objective.train_towers:
        raise ConfigError(
            "objective.train_towers=false leaves the towers as they are, and objective.alignment would train them: "
            "give objective=instruction"
        )
    media = [name for name in MODALITIES if name != "text"]  # the text is what is to be said
    reads = set(config.fusion.reads)
    if reads - set(media) or not reads & set(present):
        raise ConfigError(
            f"fusion.reads={list(config.fusion.reads)}: give one or more of {[m for m in media if m in present]}, the "
            "media that have a tower"
        )
    takes = set(config.fusion.takes)
    if not takes or takes - {"tokens", "embedding"}:
        raise ConfigError(f"fusion.takes={list(config.fusion.takes)}: give tokens, embedding, or both")
    if "embedding" in takes and objective.alignment is None and objective.init_from is None:
        raise ConfigError(
            "fusion.takes has embedding, but nothing aligns it: give objective.init_from=<an aligned run>, "
            "objective=joint, or fusion.takes=[tokens]"
        )
    for key, value in (
        ("fusion.modality_dropout", config.fusion.modality_dropout),
        ("dataset.caption_share", dataset.caption_share),
    ):
        if not 0 <= value <= 1:
            raise ConfigError(f"{key}={value}: give a probability in 0..1")
    if dataset.caption_share > 0 and ("embedding" not in takes or "text" not in present):
        raise ConfigError(
            f"dataset.caption_share={dataset.caption_share} shows the decoder embeddings of captions: give a text "
            "tower and fusion.takes=[tokens,embedding], or dataset.caption_share=0"
        )
    if decoder.max_tokens < 2 or decoder.generation.max_new_tokens < 1:
        raise ConfigError(
            f"decoder.max_tokens={decoder.max_tokens} and decoder.generation.max_new_tokens="
            f"{decoder.generation.max_new_tokens}: give room for a prompt and at least one token of an answer"
        )
    if not 0 <= dataset.instruction_share < 1 or (dataset.instruction_share > 0) != (dataset.instructions is not None):
        raise ConfigError(
            f"dataset.instruction_share={dataset.instruction_share}, dataset.instructions={dataset.instructions}: a "
            "share above 0 and below 1 goes with a path of instructions, and 0 with null"
        )


def _check_puzzles(config: DictConfig, present: list[str]) -> None:
    """Whether there is a solver and nothing else."""
    target = None if config.decoder.model is None else config.decoder.model.get("_target_")
    if target != SOLVER or present or config.objective.alignment is not None:
        raise ConfigError(
            f"dataset={config.dataset.name} is made of puzzles, but decoder.model is {target}, encoder has towers for "
            f"{present}, and objective.alignment is {'there' if config.objective.alignment is not None else 'null'}: "
            "give encoder=none decoder=trm_solver objective=puzzle, or experiment=trm_sudoku"
        )
    puzzles = config.dataset.puzzles
    for key in ("train", "val", "test"):
        if puzzles[key] < 1:
            raise ConfigError(f"dataset.puzzles.{key}={puzzles[key]}: give at least 1")
    if config.optimization.accumulation > 1:
        raise ConfigError(
            f"optimization.accumulation={config.optimization.accumulation}: thoughts are carried from step to step, "
            "each in its place of the batch; give optimization.batch_size instead"
        )


def explain_override(error: Exception) -> str:
    """Hydra's message for an override that does not fit, with what would."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{str(error).splitlines()[0]} {_known(cause)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read as key=value: {str(error).splitlines()[0]}"
    return str(error).split("Config search path")[0].strip()


def _known(error: OmegaConfBaseException) -> str:
    node = error.parent_node
    known: list[str] = []
    if isinstance(node, DictConfig):
        kind = OmegaConf.get_type(node)
        # Of a structured node the schema's fields, else the keys that are there.
        known = [f.name for f in fields(kind)] if is_dataclass(kind) else [str(key) for key in node]
    known = sorted(set(known) - {"hydra"})
    key = str(error.key)
    place = error.full_key.rsplit(".", 1)[0] + "." if error.full_key and "." in error.full_key else ""
    close = get_close_matches(key, known, n=1)
    hint = f"Did you mean {place}{close[0]}? " if close else ""
    return f"{hint}There is no key {key!r} in {place.rstrip('.') or 'the config'}; it has {known}."


def explain(error: OmegaConfBaseException, config: DictConfig | None = None) -> str:
    """One line on a key or value that does not fit, with what would.

    Args:
        error: what OmegaConf raised.
        config: where the value came from.
    """
    key = error.full_key or error.key
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"{key}: {_known(error)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: a value is missing; give it on the command line as {key}=..."
    first = str(error).splitlines()[0]
    if key is None:
        return first
    if isinstance(error, ValidationError) and config is not None:
        return f"{key}={OmegaConf.select(config, str(key))}: {first}"
    if isinstance(error, ValidationError | InterpolationResolutionError):
        return f"{key}: {first}"
    return f"{key}: {type(error).__name__}: {first}"
