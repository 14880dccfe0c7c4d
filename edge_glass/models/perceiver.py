"""A fixed number of latents in the place of any number of tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from edge_glass.encoders.tokens import Tokens


class PerceiverResampler(nn.Module):
    """`latents` tokens that sum up a sequence of any length.

    Learned latents attend to the tokens and to each other, layer by layer (Jaegle et al. 2021; the form of
    Flamingo, Alayrac et al. 2022, section 3.1.1, with keys and values from [tokens; latents]). Positions are
    added where a latent looks (the keys), not to what it reads (the values), and the latents start small: at
    initialisation an output holds its input and little that all inputs share, so contrastive training starts
    from embeddings that differ. The place of a token is its place among its sample's real tokens, so
    padding changes nothing.

    Args:
        dim: width of the tokens and of the latents.
        latents: tokens that come out.
        depth: layers of attention and MLP.
        heads: attention heads.
        head_dim: width of a head; None shares `dim` among the heads.
        mlp_ratio: the MLP's hidden width over `dim`.
        max_tokens: the longest sequence.

    Raises:
        ValueError: `heads` does not divide an even `dim` and no `head_dim` is given.
    """

    positions: Tensor  # [max_tokens, dim]

    def __init__(
        self,
        dim: int,
        latents: int,
        depth: int = 2,
        heads: int = 8,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        max_tokens: int = 1500,
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"{heads} heads do not divide dim {dim}; choose heads that do, or give head_dim")
        self.dim = dim
        self.max_tokens = max_tokens
        self.latents = nn.Parameter(0.02 * torch.randn(latents, dim))
        self.register_buffer("positions", sinusoids(max_tokens, dim), persistent=False)
        self.norm_tokens = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            ResamplerLayer(dim, heads, head_dim or dim // heads, mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tokens) -> Tokens:
        """Args: tokens: `[batch, tokens, dim]` and mask. Returns: `[batch, latents, dim]`, all real.

        Raises:
            ValueError: more tokens than `max_tokens`.
        """
        batch, length, _ = tokens.tokens.shape
        if length > self.max_tokens:
            raise ValueError(
                f"the resampler got {length} tokens a sample and knows positions for {self.max_tokens}; "
                f"set its max_tokens to {length} or more"
            )
        values = self.norm_tokens(tokens.tokens.masked_fill(~tokens.mask[..., None], 0.0))
        place = (tokens.mask.cumsum(1) - 1).clamp(min=0)
        keys = values + self.positions[place].to(values.dtype)
        latents = self.latents.expand(batch, -1, -1)
        visible = torch.cat([tokens.mask, tokens.mask.new_ones(latents.shape[:2])], dim=1)[:, None, None, :]
        for layer in self.layers:
            latents = layer(latents, keys, values, visible)
        latents = self.norm(latents)
        return Tokens(latents, torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device))


class ResamplerLayer(nn.Module):
    """Latents after one look at the tokens and at each other, and an MLP; norms come first, residuals around.

    Args:
        dim: width of tokens and latents.
        heads: attention heads.
        head_dim: width of a head.
        mlp_ratio: the MLP's hidden width over `dim`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, heads * head_dim, bias=False)
        self.value = nn.Linear(dim, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)  # torch's default would shrink what is read to a tenth

    def forward(self, latents: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Args: latents `[batch, latents, dim]`; keys, values `[batch, tokens, dim]`; visible
        `[batch, 1, 1, tokens + latents]` bool. Returns: `[batch, latents, dim]`."""
        normed = self.norm(latents)
        attended = scaled_dot_product_attention(
            self._split(self.query(normed)),
            self._split(self.key(torch.cat([keys, normed], dim=1))),
            self._split(self.value(torch.cat([values, normed], dim=1))),
            attn_mask=visible,
        )  # [batch, heads, latents, head_dim]
        latents = latents + self.out(attended.transpose(1, 2).flatten(2))
        return latents + self.mlp(latents)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [batch, heads, length, head_dim]


def sinusoids(length: int, dim: int) -> Tensor:
    """Positions `[length, dim]` of Vaswani et al. 2017, section 3.5 (sines first, then cosines)."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]
