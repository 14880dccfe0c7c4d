"""Images, speech and text: towers that are aligned, a decoder that speaks of what they see and hear, or both."""

import math
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from edge_glass.config import ConfigError, modalities
from edge_glass.data.datasets import TriModalDataset
from edge_glass.data.dialogue import Chat, Prompts
from edge_glass.data.instructions import DialogueDataset, InstructionDataset
from edge_glass.data.loader import Collate
from edge_glass.data.rows import Rows, data_hash, read_rows, read_tables
from edge_glass.data.samples import Decoding
from edge_glass.decoders.decoder import LanguageDecoder, Sampling
from edge_glass.evaluation.answers import Interview
from edge_glass.evaluation.names import AnswerName, MetricName
from edge_glass.evaluation.views import Views
from edge_glass.experiments.experiment import Experiment, Validation
from edge_glass.experiments.features import stored_features
from edge_glass.experiments.parts import TrainingBatches, build, choose_device, plain
from edge_glass.models.alignment import MultimodalAlignmentModel, Tower
from edge_glass.models.counts import ParameterRow, parameter_table
from edge_glass.models.fusion import EMBEDDING
from edge_glass.models.projection import WhitenedProjection
from edge_glass.models.recall import CaptionRecall
from edge_glass.results import RunResults, evaluate_run, validation_figures
from edge_glass.signatures import check_targets
from edge_glass.tasks.alignment import AlignmentTask
from edge_glass.tasks.language import LanguageTask

