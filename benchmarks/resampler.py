"""The resampler, forward and backward, beside flamingo-pytorch's with the same weights.

Where ours has what theirs lacks (positions, biases), it is set to zero, so that both compute the same outputs.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.sides import compare
from edge_glass.encoders.tokens import Tokens
from edge_glass.models.perceiver import PerceiverResampler

BATCH, TOKENS, DIM, LATENTS, DEPTH, HEADS = 8, 257, 512, 64, 2, 8
FLOORS = {torch.float32: 1.0, torch.bfloat16: 1.8}


def rows() -> list[dict[str, Any]]:
    """In fp32, and under bf16 autocast."""
    ours, theirs = pair()
    tokens = torch.randn(BATCH, TOKENS, DIM)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    with torch.no_grad():
        same = torch.allclose(ours(Tokens(tokens, mask)).tokens, theirs(tokens).squeeze(1), atol=1e-5)

    def trained(model: nn.Module, tokens: Any, dtype: torch.dtype) -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(tokens)
        (out.tokens if isinstance(out, Tokens) else out).float().square().sum().backward()

    return [
        compare(
            f"resampler, {str(dtype).removeprefix('torch.')}",
            "flamingo-pytorch",
            partial(trained, ours, Tokens(tokens, mask), dtype),
            partial(trained, theirs, tokens, dtype),
            floor,
            equal=same,
        )
        for dtype, floor in FLOORS.items()
    ]


def pair() -> tuple[PerceiverResampler, nn.Module]:
    """Ours and theirs with equal weights."""
    from flamingo_pytorch import PerceiverResampler as Theirs

    torch.manual_seed(0)
    theirs = Theirs(dim=DIM, depth=DEPTH, dim_head=DIM // HEADS, heads=HEADS, num_latents=LATENTS)
    ours = PerceiverResampler(DIM, LATENTS, DEPTH, HEADS)
    with torch.no_grad():
        theirs.media_pos_emb.zero_()
        ours.positions.zero_()
        ours.latents.copy_(theirs.latents)
        pairs: Any = zip(ours.layers, theirs.layers, strict=True)
        for own, (attention, feed_forward) in pairs:
            key, value = attention.to_kv.weight.chunk(2)
            for linear, weight in (
                (own.query, attention.to_q.weight),
                (own.key, key),
                (own.value, value),
                (own.out, attention.to_out.weight),
                (own.mlp[1], feed_forward[1].weight),
                (own.mlp[3], feed_forward[3].weight),
            ):
                linear.weight.copy_(weight)
            own.mlp[1].bias.zero_()
            own.mlp[3].bias.zero_()
    return ours, theirs


if __name__ == "__main__":
    torch.set_num_threads(1)
    for found in rows():
        print(found)
