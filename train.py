"""Train: compose a config, check it, hand it to the ranks.

python train.py                                         # the embedded data set, small towers, no network
python train.py encoder=vision_text training.max_steps=50
python train.py training.resume=outputs/2026-01-31/edge-glass-120000-000000
python train.py -m ablation=mrl launch.nproc_per_node=2
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from edge_glass import launch
from edge_glass.cli import run_command
from edge_glass.config import to_experiment
from edge_glass.runs import AUTO, discard_if_empty, resumed
from edge_glass.signatures import check_targets
from edge_glass.sweeps import show_outcomes


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    job = HydraConfig.get()
    run_dir = Path(job.runtime.output_dir)
    launch.warm_up(config)
    try:
        if config.training.resume not in (None, AUTO):
            config, run_dir = resumed(config.training.resume, list(job.overrides.task))
        experiment = to_experiment(config)
        check_targets(OmegaConf.to_container(experiment))
        return launch.run("edge_glass.training.fit:fit", experiment, str(run_dir))
    finally:
        discard_if_empty(Path(job.runtime.output_dir))


if __name__ == "__main__":
    run_command(main, at_the_end=show_outcomes)