MOST_CAPTIONS = 8192  # evenly spread ones of more; whitening needs a few times as many as dimensions
# For towers that the config does not have: nothing is decoded with these.
NO_IMAGES: dict[str, Any] = {"image_size": 1, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


class MultimodalExperiment(Experiment):
    """Towers over the tables of a data set, and a decoder, if the config has one.

    Args:
        config: checked and resolved.

    Raises:
        UserError: data that is not there, arguments that a class does not take, weights that cannot be loaded.

    Attributes:
        tables: `image` and/or `audio` -> all rows of the data set.
        instructions: rows of the instructions that are mixed in, or None.
        model: the towers.
        decoding: how media are decoded, as the towers need them.
        prompts: what the decoder is asked; None without a decoder.
        collate: how samples become batches; holds the towers' normalisation and the training augmentation.
    """

    task: AlignmentTask

    def __init__(self, config: DictConfig):
        self.config = config
        self.device = choose_device(config.training.device)
        check_monitor(config)
        dataset = config.dataset
        paths = {name: dataset[name] if name in modalities(config) else None for name in ("image", "audio")}
        self.tables = read_tables(paths["image"], paths["audio"], dataset.pair_by.value, plain(dataset.shares))
        self.instructions = None if dataset.instructions is None else read_rows(dataset.instructions)
        self.prompts = None if config.decoder.model is None else Prompts(plain(dataset.prompts))
        check_targets(plain(config), foreign=True)
        torch.manual_seed(config.seed)
        try:
            self.model = MultimodalAlignmentModel({name: build(config.encoder[name]) for name in modalities(config)})
            prepare_captions(self.model, list(self.training_rows().values()), dataset.recall)
            self.task = self._task().to(self.device)
        except hydra.errors.InstantiationException as error:
            # Hydra wraps what a constructor raises; the person wants the constructor's own words.
            raise ConfigError(f"{error.__cause__ or error}") from error
        encoders: dict[str, Any] = {name: tower.get_submodule("encoder") for name, tower in self.model.towers.items()}
        images = vars(encoders["image"]) if "image" in encoders else NO_IMAGES
        seconds = encoders["audio"].window_seconds if "audio" in encoders else 0.0
        self.decoding = Decoding(images["image_size"], seconds, dataset.keep_decoded_mb)
        decoder = self.decoder()
        self.chat = None if decoder is None else Chat(decoder.tokenizer, config.decoder.max_tokens)
        self.collate = Collate(images["mean"], images["std"], build(dataset.image_augment), chat=self.chat)

    def decoder(self) -> LanguageDecoder | None:
        """The task's decoder, if it has one."""
        return self.task.decoder if isinstance(self.task, LanguageTask) else None

    def views(self, names: list[str]) -> Views:
        """The evaluation of the named views, for the modalities that have towers."""
        views = plain(self.config.dataset.views)
        chosen = {name: _present(views[name], self.tables) for name in names}
        widths, towers = list(self.config.encoder.widths), list(self.model.towers)
        return Views(self.tables, chosen, self.decoding, self.collate, widths, towers)

    def interview(self, views: Views) -> Interview | None:
        """The evaluation of the decoder's answers on views, if there is a decoder."""
        if self.prompts is None or self.chat is None:
            return None
        assert isinstance(self.task, LanguageTask)
        sampling = Sampling(**plain(self.config.decoder.generation))
        most = self.config.dataset.answered_rows
        return Interview(views, self.prompts, self.chat, self.task.media, sampling, most)

    def training_rows(self) -> dict[str, Rows]:
        """The rows of the training split."""
        conditions = plain(self.config.dataset.where)
        return {name: rows.where(conditions) for name, rows in self.tables.items()}

    def prepare(self) -> None:
        takes, decodes = self.config.fusion.takes, self.config.decoder.model is not None
        instructions = [] if self.instructions is None else self.instructions.columns
        self.decoding.features = stored_features(
            self.config,
            self.model,
            self.tables,
            self.decoding,
            self.collate,
            self.device,
            with_tokens=self.config.fusion.reads if decodes and "tokens" in takes else (),
            mixed=[name for name in self.tables if name in instructions],
        )
        self.collate.features = self.decoding.features

    def training_batches(self, samples: int) -> TrainingBatches:
        seed = self.config.seed
        dataset = build(self.config.dataset.train, rows=self.training_rows(), decoding=self.decoding, seed=seed)
        collate = copy(self.collate)
        if self.config.objective.alignment is not None:
            captions = self.config.optimization.negative_captions
            collate.negative_captions = dataset.negative_captions(captions, samples)
        if self.prompts is not None:
            dataset = self._dialogues(dataset)
        return TrainingBatches(dataset, collate, samples, self.config, pin_memory=self.device.type == "cuda")

    def validation(self) -> Validation | None:
        view = self.config.dataset.validation_view
        return None if view is None else MultimodalValidation(self, view)

    def results(self, run_dir: Path, validation: Mapping[str, float]) -> RunResults:
        return evaluate_run(self, run_dir, validation)

    def data_hash(self) -> str:
        return data_hash([*self.tables.values(), *([] if self.instructions is None else [self.instructions])])

    def row_count(self) -> int:
        instructions = 0 if self.instructions is None else len(self.instructions)
        return sum(map(len, self.tables.values())) + instructions

    def parameters(self) -> list[ParameterRow]:
        parts = self.model.parts()
        if isinstance(self.task, LanguageTask):
            parts |= {"fusion": self.task.fusion, "decoder": self.task.decoder}
        return parameter_table(parts, self.task)

    @property
    def is_aligned(self) -> bool:
        """Whether the towers are, or will be, aligned, so that retrieval means something."""
        return self.config.objective.alignment is not None or self.config.objective.init_from is not None

    def _task(self) -> AlignmentTask:
        config = self.config
        alignment = config.objective.alignment
        if self.prompts is None:
            return AlignmentTask(self.model, build(alignment))
        captions = [text for rows in self.training_rows().values() for text in rows.column("text")]
        asked = [] if self.instructions is None else self.instructions.column("instruction")
        tokenizer = build(config.decoder.tokenizer, texts=[*captions, *self.prompts.texts(), *filter(None, asked)])
        decoder = build(config.decoder.model, tokenizer=tokenizer)
        media = [name for name in config.fusion.reads if name in self.model.towers]
        loss = None if alignment is None else build(alignment)
        fusion = build(config.fusion.model, dims=fused_widths(config, self.model), width=decoder.width)
        return LanguageTask(
            self.model, fusion, decoder, loss, media, config.objective.lm, config.objective.train_towers
        )

    def _dialogues(self, captions: TriModalDataset) -> DialogueDataset:
        assert isinstance(self.task, LanguageTask) and self.prompts is not None and self.chat is not None
        reads, seed, dataset = self.task.media, self.config.seed, self.config.dataset
        instructions = None
        if self.instructions is not None:
            instructions = InstructionDataset(self.instructions, self.decoding, self.chat, reads, seed)
        dropout, share = self.config.fusion.modality_dropout, dataset.instruction_share
        captions_alone = dataset.caption_share
        return DialogueDataset(
            captions, self.prompts, self.chat, reads, dropout, captions_alone, instructions, share, seed
        )


class MultimodalValidation:
    """Retrieval among a view's rows, and a decoder's answers about them.

    Args:
        experiment: with the task.
        view: the name of the view.
    """

    def __init__(self, experiment: MultimodalExperiment, view: str):
        self.device = experiment.device
        self.views = experiment.views([view])
        self.aligned = experiment.is_aligned
        self.interview = experiment.interview(self.views)

    @property
    def skipped(self) -> dict[str, str]:
        return {sample: row.reason for sample, row in self.views.skipped.items()}

    def __call__(self, task: Any) -> dict[str, float]:
        figures = validation_figures(self.views, task, self.device) if self.aligned else {}
        if self.interview is not None:
            figures |= self.interview.figures(self.interview.answers(task, self.device))
        return figures


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


def fused_widths(config: DictConfig, model: MultimodalAlignmentModel) -> dict[str, int]:
    """What a decoder reads, and its width: the towers' tokens, the shared embedding, or both."""
    takes = config.fusion.takes
    media = [name for name in config.fusion.reads if name in model.towers and "tokens" in takes]
    widths = {name: model.tower(name).encoder.dim for name in media}
    return widths | ({EMBEDDING: model.out_dim} if "embedding" in takes else {})


def check_monitor(config: DictConfig) -> None:
    """Make sure that `training.monitor` will be among the validation figures, which come only after some training.

    Raises:
        ConfigError: it will not.
    """
    view, monitor = config.dataset.validation_view, config.training.monitor
    aligned = config.objective.alignment is not None or config.objective.init_from is not None
    if view is None or monitor is None or (aligned and monitor == f"{view}/mean/R@1"):
        return
    if config.decoder.model is not None:
        answer, media = AnswerName.parse(monitor), [m for m in config.fusion.reads if m in modalities(config)]
        if monitor == f"{view}/mean/exact_match" or (
            answer and answer.view == view and set(answer.shown.split("_")) <= set(media) and answer.of is None
        ):
            return
        if not aligned:
            raise ConfigError(
                f"training.monitor={monitor!r} is no figure of dataset.validation_view={view!r}, for nothing is "
                f"aligned: give {view}/mean/exact_match, or one like {view}/{media[0]}_caption/exact_match"
            )
    name, present, widths = MetricName.parse(monitor), modalities(config), [None, *config.encoder.widths]
    if not (name and name.view == view and {name.query, name.answer} <= {*present} and name.width in widths):
        raise ConfigError(
            f"training.monitor={monitor!r} is no figure of dataset.validation_view={view!r}: give {view}/mean/R@1, or "
            f"one like {view}/{present[0]}_to_{present[1]}/R@1"
        )


def _present(view: dict[str, Any], tables: dict[str, Rows]) -> dict[str, Any]:
    """The view without the modalities that have no table in this run."""
    return {
        role: {name: conditions for name, conditions in parts.items() if name in (*tables, "text")}
        for role, parts in view.items()
    }
