"""A plan in a few lines: outputs that were made in the same way are said as one change, their names collapsed to templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from ckptconv.names import Template, collapse, skeleton
from ckptconv.plan import Apply, Expr, Fill, Origin, Output, Plan, Read, reads
from ckptconv.transforms import Cast, Concat, Rearrange, Reshape, Slice

#: Templates that are said one by one; more are said by what changes in them.
FEW = 3
_VERBS: Mapping[type, str] = {Cast: "cast", Concat: "joined", Rearrange: "rearranged", Reshape: "reshaped", Slice: "split"}


class Change(Struct, frozen=True):
    """Several outputs made in one way by one step."""

    verb: str  #: unchanged, renamed, copied, tied, split, joined, rearranged, cast, filled, dropped, …
    sources: tuple[Template, ...]
    outputs: tuple[Template, ...]
    count: int
    detail: str
    origin: Origin

    def to_json(self) -> dict[str, Any]:
        return {
            "verb": self.verb, "sources": [str(template) for template in self.sources], "outputs": [str(template) for template in self.outputs],
            "count": self.count, "detail": self.detail, "origin": str(self.origin),
        }  # fmt: skip


def changes(plan: Plan) -> list[Change]:
    """Every output and every dropped tensor of the plan, in as few lines as its steps and templates allow."""
    aliases = plan.manifest.aliases
    groups: dict[tuple[Any, ...], tuple[str, str, Origin, list[str], dict[str, None]]] = {}
    key: tuple[Any, ...]
    for output in plan.outputs:
        verb = "tied" if output.name in aliases else verb_of(output)
        made_of = (aliases[output.name],) if verb == "tied" else reads(output.expr)
        if verb == "unchanged":
            key = (verb,)
        elif verb == "renamed":
            # One edit is one line, however many names it touches: all of strip_prefix, say.
            before, after = edit(made_of[0], output.name)
            key = (verb, output.origin, skeleton(f"{before}\n{after}"))
        else:
            detail = "" if verb == "tied" else text_of(output.expr)
            key = (verb, output.origin, detail, skeleton(output.name), _skeletons(made_of))
        group = groups.get(key)
        if group is None:
            said = "" if verb == "unchanged" else f"{before!r} to {after!r}" if verb == "renamed" else detail
            group = groups[key] = (verb, said, output.origin, [], {})
        group[3].append(output.name)
        for source in made_of:
            group[4][source] = None
    return [_change(*group) for group in groups.values()] + _dropped(plan)


def _change(verb: str, detail: str, origin: Origin, names: list[str], made_of: dict[str, None]) -> Change:
    sources, outputs = tuple(collapse(list(made_of))), tuple(collapse(names))
    if verb == "renamed" and len(sources) <= FEW:
        detail = ""  # the templates say it themselves
    return Change(verb, sources, outputs, len(names), detail, origin)


def edit(old: str, new: str) -> tuple[str, str]:
    """What one name has in the place of the other's, whole parts of names only.

    >>> edit("module.layers.0.weight", "layers.0.weight"), edit("blocks.0.norm1.bias", "layers.0.layernorm_before.bias")
    (('module.', ''), ('blocks.0.norm1', 'layers.0.layernorm_before'))
    """
    before, after = old.split("."), new.split(".")
    least, tail, head = min(len(before), len(after)), 0, 0
    while tail < least and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    while head < least - tail and before[head] == after[head]:
        head += 1
    left, right = before[head : len(before) - tail], after[head : len(after) - tail]
    if not left or not right:  # something was taken out or put in: say it with its dot
        return ".".join([*left, ""]), ".".join([*right, ""])
    return ".".join(left), ".".join(right)


def verb_of(output: Output) -> str:
    """One word for how an output is made."""
    expr = output.expr
    if isinstance(expr, Read):
        return "unchanged" if expr.name == output.name else "copied" if output.origin.op == "copy" else "renamed"
    if isinstance(expr, Fill):
        return "filled"
    return _VERBS.get(type(expr.transform), "computed")


def text_of(expr: Expr, named: Callable[[str], str] = lambda _: "·", *, most: int = 4, deep: int = 4) -> str:
    """The expression as text, its sources as a dot: what is done, not to which tensor. ``named`` says what a source is called instead.

    More than ``most`` arguments are counted, and more than ``deep`` operations inside each other left out.
    """
    if isinstance(expr, Read):
        return named(expr.name)
    if isinstance(expr, Fill):
        return f"{expr.recipe} {expr.value} {expr.spec}"
    assert isinstance(expr, Apply)
    if deep < 0:
        return "…"
    arguments = [text_of(argument, named, most=most, deep=deep - 1) for argument in expr.arguments[:most]]
    if len(expr.arguments) > most:
        arguments = [arguments[0], f"… {len(expr.arguments)} in all"]
    return expr.transform.describe(*arguments)


def _dropped(plan: Plan) -> list[Change]:
    groups: dict[tuple[Origin, str], list[str]] = {}
    for drop in plan.dropped:
        groups.setdefault((drop.origin, drop.reason), []).append(drop.name)
    return [Change("dropped", tuple(collapse(names)), (), len(names), reason, origin) for (origin, reason), names in groups.items()]


def _skeletons(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(skeleton(name) for name in names))
