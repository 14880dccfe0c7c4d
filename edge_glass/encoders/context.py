"""Whisper's encoder over part of its window, with or without the silence that would fill the rest.

transformers' WhisperEncoder takes the full window alone: a clip of 3 s costs as much as one of 30 s. Most of it is
silence, but not idle: the tokens of sound attend to it, and without it some of them come out as others.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

TOKENS_PER_KEY = 16  # silent tokens are much alike: of so many one is attended to, with the weight of all


def encode(backbone: WhisperEncoder, mel: Tensor, silence: list[Tensor] | None = None) -> Tensor:
    """Tokens `[batch, frames / 2, dim]`; of the full window those of WhisperEncoder itself.

    Args:
        backbone: Whisper's encoder.
        mel: `[batch, mel bins, frames]`, the first frames of the window, an even number.
        silence: what `silent_states` gave; the tokens then also attend to the silence that would follow. Without it,
            there is nothing after the last frame.
    """
    hidden = _embedded(backbone, mel)
    tokens = hidden.shape[1]
    rest = [group for group in _groups(backbone) if group[0] >= tokens]
    if not silence or not rest:
        silent: list[Tensor | None] = [None] * len(backbone.layers)
        weights = None
    else:
        silent = [state[:, -len(rest) :] for state in silence]
        counts = [1.0] * tokens + [float(len(group)) for group in rest]
        weights = hidden.new_tensor(counts).log()[None, None, None]  # added to the scores of each key
    for layer, states in zip(_layers(backbone), silent, strict=True):
        if backbone.training and backbone.layerdrop > 0 and torch.rand([]) < backbone.layerdrop:
            continue  # as WhisperEncoder does
        hidden = layer(hidden, None) if states is None else _layer(layer, hidden, states, weights)
    return backbone.layer_norm(hidden)


def silent_states(backbone: WhisperEncoder, mel: Tensor) -> list[Tensor]:
    """What each layer's keys and values are made of where a clip is over: `[1, keys, dim]` a layer.

    Args:
        backbone: Whisper's encoder.
        mel: `[1, mel bins, frames]`, a short sound and silence up to the end of the window.
    """
    places = [group[len(group) // 2] for group in _groups(backbone)]
    hidden, states = _embedded(backbone, mel), []
    for layer in _layers(backbone):
        states.append(layer.self_attn_layer_norm(hidden[:, places]))
        hidden = layer(hidden, None)
    return states


def _layers(backbone: WhisperEncoder) -> list[WhisperEncoderLayer]:
    return cast(list[WhisperEncoderLayer], list(backbone.layers))


def _groups(backbone: WhisperEncoder) -> list[range]:
    """The places of the window's tokens, TOKENS_PER_KEY together."""
    window = range(backbone.config.max_source_positions)
    return [window[first : first + TOKENS_PER_KEY] for first in window[::TOKENS_PER_KEY]]


def _embedded(backbone: WhisperEncoder, mel: Tensor) -> Tensor:
    """What the first layer reads: `[batch, frames / 2, dim]`."""
    hidden = F.gelu(backbone.conv2(F.gelu(backbone.conv1(mel)))).transpose(1, 2)
    hidden = hidden + backbone.embed_positions.weight[: hidden.shape[1]]
    return F.dropout(hidden, backbone.dropout, backbone.training)


def _layer(layer: WhisperEncoderLayer, hidden: Tensor, silent: Tensor, weights: Tensor | None) -> Tensor:
    """A WhisperEncoderLayer whose tokens attend to silent ones too."""
    normed = layer.self_attn_layer_norm(hidden)
    seen = torch.cat([normed, silent.expand(len(normed), -1, -1)], dim=1)
    attended = layer.self_attn(normed, key_value_states=seen, attention_mask=weights)[0]
    hidden = hidden + F.dropout(attended, layer.dropout, layer.training)
    inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))
    inner = layer.fc2(F.dropout(inner, layer.activation_dropout, layer.training))
    return hidden + F.dropout(inner, layer.dropout, layer.training)
