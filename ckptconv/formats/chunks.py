"""A tensor from the boxes that the ranks of a distributed save wrote of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from ckptconv.errors import Refusal, printable
from ckptconv.formats.base import Composite, Placed
from ckptconv.spec import Box, TensorSpec


def joined(name: str, shape: tuple[int, ...], found: Mapping[Box, Placed], bad: Callable[[str, str], Refusal]) -> Placed | Composite:
    """The tensor ``name`` of this shape: its only chunk, or all of them. That they leave no hole is seen when it is put together.

    Raises what ``bad`` makes of a sentence and what was found, for chunks that cannot be parts of one tensor.
    """
    if not found:
        raise bad(f"{printable(name)} has no chunks", "")
    dtypes = sorted({placed.spec.dtype.value for placed in found.values()})
    if len(dtypes) > 1:
        raise bad(f"the chunks of {printable(name)} are of different dtypes", ", ".join(dtypes))
    first = next(iter(found.values()))
    if len(found) == 1 and first.spec.shape == shape:
        return first
    if sum(placed.spec.numel for placed in found.values()) > prod(shape):
        raise bad(f"the chunks of {printable(name)} overlap", f"{len(found)} chunks of {list(shape)}")
    spans = (", ".join(f"{start}:{start + size}" for start, size in zip(box.start, box.size, strict=True)) for box in found)
    parts: dict[str, Placed | float | int] = {f"[{span}]": placed for span, placed in zip(spans, found.values(), strict=True)}
    return Composite("chunks", TensorSpec(shape, first.spec.dtype), parts, tuple(found))
