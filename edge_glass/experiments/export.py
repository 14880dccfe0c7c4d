"""A run's language model in the formats that other programs load."""

import logging
import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from edge_glass.config import ConfigError
from edge_glass.decoders.qwen import QwenDecoder
from edge_glass.experiments.build import open_run
from edge_glass.experiments.multimodal import MultimodalExperiment

log = logging.getLogger(__name__)


def export_decoder(run: str, to: str, checkpoint: str = "last", merge: bool = False, device: str = "auto") -> Path:
    """Write the language model of a run with its tokenizer to a new folder, whole or not at all.

    Args:
        run: the run's folder.
        to: the new folder.
        checkpoint: `last` or `best`.
        merge: a transformers model with the adapter merged into its weights, instead of the adapter alone (peft). A
            model that was trained whole is written as a transformers model either way.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The folder.

    Raises:
        UserError: no such run, one without a language model of transformers, or a folder that is there already.
    """
    folder = Path(to).expanduser()
    if folder.exists():
        raise ConfigError(f"to={to}: that is there already; give a new folder")
    _, experiment, _ = open_run(run, checkpoint, device)
    decoder = experiment.decoder() if isinstance(experiment, MultimodalExperiment) else None
    if not isinstance(decoder, QwenDecoder):
        raise ConfigError(f"run={run}: its decoder is no model of transformers; runs with decoder=qwen have one")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if decoder.adapted and not merge:
        decoder.save_adapter(temporary)
    else:
        (decoder.merged() if decoder.adapted else decoder.language_model).save_pretrained(temporary)
    decoder.tokenizer.save_pretrained(temporary)
    _check_tokenizer(decoder, temporary)
    os.replace(temporary, folder)
    print(f"written to {folder}; load it with {_loader(decoder, folder, merge)}", flush=True)
    return folder


def _check_tokenizer(decoder: QwenDecoder, folder: Path) -> None:
    """Warn of a tokenizer that transformers reads differently beside this kind of model, which it does for some."""
    text = "What does this picture show? 2 + 2"
    read = AutoTokenizer.from_pretrained(folder)
    if read(text)["input_ids"] != decoder.tokenizer(text)["input_ids"]:
        log.warning(
            "transformers.AutoTokenizer reads this tokenizer as that of another %s model; load it with "
            "transformers.PreTrainedTokenizerFast",
            decoder.language_model.config.model_type,
        )


def _loader(decoder: QwenDecoder, folder: Path, merge: bool) -> str:
    if decoder.adapted and not merge:
        return f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
    return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
