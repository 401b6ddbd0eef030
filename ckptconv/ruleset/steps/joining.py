"""Steps between one tensor and several: split and concat along an axis, stack and unstack over a placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta, field

from ckptconv.errors import Refusal
from ckptconv.plan import Expr, apply
from ckptconv.ruleset.expressions import Lookup
from ckptconv.ruleset.patterns import Index, Pattern
from ckptconv.ruleset.steps.base import (
    Context,
    Entry,
    Number,
    PatternField,
    Patterns,
    Step,
    Table,
    TemplateField,
    Templates,
    integer,
    rendered,
    replaced,
    with_captures,
)  # fmt: skip
from ckptconv.ruleset.steps.fan import fan_out, grouped
from ckptconv.ruleset.steps.shaping import Axes, axis_of, check_axes
from ckptconv.transforms import Concat, Rearrange, Slice
from ckptconv.transforms.sugar import insert_axis, open_layout, remove_axis

MAX_PARTS = 100_000  #: of one tensor that is unstacked


class AlongStep(Step, frozen=True, kw_only=True):
    """What split and concat share: an axis by its number, or by its name in a `layout` whose other sizes stand beside it."""

    axes: Axes = field(default_factory=dict)
    dim: int = 0
    layout: Annotated[str | None, Meta(description="einops notation of the fused tensor: '(g n d) ...'")] = None
    along: Annotated[str | None, Meta(description="the axis of `layout` that is cut or joined")] = None

    def __post_init__(self) -> None:
        if (self.layout is None) != (self.along is None):
            raise Refusal(f"{self.op} wants layout and along together, or dim", code="CK102")
        if self.layout is None or self.along is None:
            check_axes(self.axes, "", ", ".join(self.written_names()))
        else:
            check_axes(self.axes, self.layout, f"the axes of {self.layout!r}")
            open_layout(self.layout, self.along)

    def opened(self, expr: Expr, lookup: Lookup, size: int | None = None) -> tuple[Expr, int]:
        """The tensor with the named axis on its own, and which one it is. ``size`` is that axis', where nothing else says it."""
        if self.layout is None or self.along is None:
            return expr, axis_of(self.dim, expr)
        how = open_layout(self.layout, self.along)
        sizes = {name: integer(each, lookup, f"axis {name}", 1) for name, each in self.axes.items()}
        if size is not None:
            sizes.setdefault(self.along, size)
        return apply(Rearrange(pattern=how.opened, sizes=tuple(sizes.items())), expr), how.axis

    def closed(self, expr: Expr) -> Expr:
        """The way back from :meth:`opened`."""
        if self.layout is None or self.along is None:
            return expr
        return apply(Rearrange(pattern=open_layout(self.layout, self.along).closed), expr)


