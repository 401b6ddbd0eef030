"""One expression for a whole tensor, joined from pieces that cover it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ckptconv.errors import printable
from ckptconv.plan import Expr, apply
from ckptconv.spec import Box
from ckptconv.transforms import Concat


class Piece(Struct, frozen=True):
    """A region of a tensor, and what it is."""

    box: Box
    expr: Expr


class Untiled(Exception):  # noqa: N818  (a reason, not a fault)
    """The pieces of a tensor do not cover it."""


def tile(shape: tuple[int, ...], pieces: Sequence[Piece]) -> Expr:
    """One expression for the whole of ``shape``, joined from pieces that cover it; equal pieces are copies of one another.

    Pieces cut along several axes (tensor-parallel ranks by experts) are joined axis by axis, wherever a straight cut goes through.
    """
    whole = Box.whole(shape)
    unique: dict[Box, Expr] = {}
    for piece in pieces:
        unique.setdefault(piece.box, piece.expr)
    return _joined(whole, unique)


def _joined(region: Box, pieces: dict[Box, Expr]) -> Expr:
    if region in pieces:
        return pieces[region]
    for axis in range(len(region.start)):
        begin, end = region.start[axis], region.start[axis] + region.size[axis]
        cuts = _straight_cuts(axis, begin, end, pieces)
        if not cuts:
            continue
        parts: list[Expr] = []
        for low, high in zip([begin, *cuts], [*cuts, end], strict=True):
            slab = Box((*region.start[:axis], low, *region.start[axis + 1 :]), (*region.size[:axis], high - low, *region.size[axis + 1 :]))
            inside = {box: expr for box, expr in pieces.items() if low <= box.start[axis] and box.start[axis] + box.size[axis] <= high}
            if not inside:
                raise Untiled(f"{low}:{high} along axis {axis} is in no output")
            parts.append(_joined(slab, inside))
        return apply(Concat(axis=axis), *parts)
    covered = ", ".join(f"{list(box.start)}+{list(box.size)}" for box in list(pieces)[:3])
    raise Untiled(f"the outputs cover only a part of it ({printable(covered)})")


def _straight_cuts(axis: int, begin: int, end: int, pieces: dict[Box, Expr]) -> list[int]:
    """Places strictly inside the region where an edge of a piece goes through without crossing any other piece."""
    edges = {edge for box in pieces for edge in (box.start[axis], box.start[axis] + box.size[axis]) if begin < edge < end}
    return sorted(edge for edge in edges if not any(box.start[axis] < edge < box.start[axis] + box.size[axis] for box in pieces))
