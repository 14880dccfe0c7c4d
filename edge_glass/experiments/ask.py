"""Questions about files of the user's own, put to the decoder of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from edge_glass.config import ConfigError
from edge_glass.data.batch import Batch
from edge_glass.data.decode import Undecodable
from edge_glass.data.dialogue import TooLong
from edge_glass.decoders.decoder import Sampling
from edge_glass.errors import UserError
from edge_glass.experiments.build import open_run
from edge_glass.experiments.multimodal import MultimodalExperiment
from edge_glass.experiments.parts import plain
from edge_glass.tasks.language import LanguageTask

KEYS = ("run", "checkpoint", "image", "audio", "prompt", "generation", "seed", "device")


@dataclass
class Question:
    """What is asked about one picture, one recording, or both.

    Attributes:
        files: modality -> path.
        prompt: what is asked; None for the first prompt that the run's data set has for such media.
    """

    files: dict[str, Path]
    prompt: str | None = None


def answer_files(config: DictConfig) -> list[str]:
    """Print an answer for each file (or pair of files) of `generate.py`'s config, and return them.

    Raises:
        UserError: a run without a decoder, media that it has no tower for, a file that cannot be read, or values that
            make no sense.
    """
    questions = _questions(config)
    _, experiment, _ = open_run(config.run, config.checkpoint, config.device)
    if not isinstance(experiment, MultimodalExperiment) or not isinstance(experiment.task, LanguageTask):
        raise ConfigError(f"run={config.run}: this run has no decoder, so it says nothing; train one with decoder=trm")
    torch.manual_seed(config.seed)
    answers = ask(experiment, questions, _sampling(experiment.config, config.generation))
    for question, answer in zip(questions, answers, strict=True):
        name = " + ".join(str(path) for path in question.files.values())
        print(answer if len(questions) == 1 else f"{name}: {answer}", flush=True)
    return answers


def ask(experiment: MultimodalExperiment, questions: Sequence[Question], sampling: Sampling) -> list[str]:
    """A decoder's answers to questions about the same kinds of media.

    Args:
        experiment: with a decoder and the weights to ask.
        questions: all with files of the same modalities.
        sampling: how answers are drawn.

    Raises:
        UserError: media that the decoder does not read, or a file that cannot be read.
    """
    task, chat = experiment.task, experiment.chat
    assert isinstance(task, LanguageTask) and chat is not None and experiment.prompts is not None
    shown = tuple(name for name in task.media if name in questions[0].files)
    strange = sorted(set(questions[0].files) - set(shown))
    if strange:
        raise ConfigError(f"{strange[0]}={questions[0].files[strange[0]]}: this run's decoder reads {task.media} only")
    media = {name: [_read(experiment, name, question.files[name]) for question in questions] for name in shown}
    default = experiment.prompts.of(shown)[0].ask
    try:
        exchanges = [chat.exchange(question.prompt or default) for question in questions]
    except TooLong as error:
        raise ConfigError(f"prompt: {error}; the run's decoder.max_tokens is {chat.max_tokens}") from error
    batch = Batch(
        sample_ids=[str(number) for number in range(len(questions))],
        concept_ids=torch.arange(len(questions)),
        image=experiment.collate.pixels(media["image"]) if "image" in shown else None,
        audio=experiment.collate.waveforms(media["audio"]) if "audio" in shown else None,
        shown={name: torch.ones(len(questions), dtype=torch.bool) for name in shown},
    )
    prompts = chat.dialogue(exchanges, left=True)
    return task.answer(batch.to(experiment.device), prompts.to(experiment.device), sampling)


def _questions(config: DictConfig) -> list[Question]:
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        raise ConfigError(f"{unknown[0]}: generate.py takes {list(KEYS)}")
    files = {name: _paths(config[name]) for name in ("image", "audio") if config[name] is not None}
    if not files:
        raise ConfigError("image=null audio=null: give at least one file, such as image=cat.png")
    counts = {name: len(paths) for name, paths in files.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise ConfigError(f"{counts}: give as many pictures as recordings, one of each for a question")
    return [
        Question(dict(zip(files, group, strict=True)), config.prompt) for group in zip(*files.values(), strict=True)
    ]


def _paths(value: Any) -> list[Path]:
    values = list(value) if isinstance(value, ListConfig) else [value]
    return [Path(str(path)).expanduser() for path in values]


def _sampling(run: DictConfig, changes: DictConfig) -> Sampling:
    given = OmegaConf.to_container(changes)
    assert isinstance(given, dict)
    known = [field.name for field in fields(Sampling)]
    unknown = sorted(set(map(str, given)) - set(known))
    if unknown:
        raise ConfigError(f"generation.{unknown[0]}: there is no such knob; there are {known}")
    changed = {str(name): value for name, value in given.items() if value is not None}
    try:
        return Sampling(**{**plain(run.decoder.generation), **changed})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"generation: {error}") from error


def _read(experiment: MultimodalExperiment, modality: str, path: Path) -> Tensor:
    try:
        return experiment.decoding.decode(modality, path.read_bytes())
    except OSError as error:
        raise UserError(f"{modality}={path}: {error.strerror or error}") from error
    except Undecodable as error:
        raise UserError(f"{modality}={path}: {error}") from error
