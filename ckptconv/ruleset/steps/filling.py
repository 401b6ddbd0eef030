"""The step that makes a tensor which no source has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Union

from msgspec import Meta, field

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Fields, Parsed
from ckptconv.names import unusable
from ckptconv.plan import Expr, Fill
from ckptconv.ruleset.patterns import Pattern
from ckptconv.ruleset.steps.base import Context, DTypeField, Entry, PatternField, Step, Table, TemplateField, integer, rendered, replaced
from ckptconv.ruleset.steps.shaping import Numbers
from ckptconv.spec import MAX_ELEMENTS, MAX_RANK, DType, TensorSpec


class Normal(Fields, frozen=True):
    """Seeded normal numbers: the same on every machine."""

    std: float = 0.02
    seed: int = 0


def _value(value: Any) -> Any:
    if isinstance(value, dict) and list(value) == ["normal"]:
        return Normal.validated(value["normal"] or {})
    if value in ("zeros", "ones", "arange", "normal"):
        return Normal() if value == "normal" else value
    if isinstance(value, (bool, int, float)):
        return value
    raise Refusal("want zeros, ones, arange, normal, a number, or {normal: {std: 0.02, seed: 0}}", code="CK102", found=printable(value))


FillValue = Annotated[
    Union[Normal, Literal["zeros", "ones", "arange"], bool, int, float],
    Parsed(_value, {"anyOf": [
        {"enum": ["zeros", "ones", "arange", "normal"]}, {"type": ["number", "boolean"]},
        {"type": "object", "additionalProperties": False, "required": ["normal"], "properties": {"normal": {
            "type": "object", "additionalProperties": False,
            "properties": {"std": {"type": "number"}, "seed": {"type": "integer"}},
        }}},
    ]}),
]  # fmt: skip


class FillStep(Step, frozen=True, kw_only=True):
    """A tensor that no source has: zeros, ones, arange, a constant, or seeded normal numbers. ``for`` makes one per matching name."""

    op: ClassVar[str] = "fill"
    each: Annotated[PatternField | None, Meta(description="one tensor for each name that matches")] = field(default=None, name="for")
    to: TemplateField
    shape: Numbers
    dtype: DTypeField = DType.float32
    value: FillValue

    def matched(self) -> Sequence[Pattern]:
        return (self.each,) if self.each is not None else ()

    def lower(self, table: Table, context: Context) -> Table:
        if self.each is None:
            made = self._make(table, {}, None, context)
            new_table = dict(table)
            for name, entry in made:
                if name in table:
                    context.problem(
                        "CK202", f"two results under one name: {printable(name)}", found=f"{table[name].origin} and {entry.origin}"
                    )
                    return table
                reason = unusable(name)
                if reason:
                    context.problem("CK209", f"{reason}: {printable(name)!r}")
                    return table
                new_table[name] = entry
            return new_table
        results: dict[str, list[tuple[str, Entry]]] = {}
        for name, _, captures in self.claims(table, context):
            results[name] = [(name, table[name]), *self._make(table, captures, name, context)]
        return replaced(table, results, context)

    def _make(self, table: Table, captures: Any, each: str | None, context: Context) -> list[tuple[str, Entry]]:
        lookup = context.scope.lookup(captures, table, each)
        name = rendered(self.to, lookup, context, "fill")
        if name is None:
            return []
        try:
            return [(name, Entry(self._expression(lookup), context.origin, identity=f"fill {name}"))]
        except Refusal as refusal:
            context.refused(refusal, name)
            return []

    def _expression(self, lookup: Any) -> Expr:
        shape = tuple(integer(size, lookup, "a size", 0) for size in self.shape)
        spec = TensorSpec(shape, self.dtype)
        if len(shape) > MAX_RANK or spec.numel > MAX_ELEMENTS or spec.nbytes > MAX_ELEMENTS:
            raise Refusal("the tensor is too large to exist", code="CK211", found=printable(spec))
        if isinstance(self.value, Normal):
            return Fill("normal", float(self.value.std), self.value.seed, spec)
        if self.value == "arange":
            if len(shape) != 1:
                raise Refusal("arange fills a tensor of rank 1", code="CK206", found=str(spec))
            return Fill("arange", 0, 0, spec)
        constant = self.value if not isinstance(self.value, str) else 0 if self.value == "zeros" else 1
        return Fill("constant", constant, 0, spec)
