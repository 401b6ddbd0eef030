"""NaN and infinity in written tensors, counted. Copying carries them along bit by bit; whether they are meant, only the user knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptconv.execute.sources import Sources
from ckptconv.formats.base import Placed
from ckptconv.spec import DType

NONFINITE = "NaN or infinite"  #: what is noticed of such values
_CHUNK = 1 << 18  # elements: what lies between stays in the cache
#: torch cannot tell for these: pairs of four-bit numbers (which have neither), complex halves, and exponents without a number.
_WITHOUT = frozenset({DType.float4_e2m1fn_x2, DType.complex32, DType.float8_e8m0fnu})

if TYPE_CHECKING:
    from torch import Tensor


def nonfinite_in(tensor: Tensor) -> int:
    """How many elements of a contiguous tensor are NaN or infinite; 0 for dtypes that have neither."""
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()) or str(tensor.dtype).removeprefix("torch.") in _WITHOUT:
        return 0
    flat, count = tensor.view(-1), 0
    for at in range(0, flat.numel(), _CHUNK):
        part = flat[at : at + _CHUNK]
        if not part.is_complex() and part.element_size() > 1:
            low, high = torch.aminmax(part)  # NaN where there is one; many times faster than looking at each
            if torch.isfinite(low) and torch.isfinite(high):
                continue
        count += part.numel() - int(torch.isfinite(part if part.element_size() > 1 else part.to(torch.float32)).sum())
    return count


def nonfinite_counts(sources: Sources, placed: Mapping[str, Placed]) -> dict[str, int]:
    """The tensors that hold any, with how many; one tensor is in memory at a time."""
    wanted = {name: place for name, place in placed.items() if place.spec.dtype.kind in ("float", "complex")}
    counts = {name: nonfinite_in(sources.read_tensor(place)) for name, place in wanted.items() if place.spec.dtype not in _WITHOUT}
    return {name: count for name, count in counts.items() if count}
