"""The sums of InfoNCE over all nested widths in one pass, tile by tile: no matrix of logits has to exist."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows and columns of a tile. A CPU works on one in its cache: 256 x 512 to 512 x 1024 are equally fast, smaller ones
# cost up to a fifth more. A GPU wants few large launches.
TILES = {"cpu": (256, 1024), "cuda": (4096, 4096)}
LEAST_SQUARE = 1e-24  # as F.normalize: lengths of at least 1e-12


class Positives(NamedTuple):
    """Which pairs are positives, those of one concept, and how much the logit of a pair weighs: `weight_a + weight_b`.

    Attributes:
        ids_a: `[rows a]` concept ids.
        ids_b: `[rows b]` concept ids.
        weight_a: `[rows a]`, of the type of the embeddings.
        weight_b: `[rows b]`, of the same type.
    """

    ids_a: Tensor
    ids_b: Tensor
    weight_a: Tensor
    weight_b: Tensor


def nested_infonce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    widths: list[int],
    positives: Positives,
    keep: bool,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What InfoNCE needs of the logits `l_ij = scale cos(a_i, b_j)` at every nested width.

    The dot products of a width are those of the next smaller one plus one block's, and the gradient of a block
    comes from all widths that contain it: all of them together cost the matrix products of the largest alone.
    Log-sum-exps are put together tile by tile (Milakov and Gimelshein 2018), and the backward pass computes the
    logits of each tile again (Dao et al. 2022, algorithm 4).

    Args:
        a: `[rows a, dim]`, not necessarily normalised, float32 or float64.
        b: `[rows b, dim]` of the same type.
        scale: scalar above 0.
        widths: prefixes of the embedding, from the smallest to `dim`.
        positives: the pairs whose logits are summed; without gradient.
        keep: keep the logits for the backward pass: faster by a tenth or two, for `widths x rows a x rows b` numbers.
        tile: rows and columns whose logits are computed at a time; by default those that suit the device.

    Returns:
        The log-sum-exp of each row, `[widths, rows a]`, and of each column, `[widths, rows b]`, and the sum over
        positives of `(weight_a_i + weight_b_j) l_ij`, `[widths]`.
    """
    tile = tile or TILES.get(a.device.type, TILES["cuda"])
    rows, columns, pulled = _InBits.apply(a, b, scale, widths, positives, keep, tile)
    return rows * math.log(2), columns * math.log(2), pulled * math.log(2)


class _InBits(torch.autograd.Function):
    """`nested_infonce` in base 2: on a CPU, exp2 takes half the time of exp."""

    @staticmethod
    def forward(ctx: Any, a, b, scale, widths, positives, keep, tile):
        squares_a, squares_b = _squares(a, widths), _squares(b, widths)
        tiles = _Tiles(a, b, scale, widths, positives, squares_a, squares_b, tile)
        rows, columns = a.new_full((len(widths), len(a)), -math.inf), a.new_full((len(widths), len(b)), -math.inf)
        pulled = a.new_zeros(len(widths))
        kept: list[Tensor] = []
        for i, j in tiles:
            logits, pull = tiles.logits(i, j, keep), tiles.pull(i, j)
            for k, of_width in enumerate(logits):
                rows[k, i] = torch.logaddexp2(rows[k, i], tiles.logsumexp2(of_width, 1))
                columns[k, j] = torch.logaddexp2(columns[k, j], tiles.logsumexp2(of_width, 0))
                pulled[k] += torch.dot(pull.flatten(), of_width.flatten())
            kept += logits if keep else []
        ctx.save_for_backward(a, b, scale, *positives, squares_a, squares_b, rows, columns, *kept)
        ctx.widths, ctx.tile, ctx.keep = widths, tile, keep
        return rows, columns, pulled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows, by_columns, by_pulled):
        a, b, scale, *rest = ctx.saved_tensors
        positives, (squares_a, squares_b, rows, columns), kept = Positives(*rest[:4]), rest[4:8], iter(rest[8:])
        tiles = _Tiles(a, b, scale, ctx.widths, positives, squares_a, squares_b, ctx.tile)
        by_a, by_b = torch.zeros_like(a), torch.zeros_like(b)
        along_a, along_b = torch.zeros_like(rows), torch.zeros_like(columns)  # sums of gradient x logit
        for i, j in tiles:
            logits = [next(kept) for _ in ctx.widths] if ctx.keep else tiles.logits(i, j)
            pull, shape = tiles.pull(i, j), logits[0].shape
            by_dots = tiles.memory("by_dots", shape).zero_()
            for k, block in reversed(list(enumerate(tiles.blocks))):
                # By the logits of this width: the softmax of rows and of columns, and the positives.
                by_logits = torch.sub(logits[k], rows[k, i, None], out=tiles.memory("by_logits", shape))
                by_logits.exp2_().mul_(by_rows[k, i, None])
                other = torch.sub(logits[k], columns[k, j], out=tiles.memory("scratch", shape))
                by_logits.addcmul_(other.exp2_(), by_columns[k, j]).addcmul_(pull, by_pulled[k])
                torch.mul(by_logits, logits[k], out=other)
                along_a[k, i] += other.sum(1)
                along_b[k, j] += other.sum(0)
                # By the dot products of this block, which are part of all larger widths, too.
                by_dots.addcmul_(by_logits.mul_(tiles.factor_a[k, i, None]), tiles.factor_b[k, j])
                if ctx.needs_input_grad[0]:
                    by_a[i, block].addmm_(by_dots, b[j, block])
                if ctx.needs_input_grad[1]:
                    by_b[j, block].addmm_(by_dots.T, a[i, block])
        _through_lengths(by_a, a, along_a, squares_a, tiles.blocks)
        _through_lengths(by_b, b, along_b, squares_b, tiles.blocks)
        return by_a, by_b, along_a.sum().to(scale) / scale, None, None, None, None


