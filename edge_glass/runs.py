"""A run's folder: where its files are, and how a stopped run is taken up again."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edge_glass.config import ConfigError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WANDB = "wandb.json"  # under which id wandb knows the run, and what it has not got yet
NONFINITE = "nonfinite.json"  # the samples at which loss or gradient stayed no number
CHECKPOINTS = "checkpoints"
AUTO = "auto"  # training.resume: find the run by its config
FREE_GROUPS = ("logger", "launch")  # a run may go on with other values of these and is still the same run


def resumed(folder: str, overrides: list[str]) -> tuple[DictConfig, Path]:
    """The config of a stopped run with the command line's values on top, and its folder, in which it goes on.

    Args:
        folder: a run's folder.
        overrides: of the command line, as `key=value`.

    Raises:
        ConfigError: not a run's folder, or an override that would make it another model.
    """
    run_dir = Path(folder).expanduser()
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(
            f"training.resume={folder}: no run there ({run_dir / CONFIG} is missing); a run folder looks like "
            "outputs/<date>/<name>-<time>"
        )
    config = OmegaConf.load(run_dir / CONFIG)
    assert isinstance(config, DictConfig)
    config.training.resume = folder
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key.split(".")[0] not in ("training", *FREE_GROUPS):
            raise ConfigError(
                f"{override}: a resumed run keeps its own config ({run_dir / CONFIG}); only training.*, logger.* and "
                "launch.* may change. Leave training.resume out to start a new run"
            )
        if "." not in key:
            raise ConfigError(
                f"{override}: a resumed run takes single values, such as training.max_steps=1000 or "
                "logger.tensorboard=true, not groups"
            )
        try:
            OmegaConf.update(config, key, OmegaConf.select(OmegaConf.from_dotlist([f"{key}={value}"]), key))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from error
    return config, run_dir


def holds_run(folder: Path) -> bool:
    """True for a folder in which a run has begun."""
    return (folder / CONFIG).is_file()


def is_finished(folder: Path) -> bool:
    """True for a run that was trained to its end and evaluated."""
    path = folder / SUMMARY
    return path.is_file() and "metrics" in read_json(path)


def differences(old: DictConfig, new: DictConfig) -> list[str]:
    """What makes two configs different runs, as `key: old -> new`; where figures go and who computes does not."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'not there')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and key != "training.resume" and key.split(".")[0] not in FREE_GROUPS
    ]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        key: value for name, part in node.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }


def discard_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never started."""
    with contextlib.suppress(OSError):  # it holds something, or another rank was faster
        folder.rmdir()
        folder.parent.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The value that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a killed run left half-written is passed over."""
    path = run_dir / METRICS
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def keep_metrics_until(run_dir: Path, step: int) -> None:
    """Forget the rows after `step`, and its evaluation: a resumed run writes them again."""
    rows = [row for row in read_metrics(run_dir) if row["step"] + (row["kind"] == "eval") <= step]
    temporary = run_dir / f".{METRICS}.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, run_dir / METRICS)
