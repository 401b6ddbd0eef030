"""The way back: from a plan to the plan that rebuilds its source from its outputs.

Backwards from the outputs. Every output is a piece of its own expression, whole. At each node the pieces that arrived must tile it; then
the node's transform says which regions of its arguments can be had from it, and how (``recover``). What arrives at a ``Read`` is that
source tensor. Copies arrive twice and agree; what was dropped, narrowed or cut off never arrives, and is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptconv.errors import printable
from ckptconv.plan import Apply, Dropped, Expr, Origin, Output, Plan, Read, apply, walk
from ckptconv.spec import Box
from ckptconv.transforms import Concat

_BACKWARDS = Origin("inverse", 0, 0, "inverse")


@dataclass(frozen=True)
class Lost:
    """A source tensor that the outputs do not give back, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Inversion:
    """The plan backwards, and what it cannot rebuild."""

    plan: Plan
    lost: tuple[Lost, ...]


@dataclass(frozen=True)
class _Piece:
    box: Box
    expr: Expr


class Untiled(Exception):  # noqa: N818  (a reason, turned into a Lost)
    """The pieces of a node do not cover it."""


def invert(plan: Plan) -> Inversion:
    """The inverse of a plan, as far as there is one. Its source is the plan's output, its outputs are the plan's source, in its order."""
    pieces: dict[Expr, list[_Piece]] = {}
    reasons: dict[str, str] = {}
    for output in plan.stored:
        pieces.setdefault(output.expr, []).append(_Piece(Box.whole(output.expr.spec.shape), Read(output.name, output.expr.spec)))
    found: dict[str, Expr] = {}
    for node in reversed(list(walk(output.expr for output in plan.stored))):
        if node not in pieces:
            continue
        try:
            whole = _tile(node.spec.shape, pieces[node])
        except Untiled as reason:
            _blame(node, str(reason), reasons)
            continue
        if isinstance(node, Read):
            found[node.name] = whole
        elif isinstance(node, Apply):
            recovered = node.transform.recover(*(argument.spec for argument in node.arguments))
            if not recovered:
                _blame(node, f"{node.transform.describe(*('·' for _ in node.arguments))} cannot be undone", reasons)
            for piece in recovered:
                expr = apply(piece.back, whole) if piece.back is not None else whole
                pieces.setdefault(node.arguments[piece.argument], []).append(_Piece(piece.box, expr))
    return _assembled(plan, found, reasons)


def _assembled(plan: Plan, found: dict[str, Expr], reasons: dict[str, str]) -> Inversion:
    source, aliases = plan.source, plan.source.aliases
    dropped = {name: drop for drop in plan.dropped for name in drop.sources}
    outputs: list[Output] = []
    lost: list[Lost] = []
    for name in source.tensors:
        expr = found.get(aliases.get(name, name))
        if expr is not None:
            outputs.append(Output(name, expr, _BACKWARDS))
            continue
        drop = dropped.get(aliases.get(name, name))
        reason = reasons.get(aliases.get(name, name)) or (f"dropped by {drop.origin}" if drop is not None else "no output holds all of it")
        lost.append(Lost(name, reason))
    there = {output.name for output in outputs}
    used = {node.name for node in walk(output.expr for output in outputs) if isinstance(node, Read)}
    idle = tuple(
        Dropped(output.name, _BACKWARDS, "not part of the source", (output.name,)) for output in plan.stored if output.name not in used
    )
    ties = tuple(group for group in source.ties if there.issuperset(group))
    return Inversion(Plan(plan.manifest, tuple(outputs), ties, idle), tuple(lost))


def _blame(node: Expr, reason: str, reasons: dict[str, str]) -> None:
    for leaf in walk([node]):
        if isinstance(leaf, Read):
            reasons.setdefault(leaf.name, reason)


def _tile(shape: tuple[int, ...], pieces: Sequence[_Piece]) -> Expr:
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
