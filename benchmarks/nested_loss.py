"""How long the nested contrastive loss takes, forward and backward, beside the same loss of sentence-transformers.

python -m benchmarks.nested_loss            one thread, one to two minutes
python -m benchmarks.nested_loss --memory   the memory of 16,384 rows, too: another minute; Linux only

The peer is MatryoshkaLoss around MultipleNegativesRankingLoss in both directions. Where each row has one positive, this
is our loss: values and gradients are compared, too. Both take the same embeddings, turn about.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn

from edge_glass.models.losses import AlignmentLoss

WIDTHS = [64, 128, 256, 512, 768]
SCALE = 20.0  # the peer's default
REPEATS = {256: 30, 1024: 8, 4096: 3}  # batch: runs of each
FLOOR = 2.0  # how many times faster ours shall be at least
BOTH_WAYS: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
LARGE, SMALL = 16_384, 4_096  # the plain form does not fit most machines at the large batch


class Embeddings(nn.Module):
    """Stands for the peer's model: hands out embeddings that are there already."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return WIDTHS[-1]


def embeddings(rows: int) -> tuple[Tensor, Tensor]:
    """Two modalities of a half-trained model: row i of the one resembles row i of the other."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, WIDTHS[-1], generator=generator)
    b = a + torch.randn(rows, WIDTHS[-1], generator=generator)
    return a.requires_grad_(), b.requires_grad_()


def ours(a: Tensor, b: Tensor) -> Tensor:
    ids = torch.arange(len(a))
    return AlignmentLoss(WIDTHS, temperature=1 / SCALE)(a, b, ids, ids)


def peer(a: Tensor, b: Tensor) -> Tensor:
    model: Any = Embeddings()
    loss = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model, scale=SCALE, **BOTH_WAYS), WIDTHS)
    columns = [{"sentence_embedding": a}, {"sentence_embedding": b}]
    return loss(columns, torch.empty(0)) / len(WIDTHS)  # theirs is the sum over widths


def plain(a: Tensor, b: Tensor) -> Tensor:
    """The formula as it stands: the logits of every width, all of them kept for the backward pass."""
    target = torch.arange(len(a))
    total = a.new_zeros(())
    for width in WIDTHS:
        logits = SCALE * F.normalize(a[:, :width], dim=1) @ F.normalize(b[:, :width], dim=1).T
        total = total + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return total / len(WIDTHS)


def rows(repeats: dict[int, int] | None = None) -> list[dict[str, Any]]:
    """One row a batch size: the median seconds of each, and the median and range of their ratio over the runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_compared(batch, runs) for batch, runs in (REPEATS if repeats is None else repeats).items()]
    finally:
        torch.set_num_threads(threads)


def _compared(batch: int, runs: int) -> dict[str, Any]:
    a, b = embeddings(batch)
    results = [_timed(ours, a, b), _timed(peer, a, b)]  # also warms up
    pairs = [(_timed(ours, a, b)[0], _timed(peer, a, b)[0]) for _ in range(runs)]
    ratios = [theirs / mine for mine, theirs in pairs]
    return {
        "name": f"nested InfoNCE, batch {batch}",
        "peer": f"sentence-transformers {sentence_transformers.__version__}, both directions",
        "ours_seconds": statistics.median(mine for mine, _ in pairs),
        "peer_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "floor": FLOOR,
        "equal": all(map(_close, results[0][1:], results[1][1:])),
    }


def _timed(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Seconds, value and gradients."""
    a.grad = b.grad = None
    start = time.perf_counter()
    value = loss(a, b)
    value.backward()
    return time.perf_counter() - start, value.detach(), a.grad, b.grad


def _close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() <= 1e-4 * y.norm() + 1e-6)


def memory() -> dict[str, float]:
    """Peak memory in MB that a loss needs beside its embeddings, forward and backward, each in a process of its own."""
    return {
        "ours": _peak_of("ours", LARGE),
        # All of it grows with the square of the batch but the gradients, which add 2 % here.
        "plain": _peak_of("plain", SMALL) * (LARGE / SMALL) ** 2,
        "logits alone": len(WIDTHS) * LARGE**2 * 4 / 1e6,
    }


def _peak_of(name: str, batch: int) -> float:
    command = [sys.executable, "-m", "benchmarks.nested_loss", "--peak", name, str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(name: str, batch: int) -> float:
    """Peak memory in MB beyond what this process held before."""
    torch.set_num_threads(1)
    loss = {"ours": ours, "peer": peer, "plain": plain}[name]
    _timed(loss, *embeddings(8))
    a, b = embeddings(batch)
    before = _status("VmRSS")
    _timed(loss, a, b)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """A number of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="measure the memory, too")
    parser.add_argument("--peak", nargs=2, metavar=("LOSS", "BATCH"), help="only print the peak memory of one loss")
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak[0], int(options.peak[1])))
        return
    for row in rows():
        low, high = row["spread"]
        print(
            f"{row['name']:28} ours {row['ours_seconds']:.4f} s, peer {row['peer_seconds']:.4f} s, "
            f"{row['ratio']:.2f} times faster ({low:.2f} to {high:.2f}), {'equal' if row['equal'] else 'NOT EQUAL'}",
            flush=True,
        )
    if options.memory:
        found = memory()
        print(
            f"batch {LARGE}: ours {found['ours']:,.0f} MB, plain form {found['plain']:,.0f} MB (from batch {SMALL}), "
            f"its logits alone {found['logits alone']:,.0f} MB"
        )


if __name__ == "__main__":
    main()
