"""Which outputs are nothing but a range of a source's bytes."""

from __future__ import annotations

from collections.abc import Mapping

from ckptconv.formats.base import Placed
from ckptconv.plan import Apply, Expr, Read
from ckptconv.spec import TensorSpec, contiguous_strides
from ckptconv.transforms import Reshape, Slice


def as_range(expr: Expr, placed: Mapping[str, Placed]) -> Placed | None:
    """The place of an output that is one range of source bytes: a tensor, rows of one, or one under another shape."""
    if isinstance(expr, Read):
        return placed[expr.name] if placed[expr.name].contiguous else None
    if not isinstance(expr, Apply):
        return None
    move = expr.transform
    inner = as_range(expr.arguments[0], placed) if isinstance(move, (Slice, Reshape)) else None
    if inner is None:
        return None
    if isinstance(move, Reshape):
        return Placed(expr.spec, inner.storage, inner.offset, contiguous_strides(expr.spec.shape))
    if not isinstance(move, Slice) or move.axis % len(inner.spec.shape) != 0:
        return None
    return rows(inner, move.start, move.stop)


def rows(placed: Placed, start: int, stop: int) -> Placed:
    """Rows ``start`` to ``stop`` of the first axis, as a place of their own; no byte is read."""
    spec = TensorSpec((stop - start, *placed.spec.shape[1:]), placed.spec.dtype)
    return Placed(spec, placed.storage, placed.offset + start * placed.strides[0] * spec.dtype.nbytes, placed.strides)
