"""Where a run's figures go: metrics.jsonl always, TensorBoard and wandb when asked."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from edge_glass.runs import append_metrics

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes rows of figures."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one row a logged step or evaluation."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def write(self, row: Mapping[str, Any]) -> None:
        append_metrics(self.run_dir, row)

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in the run's folder `tensorboard/`."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter  # 3 s to import

        self.writer = SummaryWriter(run_dir / "tensorboard")

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _figures(row).items():
            self.writer.add_scalar(name if "/" in name else f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """wandb, online or offline; a server that fails warns and never stops the run."""

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        tags: list[str],
        config: Any,
    ):
        import wandb

        self.run = wandb.init(
            dir=run_dir,
            mode=mode,
            project=project,
            entity=entity,
            tags=tags,
            name=run_dir.name,
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        prefix = "" if row["kind"] == "eval" else f"{row['kind']}/"
        self.run.log({prefix + name: value for name, value in _figures(row).items()}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def open_sinks(run_dir: Path, logger: Mapping[str, Any], config: Any) -> list[Sink]:
    """The sinks that the config asks for; metrics.jsonl is always one of them."""
    sinks: list[Sink] = [JsonLines(run_dir)]
    if logger["tensorboard"]:
        sinks.append(TensorBoard(run_dir))
    options = dict(logger["wandb"])
    if options["mode"] != "off":
        try:
            sinks.append(Wandb(run_dir, config=config, **options))
        except Exception as error:  # no key, no server, no disk: the run matters more than its picture on a page
            log.warning(
                "wandb (logger.wandb.mode=%s) did not start: %s; the run goes on without it, its figures are in "
                "metrics.jsonl",
                options["mode"],
                error,
            )
    return sinks


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
