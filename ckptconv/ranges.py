"""Which outputs are nothing but ranges of a source's bytes, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from ckptconv.formats.base import Placed, Storage
from ckptconv.plan import Apply, Expr, Output, Read
from ckptconv.transforms import Concat, Rearrange, Reshape, Slice
from ckptconv.transforms.rearrange import Side, sides

_PAGE = 4096
_LARGE = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a storage's bytes."""

    storage: Storage
    offset: int  #: from the storage's start
    nbytes: int
    tensor: str = ""  #: the source tensor that these bytes are, all of it

    @property
    def is_storage(self) -> bool:
        """True when it is all that its storage has, so that the recorded CRC-32 is its own."""
        return self.offset == 0 and self.nbytes == self.storage.nbytes


def span_of(placed: Placed, name: str = "") -> Span:
    """The bytes of a contiguous tensor."""
    return Span(placed.storage, placed.offset, placed.spec.nbytes, name)


def as_spans(expr: Expr, placed: Mapping[str, Placed]) -> tuple[Span, ...] | None:
    """The ranges that an output is, or None where its bytes must be computed.

    A tensor, rows of one, one under another shape, and such ones joined along their outermost axis (experts stacked, gate and up fused).
    """
    if isinstance(expr, Read):
        return (span_of(placed[expr.name], expr.name),) if placed[expr.name].contiguous else None
    if not isinstance(expr, Apply):
        return None
    move, first = expr.transform, expr.arguments[0].spec
    if isinstance(move, Reshape) or (isinstance(move, Rearrange) and _keeps_order(move.pattern)):
        return as_spans(expr.arguments[0], placed)
    if not isinstance(move, (Slice, Concat)):
        return None
    axis = move.axis % len(first.shape)
    if prod(first.shape[:axis]) != 1:  # the pieces would be interleaved
        return None
    found: list[Span] = []
    for argument in expr.arguments:
        spans = as_spans(argument, placed)
        if spans is None:
            return None
        found += spans
    if isinstance(move, Concat):
        return tuple(found)
    row = prod(first.shape[axis + 1 :]) * first.dtype.nbytes
    return tuple(_cut(found, move.start * row, move.stop * row))


def _cut(spans: Iterable[Span], start: int, stop: int) -> Iterable[Span]:
    """Bytes ``start`` to ``stop`` of the spans one after the other."""
    at = 0
    for span in spans:
        begin, end = max(start - at, 0), min(stop - at, span.nbytes)
        if begin == 0 and end == span.nbytes:
            yield span
        elif begin < end:
            yield replace(span, offset=span.offset + begin, nbytes=end - begin, tensor="")
        at += span.nbytes


def _keeps_order(pattern: str) -> bool:
    """True for a pattern that only groups axes, or adds and takes away axes of size 1: elements stay where they are."""
    left, right = sides(pattern)
    return _axes(left) == _axes(right)


def _axes(side: Side) -> list[str | None]:
    return [axis for group in side for axis in (group if group is not None else (None,))]


def phases_of(outputs: Iterable[Output], placed: Mapping[str, Placed]) -> dict[str, int]:
    """Where in their page large outputs lie in the source, of those that are one range of it."""
    found = {}
    for output in outputs:
        spans = as_spans(output.expr, placed) if output.expr.spec.nbytes >= _LARGE else None
        if spans is not None and len(spans) == 1:
            found[output.name] = (spans[0].storage.offset + spans[0].offset) % _PAGE
    return found
