"""The way back: from a plan to the plan that rebuilds its source from its outputs.

Backwards from the outputs. Every output is a piece of its own expression, whole. At each node the pieces that arrived must tile it; then
the node's transform says which regions of its arguments can be had from it, and how (``recover``). What arrives at a ``Read`` is that
source tensor. Copies arrive twice and agree; what was dropped, narrowed or cut off never arrives, and is listed.
"""

from __future__ import annotations

from msgspec import Struct

from ckptconv.plan import Apply, Dropped, Expr, Origin, Output, Plan, Read, apply, walk
from ckptconv.spec import Box
from ckptconv.tiling import Piece, Untiled, tile

_BACKWARDS = Origin("inverse", 0, 0, "inverse")


class Lost(Struct, frozen=True):
    """A source tensor that the outputs do not give back, and why."""

    name: str
    reason: str


class Inversion(Struct, frozen=True):
    """The plan backwards, and what it cannot rebuild."""

    plan: Plan
    lost: tuple[Lost, ...]


def invert(plan: Plan) -> Inversion:
    """The inverse of a plan, as far as there is one. Its source is the plan's output, its outputs are the plan's source, in its order."""
    pieces: dict[Expr, list[Piece]] = {}
    reasons: dict[str, str] = {}
    for output in plan.stored:
        pieces.setdefault(output.expr, []).append(Piece(Box.whole(output.expr.spec.shape), Read(output.name, output.expr.spec)))
    found: dict[str, Expr] = {}
    for node in reversed(list(walk(output.expr for output in plan.stored))):
        if node not in pieces:
            continue
        try:
            whole = tile(node.spec.shape, pieces[node])
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
                pieces.setdefault(node.arguments[piece.argument], []).append(Piece(piece.box, expr))
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
