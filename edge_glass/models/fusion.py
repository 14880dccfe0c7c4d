"""The tokens of several modalities as one prefix for a decoder, whichever of them a sample has."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from edge_glass.data.batch import MODALITIES
from edge_glass.encoders.tokens import Tokens
from edge_glass.models.perceiver import sinusoids
from edge_glass.models.projection import MultimodalProjector

EMBEDDING = "embedding"  # the shared embedding of what a sample shows, one token of it: fused like a modality
SOURCES = (*MODALITIES, EMBEDDING)


@dataclass
class Fused:
    """A prefix, and what there is to say of how it came about.

    Attributes:
        prefix: `[batch, prefix, width]` and mask.
        figures: for the log, scalars without gradient.
    """

    prefix: Tokens
    figures: dict[str, Tensor] = field(default_factory=dict)


class MultimodalFusion(nn.Module, ABC):
    """One prefix from the tokens of any subset of modalities.

    A modality is absent from a sample when none of its tokens is real there, and from a batch when it is not given.
    Either way the result is that of a fusion which was never configured for it: masked tokens of the prefix aside,
    which no decoder sees.

    Args:
        dims: modality -> width of its tokens.
        width: of the prefix.
        tokens: prefix tokens (for `concat`: of each modality).

    Raises:
        ValueError: no modality, or one that there is not.
    """

    def __init__(self, dims: dict[str, int], width: int, tokens: int):
        super().__init__()
        if not dims or any(name not in SOURCES for name in dims):
            raise ValueError(f"fusion of {list(dims)}: give one or more of {list(SOURCES)}")
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: a prefix has at least 1")
        self.modalities = [name for name in SOURCES if name in dims]
        self.width = width
        self.tokens = tokens

    @abstractmethod
    def forward(self, tokens: dict[str, Tokens]) -> Fused:
        """Args: tokens: modality -> `[batch, tokens, dim]` and mask, of at least one modality."""


class ConcatFusion(MultimodalFusion):
    """The prefix tokens of each modality side by side, each marked with its modality, and an MLP over each token.

    Args:
        dims: modality -> width of its tokens.
        width: of the prefix.
        tokens: prefix tokens of each modality; see `MultimodalProjector`.
        hidden_dim: of the MLPs; None takes `width`.
        segments: modality -> see `MultimodalProjector`; None for all.
    """

    def __init__(
        self,
        dims: dict[str, int],
        width: int,
        tokens: int,
        hidden_dim: int | None = None,
        segments: dict[str, int] | None = None,
    ):
        super().__init__(dims, width, tokens)
        self.projectors = _projectors(self.modalities, dims, width, tokens, hidden_dim, segments)
        self.types = _types(self.modalities, width)
        self.mlp = ResidualMLP(width, hidden_dim or width)

    def forward(self, tokens: dict[str, Tokens]) -> Fused:
        parts = [
            _present(self.projectors[name](tokens[name]), tokens[name].mask, self.types[name])
            for name in self.modalities
            if name in tokens
        ]
        joined = torch.cat([part.tokens for part in parts], dim=1)
        return Fused(Tokens(self.mlp(joined), torch.cat([part.mask for part in parts], dim=1)))


class CrossAttentionFusion(MultimodalFusion):
    """Learned queries that look at the tokens of each modality.

    What they see of a modality is added through the hyperbolic tangent of a gate that starts at zero (Flamingo:
    Alayrac et al. 2022, section 3.1.2), so that a modality comes in as far as it helps. Figures: `gate/<modality>`.

    Args:
        dims: modality -> width of its tokens.
        width: of the prefix.
        tokens: prefix tokens, one a query.
        heads: attention heads, dividing `dim`.
        depth: layers of attention and MLP.
        dim: width of the queries, which one linear layer brings to the decoder's; None takes the decoder's itself.
        hidden_dim: of the MLPs; None takes `dim`.
        max_tokens: the longest sequence of a modality.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        dims: dict[str, int],
        width: int,
        tokens: int,
        heads: int = 4,
        depth: int = 1,
        dim: int | None = None,
        hidden_dim: int | None = None,
        max_tokens: int = 1500,
    ):
        super().__init__(dims, width, tokens)
        dim = dim or width
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim} of the queries; choose heads that do")
        self.queries = nn.Parameter(torch.randn(tokens, dim))
        self.readers = nn.ModuleDict({name: Reader(dims[name], dim, max_tokens) for name in self.modalities})
        self.layers = nn.ModuleList(
            CrossAttentionLayer(self.modalities, dim, heads, hidden_dim or dim) for _ in range(depth)
        )
        self.out = nn.Identity() if dim == width else nn.Linear(dim, width)

    def forward(self, tokens: dict[str, Tokens]) -> Fused:
        given = {name: self.readers[name](tokens[name]) for name in self.modalities if name in tokens}
        batch = next(iter(given.values())).mask.shape[0]
        queries = self.queries.expand(batch, -1, -1)
        layers = [layer for layer in self.layers if isinstance(layer, CrossAttentionLayer)]
        for layer in layers:
            queries = layer(queries, given)
        seen = torch.stack([part.mask.any(1) for part in given.values()]).any(0)  # [batch]
        gates = {f"gate/{name}": torch.stack([layer.openness(name) for layer in layers]).mean() for name in given}
        return Fused(Tokens(self.out(queries), seen[:, None].expand(-1, self.tokens)), gates)


