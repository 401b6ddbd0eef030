"""Steps from one tensor to one tensor: reshape, rearrange, slice, cast. In place (``keys``) or under a new name (``from``, ``to``)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Rest
from ckptconv.plan import Expr, apply
from ckptconv.ruleset.expressions import Lookup
from ckptconv.ruleset.patterns import Pattern
from ckptconv.ruleset.steps.base import (
    Context,
    DTypeField,
    DTypes,
    Entry,
    Number,
    Patterns,
    Step,
    Table,
    TemplateField,
    integer,
    rendered,
    replaced,
)  # fmt: skip
from ckptconv.transforms import Affine, Cast, Index, Pad, Rearrange, Repeat, Reshape, Slice

Numbers = tuple[Number, ...]


#: Axis name -> size, which a person writes as fields of their own beside the others.
Axes = Annotated[dict[str, Number], Rest({"type": ["integer", "string"], "description": "size of a named axis"})]


def check_axes(given: Iterable[str], pattern: str, known: str) -> None:
    """Refuses a field that is no axis of the pattern: a misspelt word, most likely."""
    axes = set(pattern.replace("(", " ").replace(")", " ").replace("->", " ").split())
    stranger = next((name for name in given if name not in axes), None)
    if stranger is not None:
        what = f"{printable(stranger)!r} is no axis of {pattern!r}" if pattern else f"unknown field {printable(stranger)!r}"
        raise Refusal(what, code="CK102", try_=f"fields: {known}")


class MapStep(Step, frozen=True, kw_only=True):
    """A step whose result has one tensor for each tensor that it matches."""

    keys: Annotated[Patterns | None, Meta(description="in place: the names stay")] = None
    source: Annotated[Patterns | None, Meta(description="under a new name, given by `to`")] = field(default=None, name="from")
    to: TemplateField | None = None

    def __post_init__(self) -> None:
        if (self.keys is None) == (self.source is None) or (self.source is None) != (self.to is None):
            raise Refusal(f"{self.op} wants either keys, or from and to", code="CK102")
        if self.to is not None:
            for pattern in self.source or ():
                if self.to.fan(pattern.names):
                    raise Refusal(f"{self.op} gives one tensor; {self.to.text!r} stands for several", code="CK103")

    def matched(self) -> Sequence[Pattern]:
        return self.keys or self.source or ()

    def lower(self, table: Table, context: Context) -> Table:
        results: dict[str, list[tuple[str, Entry]]] = {}
        for name, _, captures in self.claims(table, context):
            lookup = context.scope.lookup(captures, table, name)
            new = name if self.to is None else rendered(self.to, lookup, context, name)
            if new is None:
                continue
            try:
                expr = self.build(table[name].expr, lookup)
            except Refusal as refusal:
                context.refused(refusal, name)
                continue
            results[name] = [(new, Entry(expr, context.origin, table[name].identity))]
        return replaced(table, results, context)

    @abstractmethod
    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        """The new expression. Raises :class:`~ckptconv.errors.Refusal` where it does not fit."""


class ReshapeStep(MapStep, frozen=True):
    """Other sizes, the same elements in the same order."""

    op: ClassVar[str] = "reshape"
    shape: Annotated[Numbers, Meta(description="sizes; -1 once, for what remains")]

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        return apply(Reshape(shape=tuple(integer(size, lookup, "a size", -1) for size in self.shape)), expr)


class RearrangeStep(MapStep, frozen=True):
    """An einops pattern: transpose, permute, squeeze, rotary layouts, interleaving. Sizes of named axes stand beside the pattern."""

    op: ClassVar[str] = "rearrange"
    pattern: Annotated[str, Meta(min_length=1, description="einops notation: '(h d two) ... -> (h two d) ...'")]
    sizes: Axes = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_axes(self.sizes, self.pattern, "keys, from, to, pattern, and the axes")

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        sizes = tuple((name, integer(size, lookup, f"axis {name}", 1)) for name, size in self.sizes.items())
        return apply(Rearrange(pattern=self.pattern, sizes=sizes), expr)


class SliceStep(MapStep, frozen=True):
    """Some rows (columns, …) of a tensor."""

    op: ClassVar[str] = "slice"
    dim: int = 0
    start: Annotated[Number | None, Meta(description="first index; from the end if negative")] = None
    stop: Annotated[Number | None, Meta(description="index after the last; from the end if negative")] = None

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        axis = axis_of(self.dim, expr)
        size = expr.spec.shape[axis]
        start = 0 if self.start is None else integer(self.start, lookup, "start")
        stop = size if self.stop is None else integer(self.stop, lookup, "stop")
        start, stop = (start + size if start < 0 else start), (stop + size if stop < 0 else stop)
        if not 0 <= start <= stop <= size:
            raise Refusal(f"{start}:{stop} is outside axis {self.dim}, which has {size}", code="CK206", found=str(expr.spec))
        return apply(Slice(axis=axis, start=start, stop=stop), expr)


class CastStep(MapStep, frozen=True):
    """Another dtype. A finite value that becomes infinite is an error, unless `overflow` says otherwise."""

    op: ClassVar[str] = "cast"
    dtype: DTypeField
    overflow: Literal["error", "saturate", "inf"] = "error"
    of: Annotated[DTypes | None, Meta(description="only tensors of these dtypes; the others stay as they are")] = None

    def build(self, expr: Expr, lookup: Lookup) -> Expr:  # noqa: ARG002  (the same signature for all)
        if expr.spec.dtype == self.dtype or (self.of is not None and expr.spec.dtype not in self.of):
            return expr
        return apply(Cast(dtype=self.dtype, overflow=self.overflow), expr)


class IndexStep(MapStep, frozen=True, kw_only=True):
    """Elements of an axis in another order, or some of them: reordered blocks, a table of positions."""

    op: ClassVar[str] = "index"
    dim: int = 0
    take: Annotated[Numbers, Meta(description="which indices, in order")]

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        axis = axis_of(self.dim, expr)
        return apply(Index(axis=axis, take=tuple(integer(at, lookup, "an index", 0) for at in self.take)), expr)


class PadStep(MapStep, frozen=True):
    """More elements along an axis: `before` and `after`, or `size` for how many it shall have in all."""

    op: ClassVar[str] = "pad"
    dim: int = 0
    before: Number | None = None
    after: Number | None = None
    size: Annotated[Number | None, Meta(description="the axis' size afterwards; what is missing goes to its end")] = None
    value: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.size is None) == (self.before is None and self.after is None):
            raise Refusal("pad wants either size, or before and after", code="CK102")

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        axis = axis_of(self.dim, expr)
        if self.size is not None:
            before, after = 0, integer(self.size, lookup, "size", 0) - expr.spec.shape[axis]
            if after < 0:
                raise Refusal(
                    f"axis {self.dim} has {expr.spec.shape[axis]} already",
                    code="CK206",
                    found=str(expr.spec),
                    try_="slice makes it smaller",
                )
        else:
            before = 0 if self.before is None else integer(self.before, lookup, "before", 0)
            after = 0 if self.after is None else integer(self.after, lookup, "after", 0)
        return apply(Pad(axis=axis, before=before, after=after, value=self.value), expr)


class RepeatStep(MapStep, frozen=True, kw_only=True):
    """Every element of an axis several times: `a a b b` where interleaved (key and value heads), else `a b a b`."""

    op: ClassVar[str] = "repeat"
    dim: int = 0
    times: Number
    interleave: bool = True

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        return apply(Repeat(axis=axis_of(self.dim, expr), times=integer(self.times, lookup, "times", 1), interleave=self.interleave), expr)


class AffineStep(MapStep, frozen=True):
    """`x * mul + add`, in float32 and rounded back; approximate, and said so."""

    op: ClassVar[str] = "affine"
    mul: float = 1.0
    add: float = 0.0

    def build(self, expr: Expr, lookup: Lookup) -> Expr:  # noqa: ARG002  (the same signature for all)
        return apply(Affine(mul=float(self.mul), add=float(self.add)), expr)


def axis_of(dim: int, expr: Expr) -> int:
    """``dim`` counted from the front; refuses one that the tensor does not have."""
    rank = len(expr.spec.shape)
    if not -rank <= dim < rank:
        raise Refusal(f"there is no dim {dim} in a tensor of rank {rank}", code="CK206", found=str(expr.spec))
    return dim % rank
