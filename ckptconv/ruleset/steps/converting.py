"""The general form that the other steps are sugar for: names in, names out, and a list of transforms between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Union

from msgspec import Meta, Struct, field
from pydantic_core import ValidationError

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Parsed
from ckptconv.names import nearest
from ckptconv.plan import Expr, apply
from ckptconv.ruleset import expressions
from ckptconv.ruleset.expressions import Lookup
from ckptconv.ruleset.patterns import Pattern
from ckptconv.ruleset.steps.base import (
    Context,
    Entry,
    Number,
    Patterns,
    Step,
    Table,
    Templates,
    integer,
    number,
    rendered,
    replaced,
    with_captures,
)  # fmt: skip
from ckptconv.ruleset.steps.fan import fan_out, grouped
from ckptconv.ruleset.steps.resizing import AdaptChannels, ResizeRows, ResizeStep
from ckptconv.ruleset.steps.shaping import (
    AffineStep,
    CastStep,
    IndexStep,
    MapStep,
    PadStep,
    RearrangeStep,
    RepeatStep,
    ReshapeStep,
    SliceStep,
    axis_of,
)  # fmt: skip
from ckptconv.transforms import Concat, Guard, Rearrange, Slice
from ckptconv.transforms.sugar import insert_axis, remove_axis

#: A value on its way through ``do``: one tensor, or a list of what is not joined yet.
Value = Union[Expr, list["Value"]]

_MAPS: Mapping[str, tuple[type[MapStep], str]] = {  #: word -> the step that does it, and the field that its short form means
    "rearrange": (RearrangeStep, "pattern"), "reshape": (ReshapeStep, "shape"), "cast": (CastStep, "dtype"), "slice": (SliceStep, ""),
    "index": (IndexStep, "take"), "pad": (PadStep, "size"), "repeat": (RepeatStep, "times"), "affine": (AffineStep, ""),
    "resize": (ResizeStep, "size"), "adapt_channels": (AdaptChannels, "channels"), "resize_rows": (ResizeRows, "rows"),
}  # fmt: skip
_JOINS = ("stack", "concat", "same")
_CUTS = ("split", "unstack")
_AXES = ("transpose", "squeeze", "unsqueeze")
WORDS = (*_JOINS, *_CUTS, *_AXES, *_MAPS)


class Act(Struct, frozen=True):
    """One entry of ``do``."""

    word: str
    body: Any
    step: MapStep | None = None


def _act(item: Any) -> Act:
    if item == "same":
        return Act("same", None)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise Refusal("an entry of `do` is one word with what it needs, as in {stack: 0}", code="CK102", found=printable(item))
    ((word, body),) = item.items()
    if word in _MAPS:
        kind, short = _MAPS[word]
        fields = dict(body) if isinstance(body, Mapping) else {short: body} if short else None
        if fields is None or {"keys", "from", "to"} & fields.keys():
            raise Refusal(f"{word} in `do` wants its fields, without keys, from and to", code="CK102", found=printable(body))
        try:
            return Act(word, None, kind.validated({"keys": "**", **fields}))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            reason = fault.get("ctx", {}).get("error")
            if isinstance(reason, Refusal):
                raise reason from None
            raise Refusal(f"{word}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}", code="CK102", found=printable(body)) from None
    if word == "split":
        return Act(word, _split_fields(body))
    if word == "transpose":
        if not isinstance(body, list) or len(body) != 2 or any(type(axis) is not int for axis in body):
            raise Refusal("transpose swaps two axes: {transpose: [0, 1]}", code="CK102", found=printable(body))
        return Act(word, tuple(body))
    if word in WORDS:
        if type(body) is not int:
            raise Refusal(f"{word} takes an axis: {{{word}: 0}}", code="CK102", found=printable(body))
        return Act(word, body)
    close = nearest(str(word), WORDS)
    raise Refusal(f"there is no transform {printable(word)!r}", code="CK102", try_=f"did you mean {close}?" if close else ", ".join(WORDS))


def _split_fields(body: Any) -> tuple[int, tuple[expressions.Node, ...] | None, expressions.Node | None]:
    fields = dict(body) if isinstance(body, Mapping) else {"dim": body}
    dim, sizes, parts = fields.pop("dim", 0), fields.pop("sizes", None), fields.pop("parts", None)
    if fields or type(dim) is not int or (sizes is not None and (parts is not None or not isinstance(sizes, list) or not sizes)):
        raise Refusal("split takes dim, and sizes or parts", code="CK102", found=printable(body), try_="{split: {dim: 0, parts: 3}}")
    return dim, None if sizes is None else tuple(map(number, sizes)), None if parts is None else number(parts)


def _acts(value: Any) -> tuple[Act, ...]:
    if not isinstance(value, list):
        raise Refusal("`do` is a list of transforms", code="CK102", found=printable(value), try_="do: [{stack: 0}, {concat: 1}]")
    return tuple(map(_act, value))


def _names(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or any(not isinstance(item, str) for item in items):
        raise Refusal("gather names one placeholder, or a list of them", code="CK102", found=printable(value))
    return tuple(items)


Acts = Annotated[
    tuple[Act, ...],
    Parsed(_acts, {"type": "array", "items": {"anyOf": [{"const": "same"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}}),
]
Names = Annotated[tuple[str, ...], Parsed(_names, {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]  # fmt: skip


class Convert(Step, frozen=True, kw_only=True):
    """The general form: `from` (one or many), `gather` over placeholders, `do` one transform after the other, `to` (one or many).

    What is gathered is a list: `stack` and `concat` join the innermost one, every other transform works on each member. With several
    patterns and something gathered, that is first the members of each pattern, then the patterns.
    """

    op: ClassVar[str] = "convert"
    source: Patterns = field(name="from")
    gather: Annotated[Names, Meta(description="placeholders that `to` lacks: their members become a list, in numeric order")] = ()
    where: Annotated[Number | None, Meta(description="an expression over captures; names for which it does not hold are left alone")] = None
    to: Templates
    do: Annotated[Acts, Meta(description="transforms, in order")] = ()

    def __post_init__(self) -> None:
        shared = [sorted(name for name in pattern.names if name not in self.over) for pattern in self.source]
        for pattern, names in zip(self.source, shared, strict=True):
            if names != shared[0]:
                raise Refusal(f"{self.source[0].text!r} and {pattern.text!r} must have the same placeholders", code="CK102")
        lost = [name for name in shared[0] if name not in self.mentions]
        if lost:
            raise Refusal(f"`to` lacks {{{lost[0]}}}", code="CK102", try_=f"gather: {lost[0]}, or use it in `to`")
        strange = next((name for name in self.gather if all(name not in pattern.names for pattern in self.source)), None)
        if strange is not None:
            raise Refusal(f"`gather: {strange}` is no placeholder of `from`", code="CK102")

    @cached_property
    def mentions(self) -> frozenset[str]:
        """Every placeholder that `to` uses."""
        return frozenset(name for template in self.to for name in template.mentions)

    @property
    def over(self) -> tuple[str, ...]:
        """What is gathered: as said, and every choice that `to` lacks."""
        choices = [p.name for pattern in self.source for p in pattern.placeholders if p.kind == "choice" and p.name not in self.mentions]
        return tuple(dict.fromkeys([*self.gather, *choices]))

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        claims = self.claims(table, context)
        if self.where is not None:
            claims = [claim for claim in claims if self._holds(claim, table, context)]
        results: dict[str, list[tuple[str, Entry]]] = {}
        place = {name: at for at, name in enumerate(table)}
        for group in grouped(claims, self.source, self.over, context):
            names = list(group.names())
            lookup = context.scope.lookup(group.captures, table)
            try:
                made = self._made(group.members, lookup, table, context, names[0])
            except Refusal as refusal:
                context.refused(refusal, names[0])
                continue
            identity = table[names[0]].identity
            results.update({name: [] for name in names})
            results[min(names, key=place.__getitem__)] = [(new, Entry(expr, context.origin, identity)) for new, expr in made]
        return replaced(table, results, context)

    def _holds(self, claim: tuple[str, int, Any], table: Table, context: Context) -> bool:
        assert self.where is not None
        try:
            return bool(expressions.evaluate(self.where, context.scope.lookup(claim[2], table, claim[0])))
        except Refusal as refusal:
            context.refused(refusal, f"{claim[0]}: where")
            return False

    def _made(
        self, members: Sequence[Mapping[tuple[Any, ...], str]], lookup: Lookup, table: Table, context: Context, subject: str
    ) -> list[tuple[str, Expr]]:
        columns: list[Value] = [[table[name].expr for name in member.values()] for member in members]
        if not self.over:
            columns = [column[0] for column in columns if isinstance(column, list)]
        value: Value = columns[0] if len(columns) == 1 else columns
        for act in self.do:
            value = done(act, value, lookup)
        bound = [name for pattern in self.source for name in pattern.names if name not in self.over]
        targets = list(fan_out(self.to, bound))
        found = flat(value)
        if len(found) != len(targets):
            raise Refusal(
                f"`do` leaves {len(found)} tensors for {len(targets)} names", code="CK206", try_="stack or concat what is gathered"
            )
        named = [
            (rendered(template, with_captures(lookup, extra), context, subject), expr)
            for (template, extra), expr in zip(targets, found, strict=True)
        ]
        return [(new, expr) for new, expr in named if new is not None]


def flat(value: Value) -> list[Expr]:
    """Every tensor of a nested list, in order."""
    return [expr for part in value for expr in flat(part)] if isinstance(value, list) else [value]


def done(act: Act, value: Value, lookup: Lookup) -> Value:
    """The value after one transform. Raises :class:`~ckptconv.errors.Refusal` where it does not fit."""
    if act.word in _JOINS:
        return _joined(act, value)
    if isinstance(value, list):
        return [done(act, part, lookup) for part in value]
    if act.step is not None:
        return act.step.build(value, lookup)
    return _ON_ONE[act.word](act.body, value, lookup)


def _joined(act: Act, value: Value) -> Value:
    if not isinstance(value, list):
        raise Refusal(f"there is nothing to {act.word}: one tensor is left", code="CK206")
    if any(isinstance(part, list) for part in value):
        return [_joined(act, part) for part in value]
    pieces = [part for part in value if not isinstance(part, list)]
    rank = len(pieces[0].spec.shape)
    if act.word == "same":  # the guard hands the first one on; the others are looked at when the values are there
        first = pieces[0]
        for other in pieces[1:]:
            first = apply(Guard(), first, other)
        return first
    if act.word == "concat":
        return apply(Concat(axis=axis_of(act.body, pieces[0])), *pieces)
    axis = act.body if act.body >= 0 else act.body + rank + 1
    if not 0 <= axis <= rank:
        raise Refusal(f"a new axis cannot stand at {act.body} in a tensor of rank {rank}", code="CK206", found=str(pieces[0].spec))
    return apply(
        Concat(axis=axis), *(apply(insert_axis(len(piece.spec.shape), min(axis, len(piece.spec.shape))), piece) for piece in pieces)
    )


def _split(body: Any, expr: Expr, lookup: Lookup) -> Value:
    dim, given, parts = body
    axis = axis_of(dim, expr)
    size = expr.spec.shape[axis]
    if given is not None:
        sizes = [integer(each, lookup, "a size", 0) for each in given]
    else:
        count = 2 if parts is None else integer(parts, lookup, "parts", 1)
        if size % count:
            raise Refusal(f"axis {dim} has {size}, which is no multiple of {count}", code="CK206", found=str(expr.spec))
        sizes = [size // count] * count
    if sum(sizes) != size:
        raise Refusal(f"the sizes {sizes} add up to {sum(sizes)}, but axis {dim} has {size}", code="CK206", found=str(expr.spec))
    stops = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    return [apply(Slice(axis=axis, start=stop - part, stop=stop), expr) for stop, part in zip(stops, sizes, strict=True)]


def _unstack(body: Any, expr: Expr, lookup: Lookup) -> Value:
    axis, rank = axis_of(body, expr), len(expr.spec.shape)
    parts = _split((axis, None, expressions.Node("literal", max(1, expr.spec.shape[axis]))), expr, lookup)
    assert isinstance(parts, list)
    return [apply(remove_axis(rank, axis), part) for part in flat(parts)]


def _transpose(body: Any, expr: Expr, lookup: Lookup) -> Value:  # noqa: ARG001  (the same signature for all)
    axes = [f"a{at}" for at in range(len(expr.spec.shape))]
    left = " ".join(axes)
    one, other = (axis_of(axis, expr) for axis in body)
    axes[one], axes[other] = axes[other], axes[one]
    return apply(Rearrange(pattern=f"{left} -> {' '.join(axes)}"), expr)


def _squeeze(body: Any, expr: Expr, lookup: Lookup) -> Value:  # noqa: ARG001
    return apply(remove_axis(len(expr.spec.shape), axis_of(body, expr)), expr)


def _unsqueeze(body: Any, expr: Expr, lookup: Lookup) -> Value:  # noqa: ARG001
    rank = len(expr.spec.shape)
    axis = body if body >= 0 else body + rank + 1
    if not 0 <= axis <= rank:
        raise Refusal(f"a new axis cannot stand at {body} in a tensor of rank {rank}", code="CK206", found=str(expr.spec))
    return apply(insert_axis(rank, axis), expr)


_ON_ONE: Mapping[str, Callable[[Any, Expr, Lookup], Value]] = {
    "split": _split, "unstack": _unstack, "transpose": _transpose, "squeeze": _squeeze, "unsqueeze": _unsqueeze,
}  # fmt: skip
