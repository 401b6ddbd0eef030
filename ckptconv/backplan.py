"""Steps from a plan alone: for rules that cannot be turned round step by step, the way back is derived from the inverse plan.

Outputs that are made of the same tensors are one island. Islands of one form, whose names differ in numbers only, are one step: a
rename, or a ``convert`` that lists what is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.backnames import Entry, Row, fresh, guessed, text_of
from ckptconv.plan import Apply, Expr, Output, Plan, Read, islands, reads
from ckptconv.ruleset.patterns import Pattern
from ckptconv.transforms import Affine, Cast, Concat, Index, Pad, Rearrange, Repeat, Reshape, Slice, Transform
from ckptconv.transforms.rearrange import sides


class Unturned(Exception):  # noqa: N818  (a reason to go another way)
    """What cannot be turned round, or not in this way."""


class Written(Struct, frozen=True):
    """One step of the way back."""

    op: str
    body: Any
    comment: str = ""


def derived(plan: Plan, universe: Sequence[str] = (), comment: str = "derived from the plan") -> list[Written]:
    """Steps that do what ``plan`` (an inverse) does, among the names of ``universe`` besides its own.

    Raises :class:`Unturned` for a form that they cannot say.
    """
    aliases = {name: group[0] for group in plan.ties for name in group[1:]}
    outputs, copies = _apart([output for output in plan.outputs if output.name not in aliases])
    universe = list(dict.fromkeys([*universe, *plan.manifest.tensors, *plan.source.tensors]))
    written: list[Written] = []
    used = {name for output in plan.outputs for name in reads(output.expr)}
    idle = [name for name in plan.source if name not in used]
    if idle:
        written.append(_drop(idle, [*universe]))
    converts: list[Written] = []
    table: dict[str, str] = {}
    for acts, rows in _forms(outputs).items():
        if not acts:
            table.update({text_of(entry.keys[0]): text_of(entry.values[0]) for entry in guessed(rows, universe)})
            continue
        converts += [_convert(entry, acts) for entry in guessed(rows, universe)]
    written += converts
    if any(pattern != template for pattern, template in table.items()):
        written.append(Written("rename", table))
    there = [output.name for output in outputs]
    for entry in guessed([Row((first,), tuple(names)) for first, names in copies.items()], there) if copies else ():
        tos = [text_of(parts) for parts in entry.values]
        written.append(Written("copy", {"from": text_of(entry.keys[0]), "to": tos if len(tos) > 1 else tos[0]}))
    written += [Written("tie", {"from": first, "to": name}) for name, first in aliases.items()]
    return [replace(step, comment=comment) for step in written]


def _apart(outputs: Sequence[Output]) -> tuple[list[Output], dict[str, list[str]]]:
    """The outputs, each value once, and the names that are copies of it: of its own name, if it has one that stays."""
    firsts: dict[Expr, Output] = {}
    for output in outputs:
        if output.expr not in firsts or (isinstance(output.expr, Read) and output.expr.name == output.name):
            firsts[output.expr] = output
    copies: dict[str, list[str]] = {}
    for output in outputs:
        first = firsts[output.expr]
        if output is not first:
            copies.setdefault(first.name, []).append(output.name)
    chosen = {first.name for first in firsts.values()}
    return [output for output in outputs if output.name in chosen], copies


def _drop(names: Sequence[str], universe: Sequence[str]) -> Written:
    texts = [text_of(entry.keys[0]) for entry in guessed([Row((name,), ()) for name in names], universe)]
    return Written("drop", {"keys": texts if len(texts) > 1 else texts[0], "reason": "not part of the source"})


# Acts as something that can be a key: two islands are of one form when the same is done to them.
Frozen = tuple[Any, ...]
Act = dict[str, Any]


def _convert(entry: Entry, acts: Frozen) -> Written:
    froms, tos = [text_of(parts) for parts in entry.keys], [text_of(parts) for parts in entry.values]
    tos = _fanned(tos, froms)
    body = {
        "from": froms if len(froms) > 1 else froms[0],
        "to": tos if len(tos) > 1 else tos[0],
        "do": _said([_thawed(act) for act in acts]),
    }
    return Written("convert", body)


def _fanned(templates: list[str], patterns: Sequence[str]) -> list[str]:
    """Templates that differ in one part as one: ``l.{i}.q`` and ``l.{i}.k`` are ``l.{i}.{x:q|k}``."""
    rows = [text.split(".") for text in templates]
    if len(rows) < 2 or len({len(row) for row in rows}) > 1:
        return templates
    places = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    words = [row[places[0]] for row in rows] if len(places) == 1 else []
    if len(set(words)) < len(rows) or any(set("{}|=:") & set(word) for word in words):
        return templates
    name = fresh("x", {each for text in patterns for each in Pattern.parse(text).names})
    return [".".join([*rows[0][: places[0]], f"{{{name}:{'|'.join(words)}}}", *rows[0][places[0] + 1 :]])]


def _said(acts: list[Act]) -> list[Act]:
    """Acts in everyday words: an axis put in and joined is a stack, an axis cut into ones that go away is an unstack."""
    found: list[Act] = []
    for act in acts:
        last = found[-1] if found else {}
        if "concat" in act and _axis(last, 1) == act["concat"]:
            found[-1] = {"stack": act["concat"]}
        elif "split" in last and set(last["split"]["sizes"]) == {1} and _axis(act, 0) == last["split"]["dim"]:
            found[-1] = {"unstack": last["split"]["dim"]}
        else:
            found.append(act)
    return found


def _axis(act: Act, side: int) -> int | None:
    """The axis of size 1 that a rearrangement puts in (``side`` 1) or takes out (0), if it does nothing else."""
    if not isinstance(act.get("rearrange"), str):
        return None
    lists = [text.split() for text in act["rearrange"].split("->")]
    longer, shorter = lists[side], lists[1 - side]
    at = longer.index("1") if longer.count("1") == 1 else -1
    return at if at >= 0 and [*longer[:at], *longer[at + 1 :]] == shorter and "..." not in shorter else None


def _plain(transform: Transform) -> Transform:
    """The same rearrangement with the sizes that it needs: of every group all but the last."""
    if not isinstance(transform, Rearrange):
        return transform
    needed = {axis for group in sides(transform.pattern)[0] for axis in (group or ())[:-1]}
    return Rearrange(pattern=transform.pattern, sizes=tuple((axis, size) for axis, size in transform.sizes if axis in needed))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ("map", *((key, _frozen(item)) for key, item in value.items()))
    return ("list", *map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        return {key: _thawed(item) for key, item in value[1:]} if value[0] == "map" else [_thawed(item) for item in value[1:]]
    return value


def _forms(outputs: Sequence[Output]) -> dict[Frozen, list[Row]]:
    """What is done -> the islands that it is done to; renames have nothing done."""
    found: dict[Frozen, list[Row]] = {}
    for island in islands(outputs):
        sources = tuple(dict.fromkeys(name for output in island for name in reads(output.expr)))
        if len(sources) == 1 and (len(island) > 1 or not _joins(island[0].expr)):
            acts, order = _cut([(output.name, _chain(output.expr)) for output in island])
            row = Row(sources, tuple(order))
        elif len(island) == 1:
            acts, leaves = _join(island[0].expr)
            row = Row(tuple(leaves), (island[0].name,))
        else:
            raise Unturned(f"{', '.join(output.name for output in island[:3])} are made of {len(sources)} tensors together")
        if len(set(row.keys)) < len(row.keys) or len(set(row.values)) < len(row.values):
            raise Unturned(f"{row.values[0]} needs one tensor twice")
        found.setdefault(tuple(_frozen(act) for act in acts), []).append(row)
    return found


def _joins(expr: Expr) -> bool:
    while isinstance(expr, Apply):
        if len(expr.arguments) > 1:
            return True
        expr = expr.arguments[0]
    return False


def _chain(expr: Expr) -> list[Transform]:
    """The transforms from the one tensor read to the expression, first to last."""
    found: list[Transform] = []
    while isinstance(expr, Apply):
        if len(expr.arguments) != 1:
            raise Unturned("pieces of one tensor are joined in another order")
        found.append(_plain(expr.transform))
        expr = expr.arguments[0]
    if not isinstance(expr, Read):
        raise Unturned("it is made of nothing")
    return found[::-1]


def _cut(chains: Sequence[tuple[str, list[Transform]]]) -> tuple[list[Act], list[str]]:
    """One tensor to one or several: what all have in common is done first, then it is cut, and every part goes on alike."""
    if len(chains) == 1:
        ((name, chain),) = chains
        return [act_of(transform) for transform in chain], [name]
    firsts = [chain[0] if chain else None for _, chain in chains]
    if all(first == firsts[0] for first in firsts):
        if firsts[0] is None:
            raise Unturned("one tensor comes back under several names")
        acts, order = _cut([(name, chain[1:]) for name, chain in chains])
        return [act_of(firsts[0]), *acts], order
    groups: dict[Slice, list[tuple[str, list[Transform]]]] = {}
    for name, chain in chains:
        if not chain or not isinstance(chain[0], Slice):
            raise Unturned("the parts of one tensor are not treated alike")
        groups.setdefault(chain[0], []).append((name, chain[1:]))
    cuts = sorted(groups, key=lambda cut: cut.start)
    if len({cut.axis for cut in cuts}) > 1 or cuts[0].start or any(a.stop != b.start for a, b in pairwise(cuts)):
        raise Unturned("the parts of one tensor overlap or leave gaps")
    done = [_cut(groups[cut]) for cut in cuts]
    if any(acts != done[0][0] for acts, _ in done):
        raise Unturned("the parts of one tensor are not treated alike")
    sizes = [cut.stop - cut.start for cut in cuts]
    return [{"split": {"dim": cuts[0].axis, "sizes": sizes}}, *done[0][0]], [name for _, order in done for name in order]


def _join(expr: Expr) -> tuple[list[Act], list[str]]:
    """Several tensors to one: each treated alike, joined, and what follows."""
    tail: list[Act] = []
    while isinstance(expr, Apply) and len(expr.arguments) == 1:
        tail.insert(0, act_of(_plain(expr.transform)))
        expr = expr.arguments[0]
    if not isinstance(expr, Apply) or not isinstance(expr.transform, Concat):
        raise Unturned("several tensors are not simply joined")
    heads = [_chain(argument) for argument in expr.arguments]
    if any(head != heads[0] for head in heads):
        raise Unturned("the pieces of one tensor are not treated alike")
    leaves = [reads(argument)[0] for argument in expr.arguments]
    return [*map(act_of, heads[0]), {"concat": expr.transform.axis}, *tail], leaves


def act_of(transform: Transform) -> Act:
    """An entry of ``do`` that is this transform."""
    if isinstance(transform, Rearrange):
        sizes = dict(transform.sizes)
        return {"rearrange": {"pattern": transform.pattern, **sizes} if sizes else transform.pattern}
    if isinstance(transform, Reshape):
        return {"reshape": list(transform.shape)}
    if isinstance(transform, Cast):
        return {"cast": transform.dtype.value}
    if isinstance(transform, Slice):
        return {"slice": {"dim": transform.axis, "start": transform.start, "stop": transform.stop}}
    if isinstance(transform, Index):
        return {"index": {"dim": transform.axis, "take": list(transform.take)}}
    if isinstance(transform, Pad):
        return {"pad": {"dim": transform.axis, "before": transform.before, "after": transform.after, "value": transform.value}}
    if isinstance(transform, Repeat):
        return {"repeat": {"dim": transform.axis, "times": transform.times, "interleave": transform.interleave}}
    if isinstance(transform, Affine):
        return {"affine": {"mul": transform.mul, "add": transform.add}}
    raise Unturned(f"no step does what {type(transform).__name__} does")