class GatedFusion(MultimodalFusion):
    """A weighted mean of the modalities' prefix tokens, the weights being learned for each sample.

    Figures: `gate/<modality>`, its mean weight over the samples that have it.

    Args:
        dims: modality -> width of its tokens.
        width: of the prefix.
        tokens: prefix tokens; see `MultimodalProjector`.
        hidden_dim: of the MLPs; None takes `width`.
        segments: modality -> see `MultimodalProjector`; None for all.
    """

    def __init__(
        self,
        dims: dict[str, int],
        width: int,
        tokens: int,
        hidden_dim: int | None = None,
        segments: dict[str, int] | None = None,
    ):
        super().__init__(dims, width, tokens)
        self.projectors = _projectors(self.modalities, dims, width, tokens, hidden_dim, segments)
        self.types = _types(self.modalities, width)
        self.scores = nn.ModuleDict({name: nn.Linear(width, 1) for name in self.modalities})
        self.mlp = ResidualMLP(width, hidden_dim or width)

    def forward(self, tokens: dict[str, Tokens]) -> Fused:
        names = [name for name in self.modalities if name in tokens]
        parts = [_present(self.projectors[name](tokens[name]), tokens[name].mask, self.types[name]) for name in names]
        has = torch.stack([tokens[name].mask.any(1) for name in names], dim=1)  # [batch, modalities]
        scores = torch.cat(
            [self.scores[name](part.tokens.mean(1)) for name, part in zip(names, parts, strict=True)], dim=1
        )
        # Of a sample without any modality all scores are equal and nothing is seen anyway.
        scores = scores.float().masked_fill(~has, -torch.inf).masked_fill(~has.any(1, keepdim=True), 0.0)
        weights = scores.softmax(1)  # [batch, modalities]
        stacked = torch.stack([part.tokens for part in parts], dim=1)  # [batch, modalities, tokens, width]
        mixed = (weights.to(stacked.dtype)[:, :, None, None] * stacked).sum(1)
        figures = {
            f"gate/{name}": (weights[:, i] * has[:, i]).sum().detach() / has[:, i].sum().clamp(min=1)
            for i, name in enumerate(names)
        }
        return Fused(Tokens(self.mlp(mixed), has.any(1, keepdim=True).expand(-1, self.tokens)), figures)