class _Tiles:
    """The logits of one tile at a time, in bits, in memory that the next tile uses again."""

    def __init__(self, a, b, scale, widths, positives, squares_a, squares_b, tile):
        self.a, self.b, self.positives, self.tile = a, b, positives, tile
        self.blocks = _blocks(widths)
        # One over the length of each row at each width, [widths, rows]; scale and base go with `a`.
        self.factor_a = squares_a.clamp(min=LEAST_SQUARE).rsqrt() * scale / math.log(2)
        self.factor_b = squares_b.clamp(min=LEAST_SQUARE).rsqrt()
        self._memory: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile."""
        high, wide = self.tile
        for i in range(0, len(self.a), high):
            for j in range(0, len(self.b), wide):
                yield slice(i, min(i + high, len(self.a))), slice(j, min(j + wide, len(self.b)))

    def memory(self, name: str, shape: Sequence[int]) -> Tensor:
        """A matrix whose numbers stay until the name is asked for again."""
        if name not in self._memory:
            self._memory[name] = self.a.new_empty(min(self.tile[0], len(self.a)) * min(self.tile[1], len(self.b)))
        return self._memory[name][: math.prod(shape)].view(*shape)

    def logits(self, i: slice, j: slice, lasting: bool = False) -> list[Tensor]:
        """The tile at each width; lasting ones in memory of their own."""
        dots = self.memory("dots", (i.stop - i.start, j.stop - j.start))
        logits = []
        for k, block in enumerate(self.blocks):
            dots.addmm_(self.a[i, block], self.b[j, block].T, beta=int(k > 0))
            of_width = torch.empty_like(dots) if lasting else self.memory(f"logits {k}", dots.shape)
            logits.append(torch.mul(dots, self.factor_a[k, i, None], out=of_width).mul_(self.factor_b[k, j]))
        return logits

    def pull(self, i: slice, j: slice) -> Tensor:
        """The weight of the logit of each pair, 0 unless it is a positive."""
        ids_a, ids_b, weight_a, weight_b = self.positives
        positive = ids_a[i, None] == ids_b[j]
        return torch.add(weight_a[i, None], weight_b[j], out=self.memory("pull", positive.shape)).mul_(positive)

    def logsumexp2(self, logits: Tensor, dim: int) -> Tensor:
        """The binary logarithm of the sum of powers of two along a dimension."""
        peak = logits.amax(dim, keepdim=True)
        below = torch.sub(logits, peak, out=self.memory("scratch", logits.shape))
        return below.exp2_().sum(dim).log2_() + peak.squeeze(dim)


def _blocks(widths: list[int]) -> list[slice]:
    """What each width adds to the next smaller one."""
    return [slice(*ends) for ends in pairwise([0, *widths])]


def _squares(x: Tensor, widths: list[int]) -> Tensor:
    """The squared length of each row at each width, `[widths, rows]`."""
    return torch.stack([torch.linalg.vector_norm(x[:, block], dim=1) for block in _blocks(widths)]).square().cumsum(0)


def _through_lengths(by_x: Tensor, x: Tensor, along: Tensor, squares: Tensor, blocks: list[slice]) -> None:
    """Takes from the gradient `[rows, dim]` what would change the lengths of rows, and so no logit."""
    of_width = torch.where(squares > LEAST_SQUARE, along / squares, 0.0)
    of_block = of_width.flip(0).cumsum(0).flip(0)  # [widths, rows]: this width and all larger ones
    for k, block in enumerate(blocks):
        by_x[:, block].addcmul_(x[:, block], of_block[k, :, None], value=-1)
