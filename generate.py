"""Ask a run's decoder about pictures and recordings of your own.

python generate.py run=outputs/2026-01-31/edge-glass-120000-000000 image=cat.png
python generate.py run=<folder> image=cat.png audio=meow.wav prompt="What is it?"
python generate.py run=<folder> audio=[a.wav,b.wav] generation.temperature=0.8 generation.top_p=0.9
"""

import hydra
from omegaconf import DictConfig

from edge_glass.cli import run_command


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(config: DictConfig) -> None:
    from edge_glass.experiments.ask import answer_files  # imports torch: not for --help

    answer_files(config)


if __name__ == "__main__":
    run_command(main)
