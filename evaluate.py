"""Evaluate a run again: every test view, the table, the figures and report.md.

python evaluate.py run=outputs/2026-01-31/edge-glass-120000-000000
python evaluate.py run=<folder> checkpoint=best
"""

import hydra
from omegaconf import DictConfig

from edge_glass.cli import run_command


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    from edge_glass.experiments.build import evaluate_folder  # imports torch: not for --help

    evaluate_folder(config.run, config.checkpoint, config.device)


if __name__ == "__main__":
    run_command(main)
