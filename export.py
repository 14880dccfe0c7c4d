"""Write the language model of a run as others load it: peft's adapter format, or transformers' folder.

python export.py run=outputs/2026-01-31/edge-glass-120000-000000 to=my_adapter
python export.py run=<folder> to=my_model merge=true
"""

import hydra
from omegaconf import DictConfig

from edge_glass.cli import run_command


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(config: DictConfig) -> None:
    from edge_glass.experiments.export import export_decoder  # imports torch: not for --help

    export_decoder(config.run, config.to, config.checkpoint, config.merge, config.device)


if __name__ == "__main__":
    run_command(main)
