"""Tensor-parallel sets: one file per rank, each with the same names and a part of every tensor.

``consolidated.{rank}.pth`` (Meta's Llama), ``mp_rank_{rank}/model_optim_rng.pt`` (Megatron). A rank's tensors are called ``RANK::name``;
how they are joined is a matter of rules (``{rank:int}::layers.{i:int}.…``), not of code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Contents
from ckptconv.formats.joining import plain_files, side_by_side
from ckptconv.places.presence import look_into

_FILE = re.compile(r"consolidated\.([0-9]{2,4})\.(?:pth|pt|safetensors)")
_FOLDER = re.compile(r"mp_rank_([0-9]{2,4})")
_MEGATRON = ("model_optim_rng.pt", "model_rng.pt")


def found(folder: Path) -> dict[str, Path]:
    """Rank, as it is written -> its file. Empty where the folder is no tensor-parallel set."""
    files = {match[1]: folder / name for name in plain_files(folder) if (match := _FILE.fullmatch(name))}
    if files:
        return files
    ranks = {}
    for path in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(path.name)
        name = next((name for name in _MEGATRON if (path / name).is_file()), None) if match else None
        if match and name:
            ranks[match[1]] = path / name
    return ranks


def read(ranks: dict[str, Path], read_file: Callable[[Path], Contents]) -> Contents:
    """The set as one source. Raises :class:`~ckptconv.errors.Refusal` CK308 where a rank is missing."""
    numbers = sorted(int(rank) for rank in ranks)
    if numbers != list(range(len(ranks))):
        gap = next(at for at in range(max(numbers) + 1) if at not in numbers) if len(set(numbers)) == len(numbers) else numbers[0]
        raise Refusal(f"rank {gap} of the tensor-parallel set is missing, or there twice", code="CK308", found=printable(", ".join(ranks)))
    look_into(ranks.values())
    return side_by_side({rank: read_file(ranks[rank]) for rank in sorted(ranks, key=int)}, "tensor-parallel")
