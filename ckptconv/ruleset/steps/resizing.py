"""Steps that change how many there are: positions, input channels, rows of classes or vocabulary. None of them can be undone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ckptconv.errors import Refusal, printable
from ckptconv.fields import Parsed
from ckptconv.plan import Expr, Fill, apply
from ckptconv.ruleset.expressions import Lookup
from ckptconv.ruleset.steps.base import Number, integer
from ckptconv.ruleset.steps.filling import FillValue, Normal
from ckptconv.ruleset.steps.shaping import MapStep, Numbers, axis_of
from ckptconv.spec import TensorSpec
from ckptconv.transforms import Affine, Concat, Index, Reduce, Repeat, Resize, Slice
from ckptconv.transforms.resize import grid_of

MAX_EXTRA = 16


class ResizeStep(MapStep, frozen=True):
    """Position embeddings at another resolution: a line, a grid of patches with prefix tokens, or a table of relative positions."""

    op: ClassVar[str] = "resize"
    size: Annotated[Numbers, Meta(min_length=1, max_length=2, description="[n] for a line, [rows, columns] for a grid")]
    grid: Annotated[Numbers | None, Meta(description="the size that is there; a square, where nothing is said")] = None
    prefix: Annotated[Number | None, Meta(description="tokens before the positions (class, registers); found, where nothing is said")] = (
        None
    )
    suffix: Annotated[Number | None, Meta(description="entries after the positions (BEiT's relative table has 3)")] = None
    dim: Annotated[int | None, Meta(description="the axis of positions; the last but one, where nothing is said")] = None
    mode: Literal["bicubic", "bilinear", "linear", "nearest"] = "bicubic"
    antialias: bool = True

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        rank = len(expr.spec.shape)
        axis = axis_of(-2 if self.dim is None and rank > 1 else self.dim or 0, expr)
        size = tuple(integer(each, lookup, "a size", 1) for each in self.size)
        count = expr.spec.shape[axis]
        suffix = 0 if self.suffix is None else integer(self.suffix, lookup, "suffix", 0)
        prefix = None if self.prefix is None else integer(self.prefix, lookup, "prefix", 0)
        if self.grid is not None:
            there = tuple(integer(each, lookup, "a size", 1) for each in self.grid)
            total = there[0] * (there[1] if len(there) > 1 else 1)
            prefix = count - suffix - total if prefix is None else prefix
        elif len(size) == 1:
            prefix = prefix or 0
            there = (count - prefix - suffix,)
        else:
            prefix, there = self._square(expr, count - suffix, prefix)
        if there == size:
            return expr
        return apply(
            Resize(axis=axis, source=there, size=size, prefix=prefix, suffix=suffix, mode=self.mode, antialias=self.antialias), expr
        )

    def _square(self, expr: Expr, count: int, prefix: int | None) -> tuple[int, tuple[int, ...]]:
        """The prefix and the square grid behind it. A true square test: 197 is 1 + 14 x 14, and 201 is 5 + 14 x 14."""
        fits = [(extra, grid_of(count - extra)) for extra in ([prefix] if prefix is not None else range(min(MAX_EXTRA, count)))]
        found = [(extra, grid) for extra, grid in fits if grid is not None]
        if not found:
            what = f"{count} positions are no square grid" + (f" after {prefix} others" if prefix is not None else "")
            raise Refusal(what, code="CK206", found=str(expr.spec), try_="grid: [rows, columns]")
        return found[0]


class AdaptChannels(MapStep, frozen=True):
    """The first convolution for another number of input channels: summed, averaged, or repeated and scaled so that the sum stays."""

    op: ClassVar[str] = "adapt_channels"
    channels: Annotated[Number, Meta(description="how many there shall be")]
    how: Annotated[
        Literal["sum", "mean", "repeat"], Meta(description="sum and mean give one channel, each with the same value if more are wanted")
    ] = "sum"
    dim: int = 1

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        axis = axis_of(self.dim, expr)
        have, wanted = expr.spec.shape[axis], integer(self.channels, lookup, "channels", 1)
        if have == wanted:
            return expr
        if self.how != "repeat":
            one = apply(Reduce(how=self.how, axis=axis), expr)
            return one if wanted == 1 else apply(Repeat(axis=axis, times=wanted, interleave=False), one)
        times = -(-wanted // have)
        many = apply(Repeat(axis=axis, times=times, interleave=False), expr)
        cut = apply(Slice(axis=axis, start=0, stop=wanted), many) if times * have != wanted else many
        return apply(Affine(mul=have / wanted), cut)


def _class_map(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(row) is not int or row < -1 for row in value):
        raise Refusal("class_map lists, for every new row, the old row, or -1 for a new one", code="CK102", found=printable(value))
    return tuple(value)


ClassMap = Annotated[tuple[int, ...], Parsed(_class_map, {"type": "array", "items": {"type": "integer", "minimum": -1}})]


class ResizeRows(MapStep, frozen=True):
    """Classes or vocabulary: the first rows kept, cut, or filled up; `class_map` names the old row of every new one."""

    op: ClassVar[str] = "resize_rows"
    rows: Annotated[Number | None, Meta(description="how many there shall be")] = None
    class_map: Annotated[ClassMap | None, Meta(description="the old row for every new one, -1 for a new one")] = None
    value: Annotated[FillValue, Meta(description="of rows that are new")] = "zeros"
    dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.rows is None) == (self.class_map is None):
            raise Refusal("resize_rows wants either rows or class_map", code="CK102")

    def build(self, expr: Expr, lookup: Lookup) -> Expr:
        axis = axis_of(self.dim, expr)
        have = expr.spec.shape[axis]
        if self.rows is not None:
            wanted = integer(self.rows, lookup, "rows", 0)
            if wanted <= have:
                return expr if wanted == have else apply(Slice(axis=axis, start=0, stop=wanted), expr)
            return apply(Concat(axis=axis), expr, self._new(expr, axis, wanted - have))
        assert self.class_map is not None
        outside = next((row for row in self.class_map if row >= have), None)
        if outside is not None:
            raise Refusal(f"class_map names row {outside}, and there are {have}", code="CK206", found=str(expr.spec))
        fresh = self.class_map.count(-1)
        source = apply(Concat(axis=axis), expr, self._new(expr, axis, fresh)) if fresh else expr
        counter = iter(range(have, have + fresh))
        return apply(Index(axis=axis, take=tuple(row if row >= 0 else next(counter) for row in self.class_map)), source)

    def _new(self, expr: Expr, axis: int, count: int) -> Expr:
        spec = TensorSpec((*expr.spec.shape[:axis], count, *expr.spec.shape[axis + 1 :]), expr.spec.dtype)
        if isinstance(self.value, Normal):
            return Fill("normal", float(self.value.std), self.value.seed, spec)
        if self.value == "arange":
            raise Refusal("new rows cannot be arange", code="CK102", try_="zeros, ones, a number, normal")
        return Fill("constant", self.value if not isinstance(self.value, str) else 0 if self.value == "zeros" else 1, 0, spec)
