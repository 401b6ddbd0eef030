"""Steps between one tensor and several: split and concat along an axis, stack and unstack over a placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

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
from ckptconv.ruleset.steps.shaping import axis_of
from ckptconv.transforms import Concat, Slice
from ckptconv.transforms.sugar import insert_axis, remove_axis

MAX_PARTS = 100_000


class Split(Step):
    """One tensor becomes several, along an axis: equal parts, or `sizes`."""

    op: ClassVar[str] = "split"
    source: Patterns = Field(alias="from")
    to: Templates = Field(description="one name per part; {x:q|k|v} stands for three")
    dim: int = 0
    sizes: Annotated[tuple[Number, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)] | None = None

    @model_validator(mode="after")
    def _parts(self) -> Split:
        for pattern in self.source:
            count = len(list(fan_out(self.to, pattern.names)))
            if self.sizes is not None and len(self.sizes) != count:
                raise Refusal(f"{len(self.sizes)} sizes for {count} names", code="CK102")
            if count < 2:
                raise Refusal("split wants at least two names in `to`", code="CK102", try_="rename, or slice, for one")
        return self

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        results: dict[str, list[tuple[str, Entry]]] = {}
        for name, at, captures in self.claims(table, context):
            entry, lookup = table[name], context.scope.lookup(captures, table, name)
            targets = list(fan_out(self.to, self.source[at].names))
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
        axis = axis_of(self.dim, expr)
        size = expr.spec.shape[axis]
        if self.sizes is None:
            if size % count:
                raise Refusal(
                    f"axis {self.dim} has {size}, which is no multiple of {count}", code="CK206", found=str(expr.spec), try_="give sizes"
                )
            sizes = [size // count] * count
        else:
            sizes = [integer(part, lookup, "a size", 0) for part in self.sizes]
            if sum(sizes) != size:
                raise Refusal(
                    f"the sizes {sizes} add up to {sum(sizes)}, but axis {self.dim} has {size}", code="CK206", found=str(expr.spec)
                )
        parts: list[Expr] = []
        start = 0
        for part in sizes:
            parts.append(apply(Slice(axis=axis, start=start, stop=start + part), expr))
            start += part
        return parts


class ConcatStep(Step):
    """Several tensors become one, along an axis, in the order written."""

    op: ClassVar[str] = "concat"
    source: Patterns = Field(alias="from", description="the pieces in order; {x:q|k|v}, where `to` lacks x, stands for three")
    to: TemplateField
    dim: int = 0

    @model_validator(mode="after")
    def _same_placeholders(self) -> ConcatStep:
        _check_groups(self.source, self.over)
        if len(self.source) < 2 and not self.over:
            raise Refusal("concat wants several pieces: a list in `from`, or a placeholder that `to` lacks", code="CK102")
        return self

    @property
    def over(self) -> tuple[str, ...]:
        """The placeholders that are gathered: those of `from` that `to` lacks."""
        return tuple(dict.fromkeys(name for pattern in self.source for name in pattern.names if name not in self.to.mentions))

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        return _joined(self, self.over, table, context)

    def join(self, pieces: Sequence[Expr]) -> Expr:
        """The one tensor."""
        return apply(Concat(axis=axis_of(self.dim, pieces[0])), *pieces)


class Stack(Step):
    """Tensors of one shape become one with an axis more, over a placeholder, in its numeric order."""

    op: ClassVar[str] = "stack"
    source: PatternField = Field(alias="from")
    over: str = Field(description="the placeholder that becomes the axis")
    to: TemplateField
    dim: int = Field(0, description="where the new axis goes")

    @model_validator(mode="after")
    def _over_is_there(self) -> Stack:
        if self.over not in self.source.names:
            raise Refusal(f"`over: {self.over}` is no placeholder of {self.source.text!r}", code="CK102")
        if self.over in self.to.mentions:
            raise Refusal(f"{self.to.text!r} must not use {{{self.over}}}: it is stacked away", code="CK102")
        return self

    def matched(self) -> Sequence[Pattern]:
        return (self.source,)

    def lower(self, table: Table, context: Context) -> Table:
        return _joined(self, (self.over,), table, context)

    def join(self, pieces: Sequence[Expr]) -> Expr:
        """The one tensor."""
        rank = len(pieces[0].spec.shape)
        axis = self.dim if self.dim >= 0 else self.dim + rank + 1
        if not 0 <= axis <= rank:
            raise Refusal(f"a new axis cannot stand at {self.dim} in a tensor of rank {rank}", code="CK206", found=str(pieces[0].spec))
        return apply(
            Concat(axis=axis), *(apply(insert_axis(len(piece.spec.shape), min(axis, len(piece.spec.shape))), piece) for piece in pieces)
        )


class Unstack(Step):
    """One tensor becomes one per index of an axis, which goes away; `{over}` in `to` counts from 0."""

    op: ClassVar[str] = "unstack"
    source: Patterns = Field(alias="from")
    over: str = Field(description="the placeholder of `to` that counts the parts")
    to: TemplateField
    dim: int = 0

    @model_validator(mode="after")
    def _over_is_there(self) -> Unstack:
        if self.over not in self.to.mentions:
            raise Refusal(f"{self.to.text!r} does not use {{{self.over}}}, so all parts would have one name", code="CK102")
        taken = next((pattern for pattern in self.source if self.over in pattern.names), None)
        if taken is not None:
            raise Refusal(f"`over: {self.over}` is a placeholder of {taken.text!r} already", code="CK102")
        return self

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        results: dict[str, list[tuple[str, Entry]]] = {}
        for name, _, captures in self.claims(table, context):
            entry, lookup = table[name], context.scope.lookup(captures, table, name)
            try:
                axis = axis_of(self.dim, entry.expr)
                count, rank = entry.expr.spec.shape[axis], len(entry.expr.spec.shape)
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
        new = rendered(step.to, context.scope.lookup(group.captures, table), context, names[0])
        try:
            expr = step.join([table[name].expr for name in names])
        except Refusal as refusal:
            context.refused(refusal, new or names[0])
            continue
        if new is None:
            continue
        results.update({name: [] for name in names})
        results[min(names, key=place.__getitem__)] = [(new, Entry(expr, context.origin, table[names[0]].identity))]
    return replaced(table, results, context)
