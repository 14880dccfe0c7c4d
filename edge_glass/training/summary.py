"""Facts about a run for its summary: versions, commit, memory, skipped rows."""

import platform
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from edge_glass.data.rows import REPOSITORY

PACKAGES = ("edge-glass", "torch", "transformers", "hydra-core", "omegaconf", "datasets", "peft", "soundfile")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour a run depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path = REPOSITORY) -> str | None:
    """The git commit of the code, with `+changes` when files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process held, in MiB: of the GPU, or, on the CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def skipped_rows(skipped: Mapping[str, str], of: int, most: int = 1000) -> dict[str, Any]:
    """Undecodable rows, counted by kind.

    Args:
        skipped: sample id -> reason.
        of: rows in the tables.
        most: rows listed one by one.
    """
    kinds = Counter(reason.split(":")[0] for reason in skipped.values())
    rows: Iterable[tuple[str, str]] = list(skipped.items())[:most]
    return {
        "count": len(skipped),
        "of": of,
        "by_reason": dict(kinds.most_common()),
        "rows": [{"sample_id": sample, "reason": reason} for sample, reason in rows],
    }
