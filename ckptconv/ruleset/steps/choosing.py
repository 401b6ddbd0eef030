"""Steps that choose: drop, keep, copy, tie, check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from msgspec import Meta, field
from msgspec.structs import replace

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Parsed
from ckptconv.names import collapse
from ckptconv.plan import Dropped, apply, reads
from ckptconv.ruleset import expressions
from ckptconv.ruleset.patterns import Pattern
from ckptconv.ruleset.steps.base import (
    Context,
    DTypes,
    Entry,
    Number,
    Patterns,
    Step,
    Table,
    Templates,
    integer,
    rendered,
    replaced,
    with_captures,
)  # fmt: skip
from ckptconv.ruleset.steps.fan import fan_out
from ckptconv.transforms import Guard


def _dropped(table: Table, names: set[str], reason: str, context: Context) -> list[Dropped]:
    return [Dropped(name, context.origin, reason, reads(entry.expr)) for name, entry in table.items() if name in names]


class Drop(Step, frozen=True):
    """Leaves tensors out, on purpose; they are listed in the report."""

    op: ClassVar[str] = "drop"
    keys: Patterns
    reason: Annotated[str, Meta(description="why; said in the report")] = ""

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"keys": value} if isinstance(value, (str, list)) else value

    def matched(self) -> Sequence[Pattern]:
        return self.keys

    def lower(self, table: Table, context: Context) -> Table:
        gone = {name for name, _, _ in self.claims(table, context)}
        context.dropped.extend(_dropped(table, gone, self.reason, context))
        return {name: entry for name, entry in table.items() if name not in gone}


class Keep(Step, frozen=True):
    """Leaves everything out but the named tensors."""

    op: ClassVar[str] = "keep"
    keys: Patterns
    reason: Annotated[str, Meta(description="why the rest goes; said in the report")] = ""

    @classmethod
    def short(cls, value: Any) -> Any:
        return {"keys": value} if isinstance(value, (str, list)) else value

    def matched(self) -> Sequence[Pattern]:
        return self.keys

    def lower(self, table: Table, context: Context) -> Table:
        kept = {name for name, _, _ in self.claims(table, context)}
        if not kept:  # a keep that matches nothing must not throw everything away
            return table
        context.dropped.extend(_dropped(table, set(table) - kept, self.reason, context))
        return {name: entry for name, entry in table.items() if name in kept}


class Copy(Step, frozen=True):
    """Writes a tensor a second time, under another name, with bytes of its own."""

    op: ClassVar[str] = "copy"
    source: Patterns = field(name="from")
    to: Templates
    _own_identity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for pattern in self.source:
            list(fan_out(self.to, pattern.names))

    def matched(self) -> Sequence[Pattern]:
        return self.source

    def lower(self, table: Table, context: Context) -> Table:
        results: dict[str, list[tuple[str, Entry]]] = {}
        claims = self.claims(table, context)
        targets = [list(fan_out(self.to, pattern.names)) for pattern in self.source]
        if context.too_many(sum(1 + len(targets[at]) for _, at, _ in claims)):
            return table
        for name, at, captures in claims:
            entry = table[name]
            results[name] = [(name, entry)]
            lookup = context.scope.lookup(captures, table, name)
            for template, extra in targets[at]:
                new = rendered(template, with_captures(lookup, extra), context, name)
                if new is not None:
                    identity = f"copy as {new}" if self._own_identity else entry.identity
                    results[name].append((new, replace(entry, origin=context.origin, identity=identity)))
        return replaced(table, results, context)


class Tie(Copy, frozen=True):
    """Gives one tensor a second name: one storage in ``.pth``, an alias record in safetensors."""

    op: ClassVar[str] = "tie"
    _own_identity: ClassVar[bool] = False


def _size(value: Any) -> expressions.Node | None:
    if value in ("*", "any", None, -1):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise Refusal("a size is an integer, an expression, or '*' for any", code="CK102", found=printable(value))
    return expressions.parse(value) if isinstance(value, str) else expressions.Node("literal", value)


Size = Annotated[Any, Parsed(_size, {"type": ["integer", "string", "null"]})]


class Check(Step, frozen=True):
    """Passes, or stops the conversion: shape, dtype, rank, number of names; finite and equal look at the values while they are converted."""

    op: ClassVar[str] = "check"
    keys: Patterns
    shape: tuple[Size, ...] | None = None
    dtype: DTypes | None = None
    rank: int | None = None
    count: Annotated[Number | None, Meta(description="how many names must match")] = None
    finite: Annotated[bool, Meta(description="no NaN and no infinity")] = False
    equal: Annotated[bool, Meta(description="all matching tensors hold the same values")] = False

    def __post_init__(self) -> None:
        if all(value is None for value in (self.shape, self.dtype, self.rank, self.count)) and not (self.finite or self.equal):
            raise Refusal("check wants at least one of shape, dtype, rank, count, finite, equal", code="CK102")

    def matched(self) -> Sequence[Pattern]:
        return self.keys

    def lower(self, table: Table, context: Context) -> Table:
        claims = self.claims(table, context)
        lookups = {name: context.scope.lookup(captures, table, name) for name, _, captures in claims}
        wrong: dict[str, list[str]] = {}
        for name, lookup in lookups.items():
            for complaint in self._complaints(table[name], lookup, context):
                wrong.setdefault(complaint, []).append(name)
        for complaint, names in list(wrong.items())[:10]:
            templates = collapse(names)
            context.problem("CK207", complaint, found=printable(", ".join(map(str, templates[:4]))))
        if len(wrong) > 10:
            context.problem("CK207", f"and {len(wrong) - 10} more differences")
        if self.count is not None:
            try:
                wanted = integer(self.count, context.scope.lookup({}, table), "count", 0)
            except Refusal as refusal:
                context.refused(refusal)
            else:
                if wanted != len(claims):
                    context.problem("CK207", f"want {wanted} names, found {len(claims)}")
        return self._guarded(table, [name for name, _, _ in claims], context)

    def _complaints(self, entry: Entry, lookup: Any, context: Context) -> list[str]:
        spec = entry.expr.spec
        found = []
        if self.rank is not None and len(spec.shape) != self.rank:
            found.append(f"want rank {self.rank}, found {list(spec.shape)}")
        if self.dtype is not None and spec.dtype not in self.dtype:
            found.append(f"want dtype {' or '.join(dtype.value for dtype in self.dtype)}, found {spec.dtype.value}")
        if self.shape is not None:
            try:
                wanted = [None if size is None else integer(size, lookup, "a size", 0) for size in self.shape]
            except Refusal as refusal:
                context.refused(refusal)
                return found
            if len(wanted) != len(spec.shape) or any(size not in (None, have) for size, have in zip(wanted, spec.shape, strict=True)):
                shown = ", ".join("*" if size is None else str(size) for size in wanted)
                found.append(f"want shape [{shown}], found {list(spec.shape)}")
        return found

    def _guarded(self, table: Table, names: Sequence[str], context: Context) -> Table:
        if not (self.finite or self.equal) or not names:
            return table
        guarded = dict(table)
        first = names[0]
        for name in names:
            # Each is compared with the first, and the first with each: whichever a later step drops, the comparison is still made.
            others = [] if not self.equal else [first] if name != first else names[1:]
            expr = table[name].expr
            try:
                if self.finite:
                    expr = apply(Guard(finite=True), expr)
                for other in others:
                    if table[other].expr != table[name].expr:
                        expr = apply(Guard(), expr, table[other].expr)
            except Refusal as refusal:
                context.refused(refusal, name)
            else:
                guarded[name] = replace(table[name], expr=expr)
        return guarded