class ResidualMLP(nn.Module):
    """A token plus an MLP of it.

    Args:
        width: of the tokens.
        hidden_dim: of the MLP.
    """

    def __init__(self, width: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        return tokens + self.layers(tokens)


class Reader(nn.Module):
    """A modality's tokens in the width of the queries, with their places among the real tokens.

    Args:
        dim: width of the tokens.
        width: of the queries.
        max_tokens: the longest sequence.
    """

    positions: Tensor  # [max_tokens, width]

    def __init__(self, dim: int, width: int, max_tokens: int):
        super().__init__()
        self.max_tokens = max_tokens
        self.project = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.register_buffer("positions", sinusoids(max_tokens, width), persistent=False)

    def forward(self, tokens: Tokens) -> Tokens:
        """`[batch, tokens, dim]` to `[batch, tokens, width]`.

        Raises:
            ValueError: more tokens than `max_tokens`.
        """
        if tokens.mask.shape[1] > self.max_tokens:
            raise ValueError(f"fusion got {tokens.mask.shape[1]} tokens; set its max_tokens from {self.max_tokens} up")
        place = (tokens.mask.cumsum(1) - 1).clamp(min=0)
        values = self.project(tokens.tokens.masked_fill(~tokens.mask[..., None], 0.0))
        return Tokens(values + self.positions[place].to(values.dtype), tokens.mask)


class CrossAttentionLayer(nn.Module):
    """Queries after one look at each modality and an MLP; norms come first, residuals around.

    Args:
        modalities: that may be there.
        width: of queries and tokens.
        heads: attention heads.
        hidden_dim: of the MLP.
    """

    def __init__(self, modalities: list[str], width: int, heads: int, hidden_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in modalities})
        self.key_value = nn.ModuleDict({name: nn.Linear(width, 2 * width, bias=False) for name in modalities})
        self.out = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in modalities})
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in modalities})
        self.mlp = ResidualMLP(width, hidden_dim)

    def forward(self, queries: Tensor, given: dict[str, Tokens]) -> Tensor:
        """Queries `[batch, queries, width]` and the tokens of modalities in that width."""
        normed = self.norm(queries)
        for name, part in given.items():
            queries = queries + self.gates[name].tanh() * self._look(name, normed, part)
        return self.mlp(queries)

    def openness(self, name: str) -> Tensor:
        """How far the gate of a modality is open, in 0..1, without gradient."""
        return self.gates[name].detach().tanh().abs()

    def _look(self, name: str, queries: Tensor, tokens: Tokens) -> Tensor:
        key, value = self.key_value[name](tokens.tokens).chunk(2, dim=-1)
        has = tokens.mask.any(1)[:, None, None]
        # A sample that lacks the modality looks everywhere, for a softmax over nothing is no number, and keeps nothing.
        visible = (tokens.mask[:, None, None, :] | ~has[:, None]).expand(-1, 1, queries.shape[1], -1)
        attended = scaled_dot_product_attention(
            self._split(self.query[name](queries)), self._split(key), self._split(value), attn_mask=visible
        )
        return self.out[name](attended.transpose(1, 2).flatten(2)).masked_fill(~has, 0.0)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [batch, heads, length, head_dim]


def _projectors(
    modalities: list[str],
    dims: dict[str, int],
    width: int,
    tokens: int,
    hidden_dim: int | None,
    segments: dict[str, int] | None,
) -> nn.ModuleDict:
    runs = segments or {}
    return nn.ModuleDict(
        {name: MultimodalProjector(dims[name], width, tokens, hidden_dim, runs.get(name)) for name in modalities}
    )


def _types(modalities: list[str], width: int) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in modalities})


def _present(projected: Tokens, mask: Tensor, kind: Tensor) -> Tokens:
    """Prefix tokens marked with their modality, real where the sample has the modality."""
    has = mask.any(1)[:, None]
    return Tokens((projected.tokens + kind).masked_fill(~has[..., None], 0.0), projected.mask & has)
