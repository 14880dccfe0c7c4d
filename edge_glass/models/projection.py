"""From a tower's features to the shared embedding, or to the prefix of a decoder."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from edge_glass.encoders.tokens import Tokens
from edge_glass.models.pooling import segment_shares


class ProjectionHead(nn.Module):
    """Features in the width of the shared embedding.

    Args:
        in_dim: width of the features.
        out_dim: width of the embedding.
        hidden_dim: None for one linear layer; else an MLP of that width, normalised first.
        dropout: share of the values dropped before the last linear layer.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        first = [] if hidden_dim is None else [nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim), nn.GELU()]
        last = nn.Linear(hidden_dim or in_dim, out_dim)
        self.layers = nn.Sequential(*first, nn.Dropout(dropout), last)

    def forward(self, features: Tensor) -> Tensor:
        """`[..., in_dim]` to `[..., out_dim]`."""
        return self.layers(features)


class MatryoshkaProjection(ProjectionHead):
    """An embedding whose first numbers are an embedding too (Kusupati et al. 2022).

    The loss trains the prefixes, each with a term of its own; this module says which they are, and cuts them.

    Args:
        in_dim: width of the features.
        out_dim: full width of the embedding.
        widths: the nested widths in rising or falling order, the largest being `out_dim`.
        hidden_dim: None for one linear layer; else an MLP of that width, normalised first.
        dropout: share of the values dropped before the last linear layer.

    Raises:
        ValueError: widths that are not positive, not sorted, not distinct, or do not end at `out_dim`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        widths: list[int],
        hidden_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(in_dim, out_dim, hidden_dim, dropout)
        widths = list(widths)
        rising = sorted(set(widths))
        if widths not in (rising, rising[::-1]) or not rising or rising[0] < 1 or rising[-1] != out_dim:
            raise ValueError(
                f"nested widths {widths} do not fit an embedding of {out_dim}: they must be positive, "
                f"distinct, in rising or falling order, and the largest must be {out_dim}"
            )
        self.widths = rising

    def at_width(self, embedding: Tensor, width: int) -> Tensor:
        """The first `width` numbers as unit vectors: `[..., out_dim]` to `[..., width]`.

        Raises:
            ValueError: a width that was not trained.
        """
        if width not in self.widths:
            raise ValueError(f"width {width} is none of the nested widths {self.widths}")
        return normalize(embedding[..., :width], dim=-1)


class WhitenedProjection(nn.Module):
    """Features of a frozen tower as a fixed code in which every direction says equally much.

    Sentence embeddings crowd along a few directions. Whitened (Su et al. 2021, https://arxiv.org/abs/2103.15316) they
    spread, so that a tower which learns to hit them is told every concept from every other from the first step on; and
    since nothing here is trained, the target cannot bend towards what the other towers find easy (locked text: Zhai et
    al. 2022, https://arxiv.org/abs/2111.07991). A random rotation at the end makes all coordinates equals, so that
    any leading part of the code is a code as well.

    Args:
        in_dim: width of the features.
        out_dim: width of the embedding, at most `in_dim`: the directions of largest variance are kept.
        floor: added to every variance before it is divided by, as a share of the mean variance, so that directions
            in which the features hardly differ are not blown up into noise.
        seed: of the rotation.

    Raises:
        ValueError: an embedding wider than the features.
    """

    mean: Tensor  # [in_dim]
    matrix: Tensor  # [in_dim, out_dim]

    def __init__(self, in_dim: int, out_dim: int, floor: float = 1e-3, seed: int = 0):
        super().__init__()
        if not 1 <= out_dim <= in_dim:
            raise ValueError(
                f"a whitened embedding of {out_dim} numbers cannot come from {in_dim} features: give encoder.dim of at "
                f"most {in_dim}, or a projection that learns (projection@encoder.text.projection=matryoshka)"
            )
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.floor = floor
        turn = torch.randn(out_dim, out_dim, generator=torch.Generator().manual_seed(seed))
        self.rotation = torch.linalg.qr(turn).Q
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("matrix", torch.cat([self.rotation, torch.zeros(in_dim - out_dim, out_dim)]))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Whiten with the mean and covariance of these features, `[rows, in_dim]`.

        Raises:
            ValueError: fewer than two rows.
        """
        if len(features) < 2:
            raise ValueError(
                f"whitening needs at least 2 rows of features to know their covariance, not {len(features)}"
            )
        rows = features.double().cpu()
        variances, directions = torch.linalg.eigh(torch.cov(rows.T))
        variances, directions = variances[-self.out_dim :].clamp(min=0), directions[:, -self.out_dim :]
        scales = (variances + self.floor * variances.mean()).clamp(min=1e-12).rsqrt()
        self.mean.copy_(rows.mean(0))
        self.matrix.copy_((directions * scales) @ self.rotation.double())

    def forward(self, features: Tensor) -> Tensor:
        """`[..., in_dim]` to `[..., out_dim]`."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.matrix


class MultimodalProjector(nn.Module):
    """Prefix tokens for a language decoder, from the tokens of a tower.

    Args:
        in_dim: width of the tokens.
        out_dim: width of the decoder's embeddings.
        tokens: how many prefix tokens; None keeps every token.
        hidden_dim: width of the MLP; None takes `out_dim`.
        segments: None: each prefix token is an MLP of an equal run of the real tokens, averaged. A number: of so many
            averaged runs laid side by side, as a tower's projection reads them, one MLP makes all prefix tokens.

    Raises:
        ValueError: numbers that cannot work.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        tokens: int | None = None,
        hidden_dim: int | None = None,
        segments: int | None = None,
    ):
        super().__init__()
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens is {tokens}; it must be at least 1, or null to keep every token")
        if segments is not None and (segments < 1 or tokens is None):
            raise ValueError(f"segments is {segments} and tokens {tokens}; segments are at least 1 and need tokens")
        self.tokens = tokens
        self.segments = segments
        whole = (segments * in_dim, (tokens or 1) * out_dim) if segments is not None else (in_dim, out_dim)
        self.head = ProjectionHead(*whole, hidden_dim or out_dim)

    def forward(self, tokens: Tokens) -> Tokens:
        """`[batch, tokens, in_dim]` and mask to `[batch, prefix, out_dim]` and mask."""
        values, mask = tokens.tokens, tokens.mask
        runs = self.segments or self.tokens
        if runs is not None:
            shares = segment_shares(mask, runs).to(values.dtype)
            values = shares @ values.masked_fill(~mask[..., None], 0.0)  # [batch, runs, in_dim]
        if self.tokens is None:
            return Tokens(self.head(values), mask)
        if self.segments is not None:
            values = values.flatten(1)
        made = self.head(values).reshape(len(values), self.tokens, -1)
        return Tokens(made, torch.ones(made.shape[:2], dtype=torch.bool, device=made.device))
