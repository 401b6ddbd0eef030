"""Lineage as data: one link for every tensor that is made, dropped, missing or unexpected. What a picture of a conversion is drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from ckptconv.compare import Comparison
from ckptconv.errors import printable
from ckptconv.plan import Expr, Origin, Output, Plan, Read, reads
from ckptconv.report.changes import text_of, verb_of
from ckptconv.report.model import Difference
from ckptconv.spec import TensorSpec

NOWHERE = Origin()
MOST_ARGUMENTS, MOST_DEPTH = 8, 12


class Kind(Struct, frozen=True):
    """What a link can be, as people see it: a word and a glyph beside every colour."""

    word: str
    glyph: str
    tone: str  #: calm, move, shape, value, gone or bad: which colour
    sentence: str


#: Every kind, in the order in which they are offered: what needs a look first, what is as it was last.
KINDS: Mapping[str, Kind] = {
    "missing": Kind("missing", "∅", "bad", "The target needs it, and nothing makes it."),
    "unexpected": Kind("unexpected", "+", "bad", "It is made, and the target does not know it."),
    "shape": Kind("wrong shape", "≠", "bad", "The target has another shape for it."),
    "dtype": Kind("wrong dtype", "≉", "bad", "The target's dtype would lose values, and no step casts it."),
    "tie": Kind("broken tie", "∦", "bad", "One tensor in the target, and specs here that cannot be one."),
    "ambiguous": Kind("ambiguous", "?", "bad", "More than one tensor could be meant."),
    "different": Kind("different", "≠", "bad", "Both sides have it, with another shape or dtype."),
    "left": Kind("only left", "−", "gone", "Only the left side has it."),
    "right": Kind("only right", "+", "gone", "Only the right side has it."),
    "initial": Kind("stays initial", "~", "gone", "Allowed to be missing: it keeps the value that the model was built with."),
    "extra": Kind("allowed extra", "+", "gone", "The target does not know it, and the rules allow that."),
    "dropped": Kind("dropped", "×", "gone", "A step leaves it out on purpose."),
    "unused": Kind("unused", "×", "gone", "Nothing is made of it."),
    "split": Kind("split", "<", "shape", "A part of one tensor."),
    "joined": Kind("joined", ">", "shape", "Several tensors in one."),
    "rearranged": Kind("rearranged", "↻", "shape", "The same elements with their axes in another order."),
    "reshaped": Kind("reshaped", "▭", "shape", "The same elements in another shape."),
    "cast": Kind("cast", "≈", "value", "Another dtype."),
    "computed": Kind("computed", "ƒ", "value", "New values, computed from the source."),
    "filled": Kind("filled", "○", "value", "Made without a source."),
    "copied": Kind("copied", "⇉", "move", "The same bytes once more, under another name."),
    "tied": Kind("tied", "∞", "move", "Another name of one tensor."),
    "renamed": Kind("renamed", "→", "move", "The same bytes under another name."),
    "unchanged": Kind("unchanged", "=", "calm", "The same name, the same bytes."),
}


class Link(Struct, frozen=True):
    """Names on the left, the name on the right that they become (empty: none), and how."""

    kind: str  #: a key of KINDS; a fault of the comparison goes before what was done
    sources: tuple[str, ...]
    output: str = ""
    verb: str = ""  #: what was done, where ``kind`` says another thing
    how: str = ""  #: the expression, its sources numbered as in ``sources``
    origin: Origin = NOWHERE
    note: str = ""


class Lineage(Struct, frozen=True):
    """Both sides, and every link between them, in the order of the right side."""

    left: Mapping[str, TensorSpec]
    right: Mapping[str, TensorSpec]
    links: tuple[Link, ...]


def lineage_of(plan: Plan, comparison: Comparison | None = None) -> Lineage:
    """Where everything in a plan comes from, with what the comparison with the target has to say about it.

    >>> from ckptconv.spec import DType, Manifest
    >>> spec = TensorSpec((2,), DType.float32)
    >>> plan = Plan(Manifest({"m.a": spec}), (Output("a", Read("m.a", spec)),))
    >>> [(link.kind, link.sources, link.output) for link in lineage_of(plan).links]
    [('renamed', ('m.a',), 'a')]
    """
    aliases = plan.manifest.aliases
    faults = dict(_faults(comparison)) if comparison is not None else {}
    links = {output.name: _link(output, aliases, faults) for output in plan.outputs}
    right = dict(plan.manifest.tensors)
    if comparison is not None:
        for name in (name for name in comparison.wanted.tensors if name not in right):
            kind, note = faults[name]
            right[name] = comparison.wanted[name]
            links[name] = Link(kind, (), name, note=note)
        wanted = [name for name in comparison.wanted.tensors if name in links]
        links = {name: links[name] for name in [*wanted, *(name for name in links if name not in comparison.wanted)]}
    return Lineage(plan.source.tensors, right, tuple(_with_unused(plan, list(links.values()))))


def in_doubt(lineage: Lineage, notes: Mapping[str, str]) -> Lineage:
    """The lineage with these outputs marked as ambiguous, and why; what is wrong with them anyway stays."""
    links = (
        replace(link, kind="ambiguous", verb=link.verb or link.kind, note=notes[link.output])
        if link.output in notes and KINDS[link.kind].tone != "bad"
        else link
        for link in lineage.links
    )
    return replace(lineage, links=tuple(links))


def lineage_of_difference(difference: Difference) -> Lineage:
    """Two manifests side by side, names that both have in one link."""
    a, b = difference.a, difference.b
    changed = {name: f"{left} against {right}" for name, left, right in difference.changed}
    links = [
        Link("different" if name in changed else "unchanged", (name,), name, note=changed.get(name, ""))
        if name in a
        else Link("right", (), name)
        for name in b.tensors
    ]
    return Lineage(a.tensors, b.tensors, tuple(_placed(links, [Link("left", (name,)) for name in difference.only_left], list(a.tensors))))


def expression(expr: Expr) -> str:
    """The expression as text, its sources by their number.

    >>> from ckptconv.plan import apply
    >>> from ckptconv.spec import DType
    >>> from ckptconv.transforms import Concat
    >>> expression(apply(Concat(axis=0), *(Read(name, TensorSpec((2,), DType.float32)) for name in "qk")))
    'concat(#1, #2, axis=0)'
    """
    numbers = {name: f"#{at}" for at, name in enumerate(reads(expr), 1)}
    return text_of(expr, numbers.__getitem__, most=MOST_ARGUMENTS, deep=MOST_DEPTH)


def _link(output: Output, aliases: Mapping[str, str], faults: Mapping[str, tuple[str, str]]) -> Link:
    verb, how, note = verb_of(output), "", ""
    if output.name in aliases:
        verb, note = "tied", f"one tensor with {printable(aliases[output.name])}"
    elif not isinstance(output.expr, Read):
        how = expression(output.expr)
    kind, fault = faults.get(output.name, ("", ""))
    return Link(kind or verb, reads(output.expr), output.name, verb if kind else "", how, output.origin, fault or note)


def _faults(comparison: Comparison) -> Iterator[tuple[str, tuple[str, str]]]:
    """(name, (kind or empty, sentence)): what is said of a tensor on the right, worse things later."""
    for name, found, wanted in comparison.widened:
        yield name, ("", f"{found.dtype} here, {wanted.dtype} in the target: loading copies up")
    for name, partner in comparison.tied:
        yield name, ("tied", f"comes with {printable(partner)}, which is the same tensor in the target")
    for name in comparison.allowed_missing:
        yield name, ("initial", "")
    for name in comparison.allowed_unexpected:
        yield name, ("extra", "")
    for name in comparison.missing:
        yield name, ("missing", "")
    for name in comparison.unexpected:
        yield name, ("unexpected", "")
    for tied in comparison.broken_ties:
        for name, _ in tied:
            yield name, ("tie", ", ".join(f"{printable(other)} {dtype}" for other, dtype in tied))
    for name, found, wanted in comparison.dtypes:
        yield name, ("dtype", f"{found.dtype} here, {wanted.dtype} in the target")
    for name, found, wanted in comparison.shapes:
        yield name, ("shape", f"{list(found.shape)} here, {list(wanted.shape)} in the target")


def _with_unused(plan: Plan, links: list[Link]) -> list[Link]:
    """The links with those of source tensors that become nothing, where they stand in the source."""
    used = {name for link in links for name in link.sources}
    alone = [
        Link("dropped", drop.sources, origin=drop.origin, note=drop.reason, how="" if drop.sources == (drop.name,) else f"called {printable(drop.name)} then")
        for drop in plan.dropped
        if drop.sources
    ]  # fmt: skip
    used.update(name for link in alone for name in link.sources)
    aliases = plan.source.aliases
    for name in (name for name in plan.source.tensors if name not in used):
        first = aliases.get(name)
        alone.append(Link("tied", (name,), note=f"one tensor with {printable(first)}") if first else Link("unused", (name,)))
    return _placed(links, alone, list(plan.source.tensors))


def _placed(links: list[Link], alone: list[Link], order: list[str]) -> list[Link]:
    """``links`` with those of ``alone`` (which have no right side) each after the link of the nearest source before it."""
    at = {name: number for number, name in enumerate(order)}
    first_user: dict[int, int] = {}
    for number, link in enumerate(links):
        for name in link.sources:
            first_user.setdefault(at[name], number)
    before: dict[int, list[Link]] = {}
    waiting = sorted(alone, key=lambda link: at[link.sources[0]], reverse=True)
    place = -1
    for number in range(len(order)):
        place = first_user.get(number, place)
        while waiting and at[waiting[-1].sources[0]] == number:
            before.setdefault(place, []).append(waiting.pop())
    placed = list(before.get(-1, ()))
    for number, link in enumerate(links):
        placed += [link, *before.get(number, ())]
    return placed