class Split(AlongStep, frozen=True):
    """One tensor becomes several, along an axis: equal parts, or `sizes`."""

    op: ClassVar[str] = "split"
    source: Patterns = field(name="from")
    to: Annotated[Templates, Meta(description="one name per part; {x:q|k|v} stands for three")]
    sizes: tuple[Number, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern in self.source:
            count = len(list(fan_out(self.to, pattern.names)))
            if self.sizes is not None and len(self.sizes) != count:
                raise Refusal(f"{len(self.sizes)} sizes for {count} names", code="CK102")
            if count < 2:
                raise Refusal("split wants at least two names in `to`", code="CK102", try_="rename, or slice, for one")

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        results: dict[str, list[tuple[str, Entry]]] = {}
        claims = self.claims(table, context)
        targets_of = [list(fan_out(self.to, pattern.names)) for pattern in self.source]
        if context.too_many(sum(len(targets_of[at]) for _, at, _ in claims)):
            return table
        for name, at, captures in claims:
            entry, lookup, targets = table[name], context.scope.lookup(captures, table, name), targets_of[at]
            try:
                parts = self._cut(entry.expr, len(targets), lookup)
            except Refusal as refusal:
                context.refused(refusal, name)
                continue
            made = [
                (rendered(template, with_captures(lookup, extra), context, name), part)
                for (template, extra), part in zip(targets, parts, strict=True)
            ]
            results[name] = [(new, Entry(part, context.origin, entry.identity)) for new, part in made if new is not None]
        return replaced(table, results, context)

    def _cut(self, expr: Expr, count: int, lookup: Lookup) -> list[Expr]:
        given = None if self.sizes is None else [integer(part, lookup, "a size", 0) for part in self.sizes]
        expr, axis = self.opened(expr, lookup, None if given is None else sum(given))
        named = self.along or str(self.dim)
        size = expr.spec.shape[axis]
        if given is None:
            if size % count:
                raise Refusal(
                    f"axis {named} has {size}, which is no multiple of {count}", code="CK206", found=str(expr.spec), try_="give sizes"
                )
            sizes = [size // count] * count
        else:
            sizes = given
            if sum(sizes) != size:
                raise Refusal(f"the sizes {sizes} add up to {sum(sizes)}, but axis {named} has {size}", code="CK206", found=str(expr.spec))
        parts: list[Expr] = []
        start = 0
        for part in sizes:
            parts.append(self.closed(apply(Slice(axis=axis, start=start, stop=start + part), expr)))
            start += part
        return parts


class ConcatStep(AlongStep, frozen=True):
    """Several tensors become one, along an axis, in the order written."""

    op: ClassVar[str] = "concat"
    source: Annotated[Patterns, Meta(description="the pieces in order; {x:q|k|v}, where `to` lacks x, stands for three")] = field(
        name="from"
    )
    to: TemplateField

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self.source, self.over)
        if len(self.source) < 2 and not self.over:
            raise Refusal("concat wants several pieces: a list in `from`, or a placeholder that `to` lacks", code="CK102")

    @property
    def over(self) -> tuple[str, ...]:
        """The placeholders that are gathered: those of `from` that `to` lacks."""
        return tuple(dict.fromkeys(name for pattern in self.source for name in pattern.names if name not in self.to.mentions))

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        return _joined(self, self.over, table, context)

    def join(self, pieces: Sequence[Expr], lookup: Lookup) -> Expr:
        """The one tensor."""
        opened = [self.opened(piece, lookup) for piece in pieces]
        return self.closed(apply(Concat(axis=opened[0][1]), *(piece for piece, _ in opened)))


class Stack(Step, frozen=True):
    """Tensors of one shape become one with an axis more, over a placeholder, in its numeric order."""

    op: ClassVar[str] = "stack"
    source: PatternField = field(name="from")
    over: Annotated[str, Meta(description="the placeholder that becomes the axis")]
    to: TemplateField
    dim: Annotated[int, Meta(description="where the new axis goes")] = 0

    def __post_init__(self) -> None:
        if self.over not in self.source.names:
            raise Refusal(f"`over: {self.over}` is no placeholder of {self.source.text!r}", code="CK102")
        if self.over in self.to.mentions:
            raise Refusal(f"{self.to.text!r} must not use {{{self.over}}}: it is stacked away", code="CK102")

    def matched(self) -> Sequence[Pattern]:
        return (self.source,)

    def lower(self, table: Table, context: Context) -> Table:
        return _joined(self, (self.over,), table, context)

    def join(self, pieces: Sequence[Expr], lookup: Lookup) -> Expr:  # noqa: ARG002  (the same signature for both)
        """The one tensor."""
        rank = len(pieces[0].spec.shape)
        axis = self.dim if self.dim >= 0 else self.dim + rank + 1
        if not 0 <= axis <= rank:
            raise Refusal(f"a new axis cannot stand at {self.dim} in a tensor of rank {rank}", code="CK206", found=str(pieces[0].spec))
        return apply(
            Concat(axis=axis), *(apply(insert_axis(len(piece.spec.shape), min(axis, len(piece.spec.shape))), piece) for piece in pieces)
        )


class Unstack(Step, frozen=True):
    """One tensor becomes one per index of an axis, which goes away; `{over}` in `to` counts from 0."""

    op: ClassVar[str] = "unstack"
    source: Patterns = field(name="from")
    over: Annotated[str, Meta(description="the placeholder of `to` that counts the parts")]
    to: TemplateField
    dim: int = 0

    def __post_init__(self) -> None:
        if self.over not in self.to.mentions:
            raise Refusal(f"{self.to.text!r} does not use {{{self.over}}}, so all parts would have one name", code="CK102")
        taken = next((pattern for pattern in self.source if self.over in pattern.names), None)
        if taken is not None:
            raise Refusal(f"`over: {self.over}` is a placeholder of {taken.text!r} already", code="CK102")

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        results: dict[str, list[tuple[str, Entry]]] = {}
        total = 0
        for name, _, captures in self.claims(table, context):
            entry, lookup = table[name], context.scope.lookup(captures, table, name)
            try:
                axis = axis_of(self.dim, entry.expr)
                count, rank = entry.expr.spec.shape[axis], len(entry.expr.spec.shape)
                total += count
                if context.too_many(total):
                    return table
                if count > MAX_PARTS:
                    raise Refusal(f"unstacking would give {count:,} tensors; at most {MAX_PARTS:,} are allowed", code="CK211")
                made: list[tuple[str, Entry]] = []
                for at in range(count):
                    part = apply(remove_axis(rank, axis), apply(Slice(axis=axis, start=at, stop=at + 1), entry.expr))
                    new = rendered(self.to, with_captures(lookup, {self.over: Index(str(at))}), context, name)
                    if new is not None:
                        made.append((new, Entry(part, context.origin, entry.identity)))
            except Refusal as refusal:
                context.refused(refusal, name)
            else:
                results[name] = made
        return replaced(table, results, context)


def _check_groups(patterns: Sequence[Pattern], over: Sequence[str]) -> None:
    fixed = [sorted(name for name in pattern.names if name not in over) for pattern in patterns]
    for pattern, names in zip(patterns, fixed, strict=True):
        if names != fixed[0]:
            raise Refusal(
                f"{patterns[0].text!r} and {pattern.text!r} must have the same placeholders", code="CK102", found=f"{fixed[0]} and {names}"
            )


def _joined(step: ConcatStep | Stack, over: Sequence[str], table: Table, context: Context) -> Table:
    """Every group of names replaced, at the place of its first, by the one tensor that ``step.join`` makes of it."""
    results: dict[str, list[tuple[str, Entry]]] = {}
    place = {name: at for at, name in enumerate(table)}
    for group in grouped(step.claims(table, context), step.matched(), over, context):
        names = list(group.names())
        lookup = context.scope.lookup(group.captures, table)
        new = rendered(step.to, lookup, context, names[0])
        try:
            expr = step.join([table[name].expr for name in names], lookup)
        except Refusal as refusal:
            context.refused(refusal, new or names[0])
            continue
        if new is None:
            continue
        results.update({name: [] for name in names})
        results[min(names, key=place.__getitem__)] = [(new, Entry(expr, context.origin, table[names[0]].identity))]
    return replaced(table, results, context)
