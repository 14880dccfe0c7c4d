"""Contrastive losses between modalities: by concept, at nested widths, across ranks."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edge_glass.distributed import all_mean, current_ranks, gather
from edge_glass.models.nested_infonce import Positives, nested_infonce

PAIRS = ("image_text", "audio_text", "image_audio")


class AlignmentLoss(nn.Module):
    """Draws rows of one concept together and all others apart, in two modalities, at every nested width.

    For unit vectors `a_i`, `b_j`, learned scale `s` and `P(i)` the rows of `b` with the concept of `a_i`:

    - `infonce`: `- mean_i mean_{p in P(i)} log softmax_j(s a_i.b_j)[p]`, the mean of both directions. It is
      CLIP's loss (Radford et al. 2021) with the positives of supervised contrastive learning (Khosla et al.
      2020, L_out). A row without a positive is left out of the mean.
    - `siglip`: `- mean_i sum_j log sigmoid(z_ij (s a_i.b_j + bias))`, `z_ij` = 1 for a positive, else -1, the
      mean of both directions (Zhai et al. 2023).

    The loss is the weighted mean over widths (Kusupati et al. 2022): width w compares the first w numbers of
    each row, normalised to unit length. The dot products of a width are those of the next smaller one plus
    one block.

    With several ranks the value is that of one process holding all rows, on every rank. Each rank computes
    the logits of its own rows of `a` only, so its gradient is a share: the mean over ranks, as
    DistributedDataParallel takes it, is the gradient of one process.

    Args:
        widths: prefixes of the embedding to train; the largest is the embedding itself.
        width_weights: one weight a width, in the order of `widths`; equal by default. Only their ratio
            counts.
        kind: the formula.
        temperature: start of 1 / scale (0.07: Wu et al. 2018).
        max_scale: the scale is kept at or below this (100: Radford et al. 2021).
        chunk: rows of `a` whose logits are kept for the backward pass. For more rows logits are computed a part
            at a time, and again in the backward pass: `siglip` takes chunks of that many rows, so that memory
            grows with rows times chunk, `infonce` tiles of a fixed size.

    Raises:
        ValueError: widths, weights, temperature or chunk that cannot work.
    """

    def __init__(
        self,
        widths: list[int],
        width_weights: list[float] | None = None,
        kind: Literal["infonce", "siglip"] = "infonce",
        temperature: float = 0.07,
        max_scale: float = 100.0,
        chunk: int = 4096,
    ) -> None:
        super().__init__()
        weights = [1.0] * len(widths) if width_weights is None else width_weights
        if not widths or min(widths) < 1 or len(set(widths)) < len(widths):
            raise ValueError(f"widths={widths}: give distinct positive widths, such as [512, 256, 128, 64]")
        if len(weights) != len(widths) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"width_weights={weights}: give one weight >= 0 for each of the widths {widths}, not all 0"
            )
        if kind not in ("infonce", "siglip"):
            raise ValueError(f"kind={kind!r}: give 'infonce' or 'siglip'")
        if temperature <= 0 or 1 / temperature > max_scale:
            raise ValueError(
                f"temperature={temperature}: give one above 0 whose inverse is at most max_scale={max_scale}"
            )
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: give at least 1 row")
        order = sorted(range(len(widths)), key=widths.__getitem__)
        self.widths = [widths[i] for i in order]
        self.width_weights = [weights[i] / sum(weights) for i in order]
        self.kind = kind
        self.max_scale = max_scale
        self.chunk = chunk
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        if kind == "siglip":  # starts from "hardly any pair is a positive": Zhai et al. 2023, section 3.2
            self.bias = nn.Parameter(torch.tensor(-10.0))

    @property
    def scale(self) -> Tensor:
        """The learned scale (1 / temperature) as the next forward will use it, without gradient."""
        return self.log_scale.detach().exp().clamp(max=self.max_scale)

    def forward(self, a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor) -> Tensor:
        """The loss of two sets of embeddings.

        Args:
            a: `[rows a, dim]`, not necessarily normalised, in any float type.
            b: `[rows b, dim]`; may have another number of rows than `a`.
            ids_a: `[rows a]` concept ids.
            ids_b: `[rows b]` concept ids.

        Returns:
            A float32 scalar; a float64 one if the loss itself was turned into float64.

        Raises:
            ValueError: shapes that do not fit each other or the widths.
        """
        self._check(a, b, ids_a, ids_b)
        # Clipped as CLIP does it: the parameter itself, outside the graph. Clipping in the graph would leave
        # a scale beyond the limit without gradient, for ever.
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        with torch.autocast(a.device.type, enabled=False):
            dtype = torch.promote_types(self.log_scale.dtype, torch.float32)
            return self._loss(a.to(dtype), b.to(dtype), ids_a, ids_b)

    def _loss(self, a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor) -> Tensor:
        all_ids_a, b, ids_b = gather(ids_a), gather(b), gather(ids_b)
        share = self._infonce if self.kind == "infonce" else self._siglip
        mine = share(a, b, ids_a, ids_b, all_ids_a) @ a.new_tensor(self.width_weights)
        # The value of all ranks with the gradient of this rank's share.
        return mine + (all_mean(mine) - mine).detach()

    def _infonce(self, a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor, all_ids_a: Tensor) -> Tensor:
        """This rank's share at each width, `[widths]`; the mean of all shares is the loss."""
        positives_a, positives_b = _count(ids_a, ids_b), _count(ids_b, all_ids_a)
        rows_a, rows_b = (_count(all_ids_a, ids_b) > 0).sum(), (positives_b > 0).sum()
        # A row's part in half the mean over the rows that have a positive; shared out among its positives.
        weight_a = (positives_a > 0).to(a) / (2 * rows_a.clamp(min=1))  # [rows a]
        weight_b = (positives_b > 0).to(b) / (2 * rows_b.clamp(min=1))  # [rows b]
        pull_a, pull_b = weight_a / positives_a.clamp(min=1), weight_b / positives_b.clamp(min=1)

        positives = Positives(ids_a, ids_b, pull_a, pull_b)
        keep = torch.is_grad_enabled() and len(a) <= self.chunk
        rows, columns, pulled = nested_infonce(a, b, self.log_scale.exp(), self.widths, positives, keep)
        # Each rank has summed its own rows of `a` into the denominators of `b`: put them together.
        columns = gather(columns[None]).logsumexp(0)
        return current_ranks().world_size * (rows @ weight_a - pulled) + columns @ weight_b

    def _siglip(self, a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor, all_ids_a: Tensor) -> Tensor:
        """This rank's share at each width, `[widths]`; the mean of all shares is the loss."""
        weight = (1 / len(all_ids_a) + 1 / len(ids_b)) / 2  # half the mean over rows, of each direction

        def block(a, inverse_a, ids_a, b, inverse_b) -> Tensor:
            positive = (ids_a[:, None] == ids_b).float()
            return torch.stack(
                [
                    F.binary_cross_entropy_with_logits(logits + self.bias, positive, reduction="sum")
                    for logits in self._logits(a, inverse_a, b, inverse_b)
                ]
            )

        blocks = self._in_chunks(block, (a, self._inverse_norms(a), ids_a), (b, self._inverse_norms(b)))
        return current_ranks().world_size * weight * torch.stack(blocks).sum(0)

    def _logits(self, a: Tensor, inverse_a: Tensor, b: Tensor, inverse_b: Tensor) -> Iterator[Tensor]:
        """Scaled cosines `[rows a, rows b]` at each width, from the smallest."""
        dots = a.new_zeros(())
        scale_a = self.log_scale.exp() * inverse_a
        for k, (block_a, block_b) in enumerate(zip(self._blocks(a), self._blocks(b), strict=True)):
            dots = torch.addmm(dots, block_a, block_b.T)
            yield dots * torch.outer(scale_a[:, k], inverse_b[:, k])

    def _inverse_norms(self, embedding: Tensor) -> Tensor:
        """One over the length of each row at each width, `[rows, widths]`."""
        squares = torch.stack([block.square().sum(1) for block in self._blocks(embedding)], dim=1)
        return squares.cumsum(1).clamp(min=1e-24).rsqrt()  # as F.normalize: lengths of at least 1e-12

    def _blocks(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """What each width adds to the next smaller one."""
        return embedding.split([stop - start for start, stop in pairwise([0, *self.widths])], dim=1)

    def _in_chunks(self, block: Callable, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> list:
        """`block` of each chunk of the rows with all columns."""
        chunks = list(zip(*(part.split(self.chunk) for part in rows), strict=True))
        if len(chunks) == 1:
            return [block(*rows, *columns)]
        return [checkpoint(block, *chunk, *columns, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]

    def _check(self, a: Tensor, b: Tensor, ids_a: Tensor, ids_b: Tensor) -> None:
        for name, embedding, ids in (("a", a, ids_a), ("b", b, ids_b)):
            if embedding.ndim != 2 or embedding.shape[1] != self.widths[-1]:
                raise ValueError(
                    f"{name} has shape {list(embedding.shape)}, the widths are {self.widths}: embeddings "
                    f"must be [rows, {self.widths[-1]}]; make the largest width the size of the embedding"
                )
            if ids.shape != embedding.shape[:1]:
                raise ValueError(
                    f"ids_{name} has shape {list(ids.shape)}, {name} {list(embedding.shape)}: give one concept id a row"
                )


class TriModalAlignmentLoss(nn.Module):
    """Aligns every pair of the modalities at hand, each pair with its own learned temperature.

    The total is the weighted mean over the pairs that are present, so that it does not jump when a batch
    lacks one.

    Args:
        widths: prefixes of the embedding to train; see `AlignmentLoss`, also for the arguments not named
            here.
        pair_weights: weight of each pair, of `image_text`, `audio_text` and `image_audio`; a pair that is not
            named, or has weight 0, is not trained. All three equal by default. Only their ratio counts.
        contrastive: weight of the full width, given together with `mrl` and in the place of `width_weights`; the loss
            is then not a mean over widths but the sum of both parts, to stand beside other losses.
        mrl: weight of the nested widths, the mean of which is taken.

    Raises:
        ValueError: an unknown pair, a negative weight, no pair at all, or weights of widths given in both ways.
    """

    def __init__(
        self,
        widths: list[int],
        pair_weights: dict[str, float] | None = None,
        width_weights: list[float] | None = None,
        contrastive: float | None = None,
        mrl: float | None = None,
        kind: Literal["infonce", "siglip"] = "infonce",
        temperature: float = 0.07,
        max_scale: float = 100.0,
        chunk: int = 4096,
    ) -> None:
        super().__init__()
        self.weight = 1.0
        if contrastive is not None or mrl is not None:
            if contrastive is None or mrl is None or width_weights is not None or min(contrastive, mrl) < 0:
                raise ValueError(
                    f"contrastive={contrastive}, mrl={mrl}, width_weights={width_weights}: give two weights >= 0 for "
                    "the full width and the nested ones, or else width_weights"
                )
            nested = mrl / max(len(widths) - 1, 1)
            width_weights = [contrastive if width == max(widths) else nested for width in widths]
            self.weight = sum(width_weights)
        weights = dict.fromkeys(PAIRS, 1.0) if pair_weights is None else pair_weights
        unknown = sorted(set(weights) - set(PAIRS))
        if unknown:
            raise ValueError(f"pair_weights names {unknown}; the pairs are {list(PAIRS)}")
        if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"pair_weights={weights}: give weights >= 0, at least one of them above 0")
        self.pair_weights = {pair: float(weights[pair]) for pair in PAIRS if weights.get(pair)}
        self.pairs = nn.ModuleDict(
            {
                pair: AlignmentLoss(widths, width_weights, kind, temperature, max_scale, chunk)
                for pair in self.pair_weights
            }
        )

    def forward(
        self, embeddings: dict[str, Tensor], concept_ids: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Args:
            embeddings: `[rows, dim]` of two or three of `image`, `audio`, `text`; the number of rows may differ.
            concept_ids: `[rows]` for each of them; rows with equal ids are positives of each other.

        Returns:
            The total, and for the log, without gradient, each pair's loss and scale: `loss/image_text`, ...

        Raises:
            ValueError: no pair to train among the modalities.
        """
        present = [pair for pair in self.pair_weights if all(side in embeddings for side in pair.split("_"))]
        if not present:
            raise ValueError(
                f"the loss trains {list(self.pair_weights)}, there are embeddings of {sorted(embeddings)}: "
                "give both modalities of at least one pair; see `encoder` and `objective` in the config"
            )
        # An absent pair takes part with weight 0, so that DistributedDataParallel finds no parameter unused.
        total = 0.0 * torch.stack(list(self.parameters())).sum()
        figures = {}
        for pair in present:
            first, second = pair.split("_")
            loss = self.pairs[pair](embeddings[first], embeddings[second], concept_ids[first], concept_ids[second])
            total = total + self.pair_weights[pair] * loss
            figures[f"loss/{pair}"] = loss.detach()
            figures[f"scale/{pair}"] = self.pairs[pair].scale
        return self.weight * total / sum(self.pair_weights[pair] for pair in present), figures


def _count(ids: Tensor, among: Tensor) -> Tensor:
    """How often each id occurs among others, `[len(ids)]`."""
    among = among.sort().values
    return torch.searchsorted(among, ids, right=True) - torch.searchsorted(among, ids)
